"""Flag types, questions through pipes and a terminal, signals, errors and the log."""

import argparse
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core import cli
from core.cli import Interrupts, as_answer, ask, ask_yes_no, number, run_main, shell_command, whole_number
from core.errors import RunError, UsageError, printable
from helpers import REPOSITORY, WITHOUT_TORCH, python

pexpect = pytest.importorskip("pexpect", reason="drives a pseudo-terminal") if os.name == "posix" else None
POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="POSIX signals, pipes and terminals")
EPOCHS = as_answer(whole_number(1, 1000), "The number of epochs")


# ---- flag types ----

NO_WHOLE_NUMBERS = ["0", "1001", "-1", "1.0", "1e2", "", " ", "x", "1_000", "٣", "3\n4", "9" * 5000]
NO_NUMBERS = ["nan", "inf", "-inf", "0", "101", "1e999", "-1", "", "x", "0x1", "1,5", "1/2"]


@pytest.mark.parametrize(
    ("parse", "text", "limits"),
    [(whole_number(1, 1000), text, "whole number from 1 to 1,000") for text in NO_WHOLE_NUMBERS]
    + [(whole_number(1), "0", "whole number of at least 1")]
    + [(number(1e-8, 100), text, "number from 1e-08 to 100") for text in NO_NUMBERS],
)
def test_what_is_no_number_or_out_of_bounds(parse: Callable, text: str, limits: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"takes a {limits}, not") as caught:
        parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 100


def test_numbers_within_bounds() -> None:
    assert [whole_number(1, 1000)(text) for text in ("1", "1000", " 7 ", "+7", "007")] == [1, 1000, 7, 7, 7]
    assert whole_number(1)("9000000000000000000") == 9 * 10**18
    assert number(1e-8, 100)("1e-3") == 0.001


def test_text_in_a_message_is_short_and_printable() -> None:
    assert printable("größer a\x1b[2J\n\t\x00\udcff\u202e") == "größer a?[2J?????"
    assert (printable("x" * 40, 40), printable("x" * 41, 40)) == ("x" * 40, "x" * 40 + "...")
    assert printable(ValueError("no\nroom")) == "no?room"


def test_a_command_is_quoted_for_this_systems_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "train.py", "--data-dir", "my data", "--name", "it's"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "posix")
        assert shlex.split(shell_command(words)) == words
        patch.setattr(os, "name", "nt")
        assert shell_command(words) == 'python train.py --data-dir "my data" --name it\'s'


# ---- questions ----

HOW_TO_ANSWER = "No terminal: pipe the answers, one per line, or pass --yes or the flags instead.\n"


@pytest.fixture(autouse=True)
def no_question_yet() -> None:
    cli._say_how_to_answer.cache_clear()


@pytest.mark.parametrize(
    ("text", "default", "answer"),
    [("\n", True, True), ("\n", False, False), ("YES\n", False, True), ("maybe\n No \r\n", True, False)],
)
def test_a_yes_or_no(monkeypatch: pytest.MonkeyPatch, text: str, default: bool, answer: bool) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert ask_yes_no("Continue? ", default) is answer


def test_a_wrong_answer_is_explained_and_asked_again(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("maybe\n0\n12\n"))
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 12
    why = "  The number of epochs takes a whole number from 1 to 1,000, not 'maybe'. Please answer again.\n"
    again = f"Epochs: 0\n{why.replace('maybe', '0')}Epochs: 12\n"
    first = f"{HOW_TO_ANSWER}Epochs: maybe\n{why}{again}"
    assert capsys.readouterr().out == first  # an answer from a pipe is echoed
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 20
    assert HOW_TO_ANSWER not in capsys.readouterr().out  # before the first question alone


