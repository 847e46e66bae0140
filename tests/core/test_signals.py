"""Ctrl-C and SIGTERM: once to save and end, twice to end at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY, WITHOUT_TORCH
from core.cli import Interrupts

LOOP = """
import os, sys, time
from core.cli import Interrupts, run_main
def main():
    interrupts = Interrupts()
    with interrupts.caught():
        try:
            interrupts.busy = sys.argv[1] == "busy"
            print("ready", flush=True)
            end = time.monotonic() + 30
            while interrupts.signal_number is None and time.monotonic() < end:
                time.sleep(0.01)
            print("saving", interrupts.exit_code, flush=True)
            if len(sys.argv) > 2:
                time.sleep(30)
            return interrupts.exit_code
        except KeyboardInterrupt:
            print("nothing to save", flush=True)
            return interrupts.exit_code
sys.exit(run_main(main, "loop"))
"""


def loop(*arguments: str, **options: object) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_TORCH + LOOP, *arguments],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        **{"stderr": subprocess.PIPE, **options},
    )
    assert process.stdout.readline() == "ready\n"
    return process


BOTH_SIGNALS = pytest.mark.parametrize(
    ("number_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
class TestSignals:
    @BOTH_SIGNALS
    def test_with_nothing_to_save_the_first_one_ends_the_program(self, number_: int, code: int) -> None:
        process = loop("idle")
        process.send_signal(number_)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (code, "nothing to save\n", "")

    @BOTH_SIGNALS
    def test_while_busy_the_first_one_is_a_flag(self, number_: int, code: int) -> None:
        process = loop("busy")
        process.send_signal(number_)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out) == (code, f"saving {code}\n")
        assert "Interrupted: saving after this batch" in err and "Traceback" not in err

    @BOTH_SIGNALS
    def test_the_second_one_ends_the_program_at_once(self, number_: int, code: int) -> None:
        process = loop("busy", "slow")
        process.send_signal(number_)
        assert process.stdout.readline() == f"saving {code}\n"
        begin = time.monotonic()
        process.send_signal(number_)
        process.communicate(timeout=25)
        assert process.returncode == code and time.monotonic() - begin < 20

    def test_a_reader_that_went_away_does_not_keep_the_state_from_being_saved(self) -> None:
        """`train.py 2>&1 | tee log`: Ctrl-C ends tee first."""
        read, write = os.pipe()
        process = loop("busy", stderr=write)
        os.close(write)
        os.close(read)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=10)
        assert (process.returncode, out) == (130, "saving 130\n")

    def test_the_earlier_handlers_come_back(self) -> None:
        earlier = [signal.getsignal(number_) for number_ in (signal.SIGINT, signal.SIGTERM)]
        with Interrupts().caught():
            assert signal.getsignal(signal.SIGTERM) != earlier[1]
        assert [signal.getsignal(number_) for number_ in (signal.SIGINT, signal.SIGTERM)] == earlier
