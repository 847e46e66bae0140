"""Questions through pipes and a real terminal, whatever is answered; flag types; signals; errors; the log."""

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
from cli import (
    MAX_ATTEMPTS,
    Interrupts,
    as_answer,
    ask,
    ask_yes_no,
    number,
    printable,
    run_main,
    start_log,
    whole_number,
)
from errors import RunError, UsageError

pexpect = pytest.importorskip("pexpect", reason="drives a pseudo-terminal") if os.name == "posix" else None
ON_A_TERMINAL = pytest.mark.skipif(pexpect is None, reason="no pseudo-terminals here")

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCHS = as_answer(whole_number(1, 1000), "The number of epochs")
RATE = as_answer(number(1e-8, 100), "The learning rate")

# In front of a script: cli without torch, which takes seconds to import, for scripts of one process.
WITHOUT_TORCH = """
import sys, types
sys.modules["distributed"] = types.SimpleNamespace(
    is_main=lambda: True, from_main=lambda value: value, stop=lambda: None
)
"""

# Three questions as train.py asks them, and what they came to.
QUESTIONS = """
import sys
from cli import as_answer, ask, ask_yes_no, number, run_main, whole_number
def main():
    finder = ask_yes_no("Do you want to run LR Finder? (y/n, default: y): ")
    rate = ask("Rate (default 1.00e-01): ", 0.1, as_answer(number(1e-8, 100), "The rate"), shown="1.00e-01")
    epochs = ask("Epochs (default 20): ", 20, as_answer(whole_number(1, 1000), "The number"), shown="20")
    print("ANSWERS", finder, rate, epochs)
    return 0
sys.exit(run_main(main, "questions"))
"""


def questions(
    answers: bytes | None, script: str = WITHOUT_TORCH + QUESTIONS, **environment: str
) -> subprocess.CompletedProcess:
    """The questions in a process of their own; None: with standard input closed."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=os.environ | environment,
        input=answers,
        capture_output=True,
        timeout=60,
        preexec_fn=(lambda: os.close(0)) if answers is None else None,
    )


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> "Typed":
    return Typed(monkeypatch)


class Typed:
    """Puts text on standard input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, text: str) -> None:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# ---- from a pipe ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [("\n", True), ("y\n", True), ("YES\n", True), ("n\n", False), (" No \r\n", False), ("n", False)],
)
def test_a_yes_or_no_in_any_spelling(typed: Typed, text: str, answer: bool) -> None:
    typed(text)
    assert ask_yes_no("Go on? ") is answer


def test_the_default_of_an_empty_answer_is_the_questions(typed: Typed) -> None:
    typed("\n")
    assert ask_yes_no("Overwrite? ", default=False) is False


def test_a_piped_answer_is_echoed_behind_its_question(typed: Typed, capsys: pytest.CaptureFixture) -> None:
    typed("7\n")
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 7
    assert capsys.readouterr().out == "Epochs: 7\n"


def test_a_wrong_answer_is_explained_and_asked_again(typed: Typed, capsys: pytest.CaptureFixture) -> None:
    typed("maybe\n0\n1e3\n12\n")
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 12
    out = capsys.readouterr().out
    assert out.count("Epochs: ") == 4
    assert (
        "The number of epochs takes a whole number from 1 to 1,000, not 'maybe'. Please answer again." in out
    )
    typed("maybe\nn\n")
    assert ask_yes_no("Go on? ") is False
    assert "Please answer y or n, not 'maybe'." in capsys.readouterr().out


def test_the_end_of_input_takes_the_default_and_says_so(typed: Typed, capsys: pytest.CaptureFixture) -> None:
    typed("")
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 20
    assert "No answer: taking the default, 20." in capsys.readouterr().out
    typed("nonsense")
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 20


@pytest.mark.parametrize("stdin", ["none", "closed", "failing"])
def test_no_standard_input_takes_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stdin: str
) -> None:
    class Failing(io.StringIO):
        def readline(self, *_: object) -> str:
            raise OSError(5, "Input/output error")

    stream = {"none": None, "closed": io.StringIO("5\n"), "failing": Failing()}[stdin]
    if stdin == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdin", stream)
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == 20
    assert "taking the default, 20" in capsys.readouterr().out


def test_wrong_answers_without_an_end_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.StringIO):
        def readline(self, size: int = -1) -> str:
            return "x" * size if size > 0 else "x\n"

    monkeypatch.setattr(sys, "stdin", Endless())
    with pytest.raises(UsageError, match=f"{MAX_ATTEMPTS} wrong answers to 'Epochs:'"):
        ask("Epochs: ", 20, EPOCHS, shown="20")