@pytest.mark.parametrize("stdin", ["none", "closed", "failing", "wrong to its end"])
def test_without_an_answer_the_default_is_used_and_announced(monkeypatch, capsys, stdin) -> None:
    class Failing(io.StringIO):
        def readline(self, *_: object) -> str:
            raise OSError(5, "Input/output error")

    closed = io.StringIO("5\n")
    closed.close()
    streams = {"none": None, "closed": closed, "failing": Failing(), "wrong to its end": io.StringIO("x")}
    monkeypatch.setattr(sys, "stdin", streams[stdin])
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 20
    assert "No answer: taking the default, 20." in capsys.readouterr().out


def test_other_ranks_get_the_answer_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.distributed, "is_main", lambda: False)
    monkeypatch.setattr(cli.distributed, "broadcast_object", lambda value: "rank 0's answer")
    monkeypatch.setattr(sys, "stdin", None)
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == "rank 0's answer"


# Three questions as train.py asks them, and the answers.
QUESTIONS = """
import sys
from core.cli import as_answer, ask, ask_yes_no, number, run_main, whole_number
def main():
    finder = ask_yes_no("Do you want to run LR Finder? (y/n, default: y): ")
    rate = ask("Rate (default 1.00e-01): ", 0.1, as_answer(number(1e-8, 100), "The rate"), shown="1.00e-01")
    epochs = ask("Epochs (default 20): ", 20, as_answer(whole_number(1, 1000), "The number"), shown="20")
    print("ANSWERS", finder, rate, epochs)
    return 0
sys.exit(run_main(main, "questions"))
"""
HOSTILE = (
    b"\xff\xfe\nn\r\n\xc3\n\x00\x1b[2J\x07\nnan\n1e999\n0.5\n\xed\xa0\x80\n" + b"9" * 5000 + "\n٣\n3".encode()
)


