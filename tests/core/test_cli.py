"""Flag types, errors, the log, and what a launcher says in the environment."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY, WITHOUT_TORCH
from core import cli
from core.cli import number, run_main, shell_command, start_log, whole_number
from core.errors import RunError, UsageError, printable

# ---- flag types ----


@pytest.mark.parametrize("text", ["1", "1000", " 7 ", "+7", "007"])
def test_whole_numbers_that_count(text: str) -> None:
    assert whole_number(1, 1000)(text) == int(text)


@pytest.mark.parametrize(
    "text", ["0", "1001", "-1", "1.0", "1e2", "", " ", "x", "1_000", "٣", "3\n4", "9" * 5000]
)
def test_whole_numbers_that_do_not(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="takes a whole number from 1 to 1,000, not"):
        whole_number(1, 1000)(text)


def test_a_whole_number_without_a_limit_names_only_the_lower_one() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="of at least 1, not '0'"):
        whole_number(1)("0")
    assert whole_number(1)("9000000000000000000") == 9 * 10**18


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "0", "101", "1e999", "-1", "", "x", "0x1", "1,5", "1/2"]
)
def test_numbers_that_do_not_count(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="takes a number from 1e-08 to 100, not"):
        number(1e-8, 100)(text)
    assert number(1e-8, 100)("1e-3") == 0.001


def test_what_is_shown_of_an_answer_is_short_and_harmless() -> None:
    assert printable("größer 7") == "größer 7"
    assert printable("a\x1b[2J\n\t\x00\udcff\u202e") == "a?[2J?????"
    assert printable("x" * 50, 40) == "x" * 40 + "..."
    assert printable("x" * 40, 40) == "x" * 40
    assert printable(ValueError("no\nroom")) == "no?room"


def test_a_command_is_quoted_for_this_systems_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "train.py", "--data-dir", "my data", "--name", "it's"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "posix")
        assert shlex.split(shell_command(words)) == words
        patch.setattr(os, "name", "nt")
        assert shell_command(words) == 'python train.py --data-dir "my data" --name it\'s'


# ---- errors and the log ----


@pytest.mark.parametrize(("error", "code"), [(RunError("disk full"), 1), (UsageError("--lr is wrong"), 2)])
def test_a_known_error_is_one_line_and_its_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture
) -> None:
    def main() -> int:
        raise error

    assert run_main(main, "train.py") == code
    assert capsys.readouterr() == ("", f"train.py: error: {error}\n")


def test_an_unknown_error_is_not_hidden() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main, "train.py")


SPEAK = """
import sys
from pathlib import Path
from core.cli import LOG, progress_bar, run_main, start_log
def main():
    start_log(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    with progress_bar(total=3) as bar:
        for number in range(3):
            LOG.info(f"line {number} \\udcff \\u00fc")
            bar.update()
    return 0
sys.exit(run_main(main, "speak"))
"""


def speak(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH + SPEAK, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, cwd=REPOSITORY, timeout=60, **{**streams, **options})


def test_a_log_line_of_any_text_goes_to_the_screen_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("earlier\n")
    done = speak(tmp_path / "log.txt", env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert (done.returncode, done.stderr) == (0, b"")  # and no bar without a terminal
    assert done.stdout.splitlines()[2] == rb"line 2 \udcff \xfc"
    assert (tmp_path / "log.txt").read_text("utf-8").splitlines()[-1] == "line 2 \\udcff ü"
    assert (tmp_path / "log.txt").read_text("utf-8").startswith("earlier\n")


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors in the child")
@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_stream_is_no_reason_to_fail(tmp_path: Path, descriptor: int) -> None:
    done = speak(tmp_path / "log.txt", preexec_fn=lambda: os.close(descriptor))
    assert done.returncode == 0
    assert len((tmp_path / "log.txt").read_text("utf-8").splitlines()) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_falls_silent() -> None:
    done = speak("/dev/full")
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_closed_pipe_ends_without_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = speak(stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write") as caught:
        start_log(tmp_path / "missing" / "log.txt")
    assert "\n" not in str(caught.value)
    for handler in list(cli.LOG.handlers):
        cli.LOG.removeHandler(handler)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1"}, (0, 1)),  # left behind by something else: there is one process
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
    ],
)
def test_the_launchers_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: object
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            cli.distributed.rank()
    else:
        assert (cli.distributed.rank(), cli.distributed.world_size()) == expected