def test_on_other_processes_than_the_main_one_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.distributed, "is_main", lambda: False)
    monkeypatch.setattr(cli.distributed, "from_main", lambda value: "what the main process was told")
    monkeypatch.setattr(sys, "stdin", None)
    assert ask("Epochs: ", 20, EPOCHS, shown="20") == "what the main process was told"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (b"n\n0.5\n3\n", "False 0.5 3"),
        (b"\n\n\n", "True 0.1 20"),
        (b"", "True 0.1 20"),
        (None, "True 0.1 20"),
        (b"n\r\n0.5\r\n3\r\n", "False 0.5 3"),
        (b"\xff\xfe\nn\n\xc3\n0.5\n\xed\xa0\x80\n3\n", "False 0.5 3"),
        (b"\x00\x1b[2J\x07\nn\n0.5\n3", "False 0.5 3"),
        (b"n\nnan\ninf\n-1\n1e999\n0\n0.5\n" + b"9" * 5000 + b"\n3\n", "False 0.5 3"),
        ("ja\nn\n½\n0.5\n٣\n\uff13\n3\n".encode(), "False 0.5 3"),
    ],
    ids=["plain", "empty", "end", "closed", "crlf", "no UTF-8", "control", "numbers", "digits"],
)
def test_questions_of_a_process_through_a_pipe(answers: bytes | None, expected: str) -> None:
    done = questions(answers)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"ANSWERS {expected}" in done.stdout.decode()
    assert b"\x1b" not in done.stdout and b"\x00" not in done.stdout  # no terminal codes in a log


def test_questions_of_a_whole_process() -> None:
    done = questions(b"n\n0.5\n3\n", script=QUESTIONS)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"Epochs (default 20): 3\nANSWERS False 0.5 3\n")


def test_an_ascii_only_output_is_no_reason_to_fail() -> None:
    done = questions("é\nn\nü\n0.5\n3\n".encode(), PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"ANSWERS False 0.5 3" in done.stdout


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_an_endless_input_ends_with_one_line_and_exit_code_2() -> None:
    with open("/dev/zero", "rb") as zeros:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH + QUESTIONS],
            cwd=REPOSITORY,
            stdin=zeros,
            capture_output=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"wrong answers" in done.stderr


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_answered_or_run_out(data: bytes) -> None:
    """Through the same text layer that Python puts on standard input, at its strictest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="strict"))
        patch.setattr(sys, "stdout", io.StringIO())
        try:
            answers = (
                ask_yes_no("Go on? "),
                ask("Rate: ", 0.1, RATE, shown="0.1"),
                ask("Epochs: ", 20, EPOCHS, shown="20"),
            )
        except UsageError as error:
            assert "wrong answers" in str(error)
            return
    assert answers[0] in (True, False)
    assert 1e-8 <= answers[1] <= 100 and type(answers[1]) is float
    assert 1 <= answers[2] <= 1000 and type(answers[2]) is int


# ---- at a terminal ----


@pytest.fixture
def terminal():
    """The questions at a real pseudo-terminal."""
    child = pexpect.spawn(sys.executable, ["-c", WITHOUT_TORCH + QUESTIONS], cwd=str(REPOSITORY), timeout=30)
    yield child
    child.close(force=True)


@ON_A_TERMINAL
def test_the_defaults_at_a_terminal(terminal) -> None:
    for question in (
        r"LR Finder\? \(y/n, default: y\): ",
        r"Rate \(default .*\): ",
        r"Epochs \(default 20\): ",
    ):
        terminal.expect(question)
        terminal.sendline("")
    terminal.expect("ANSWERS True 0.1 20")
    terminal.expect(pexpect.EOF)


@ON_A_TERMINAL
def test_wrong_answers_at_a_terminal(terminal) -> None:
    terminal.expect("LR Finder")
    terminal.sendline("perhaps")
    terminal.expect("Please answer y or n, not 'perhaps'")
    terminal.expect("LR Finder")
    terminal.sendline(b"\xff\xfe")  # no UTF-8
    terminal.expect("Please answer y or n")
    terminal.sendline("n")
    terminal.expect("Rate")
    terminal.sendline("nan")
    terminal.expect("takes a number from 1e-08 to 100, not 'nan'")
    terminal.sendline("9" * 1000)
    terminal.expect("takes a number")
    terminal.sendline("0.25")
    terminal.expect("Epochs")
    terminal.sendline("\x1b[A")  # cursor up
    terminal.expect("takes a whole number")
    terminal.sendline("4")
    terminal.expect("ANSWERS False 0.25 4")
    terminal.expect(pexpect.EOF)


@ON_A_TERMINAL
def test_ctrl_d_takes_the_default_and_says_so(terminal) -> None:
    terminal.expect("LR Finder")
    terminal.sendeof()
    terminal.expect("No answer: taking the default, y")
    terminal.expect("Rate")
    terminal.sendline("0.5")
    terminal.expect("Epochs")
    terminal.sendeof()
    terminal.expect("taking the default, 20")
    terminal.expect("ANSWERS True 0.5 20")


@ON_A_TERMINAL
def test_ctrl_c_at_a_question_ends_with_130_and_no_traceback(terminal) -> None:
    terminal.expect("LR Finder")
    for _ in range(5):  # one that comes between the question and the read is seen with the next key only
        time.sleep(0.3)
        terminal.sendintr()
        if terminal.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=3) == 0:
            break
    terminal.close()
    assert terminal.exitstatus == 130
    assert b"Traceback" not in terminal.before and b"interrupted" in terminal.before


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
    assert printable("x" * 50) == "x" * 40 + "..."
    assert printable("x" * 40) == "x" * 40


# ---- signals ----

LOOP = """
import os, sys, time
from cli import Interrupts, run_main
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
        process.communicate(timeout=10)
        assert process.returncode == code and time.monotonic() - begin < 3

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
from cli import LOG, progress_bar, run_main, start_log
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