@pytest.mark.parametrize(("answers", "expected"), [(b"", "True 0.1 20"), (HOSTILE, "False 0.5 3")])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii:strict"])
def test_questions_of_a_process_through_a_pipe(answers: bytes, expected: str, encoding: str) -> None:
    process = python(QUESTIONS, stdin=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": encoding})
    out, err = process.communicate(answers, timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert f"ANSWERS {expected}" in out.decode()
    assert out.decode().startswith(HOW_TO_ANSWER.replace("\n", os.linesep)) and out.count(b"--yes") == 1
    assert b"\x1b" not in out and b"\x00" not in out  # no terminal codes in a log


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_an_endless_input_ends_with_one_line_and_exit_code_2() -> None:
    with open("/dev/zero", "rb") as zeros:
        process = python(QUESTIONS, stdin=zeros)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count(b"\n") == 1 and f"{cli.MAX_ATTEMPTS} wrong answers to 'Do you" in err.decode()


@pytest.fixture
def terminal():
    """The questions at a real pseudo-terminal."""
    child = pexpect.spawn(sys.executable, ["-c", WITHOUT_TORCH + QUESTIONS], cwd=str(REPOSITORY), timeout=30)
    yield child
    child.close(force=True)


@POSIX_ONLY
def test_wrong_answers_and_ctrl_d_at_a_terminal(terminal) -> None:
    terminal.logfile_read = transcript = io.BytesIO()
    for question, answer in [
        ("LR Finder", "perhaps"),
        ("Please answer y or n, not 'perhaps'[^?]*LR Finder", b"\xff\xfe"),  # no UTF-8
        ("Please answer y or n", "n"),
        ("Rate", "nan"),
        ("takes a number from 1e-08 to 100, not 'nan'", "9" * 1000),
        ("takes a number", "0.25"),
        ("Epochs", "\x1b[A"),  # cursor up
    ]:
        terminal.expect(question)
        terminal.sendline(answer)
    terminal.expect("takes a whole number.*Epochs")
    terminal.sendeof()
    terminal.expect("No answer: taking the default, 20")
    terminal.expect("ANSWERS False 0.25 20")
    assert b"No terminal" not in transcript.getvalue()


@POSIX_ONLY
def test_ctrl_c_at_a_question_ends_with_130_and_no_traceback(terminal) -> None:
    terminal.expect("LR Finder")
    for _ in range(5):  # one that comes between the question and the read is seen with the next key only
        time.sleep(0.3)
        terminal.sendintr()
        if terminal.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=15) == 0:
            break
    terminal.close()
    assert terminal.exitstatus == 130
    assert b"Traceback" not in terminal.before and b"interrupted" in terminal.before


# ---- signals ----

LOOP = """
import sys, time
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
            for _ in range(3000 if len(sys.argv) > 2 else 0):  # one sleep may begin just after a signal
                time.sleep(0.1)
            return interrupts.exit_code
        except KeyboardInterrupt:
            print("nothing to save", flush=True)
            return interrupts.exit_code
sys.exit(run_main(main, "loop"))
"""
BOTH_SIGNALS = pytest.mark.parametrize(
    ("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)


def loop(*arguments: str, **options: object) -> subprocess.Popen:
    process = python(LOOP, *arguments, text=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


@POSIX_ONLY
@BOTH_SIGNALS
def test_with_nothing_to_save_the_first_signal_ends_the_program(signal_number: int, code: int) -> None:
    process = loop("idle")
    process.send_signal(signal_number)
    assert process.communicate(timeout=60) == ("nothing to save\n", "")
    assert process.returncode == code


@POSIX_ONLY
@BOTH_SIGNALS
def test_while_busy_the_first_signal_sets_a_flag_and_the_second_ends_the_program(signal_number, code) -> None:
    process = loop("busy", "slow")
    process.send_signal(signal_number)
    assert process.stdout.readline() == f"saving {code}\n"
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)  # it would save for 300 s
    assert process.returncode == code
    assert err == "\nInterrupted: saving after this batch (once more to quit at once).\n"


@POSIX_ONLY
def test_a_broken_pipe_does_not_prevent_saving() -> None:
    """`train.py 2>&1 | tee log`: Ctrl-C ends tee first."""
    read, write = os.pipe()
    process = loop("busy", stderr=write)
    os.close(write)
    os.close(read)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "saving 130\n")


def test_the_earlier_handlers_are_restored() -> None:
    earlier = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts().caught():
        assert signal.getsignal(signal.SIGTERM) != earlier[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == earlier


# ---- errors and the log ----


@pytest.mark.parametrize(("error", "code"), [(RunError("disk full"), 1), (UsageError("--lr is wrong"), 2)])
def test_a_known_error_is_one_line_and_its_code(error, code, capsys) -> None:
    def main() -> int:
        raise error

    assert run_main(main, "train.py") == code
    assert capsys.readouterr() == ("", f"train.py: error: {error}\n")


def test_an_unknown_error_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0, "train.py")


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


def speak(*arguments: object, **options: object) -> tuple[int, list[bytes], bytes]:
    """The exit code, the lines on standard output and the text on standard error."""
    process = python(SPEAK, *arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, (out or b"").splitlines(), err


def test_a_log_line_of_any_text_goes_to_the_screen_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("earlier\n")
    code, out, err = speak(tmp_path / "log.txt", env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert (code, err) == (0, b"")  # no bar without a terminal
    assert out[2] == rb"line 2 \udcff \xfc"
    lines = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("earlier", "line 2 \\udcff ü")


@POSIX_ONLY
@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_stream_does_not_matter(tmp_path: Path, descriptor: int) -> None:
    assert speak(tmp_path / "log.txt", preexec_fn=lambda: os.close(descriptor))[0] == 0
    assert len((tmp_path / "log.txt").read_text("utf-8").splitlines()) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_goes_silent() -> None:
    code, out, err = speak("/dev/full")
    assert (code, len(out), err) == (0, 3, b"")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    code, _, err = speak(tmp_path / "missing" / "log.txt")
    assert code == 1 and err.startswith(b"speak: error: cannot write") and err.count(b"\n") == 1


@POSIX_ONLY
def test_a_closed_pipe_ends_without_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    code, _, err = speak(stdout=write)
    os.close(write)
    assert (code, err) == (1, b"")
