"""Questions through pipes and a real terminal, whatever is answered."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import REPOSITORY, WITHOUT_TORCH
from core import cli
from core.cli import MAX_ATTEMPTS, as_answer, ask, ask_yes_no, number, whole_number
from core.errors import UsageError

pexpect = pytest.importorskip("pexpect", reason="drives a pseudo-terminal") if os.name == "posix" else None
ON_A_TERMINAL = pytest.mark.skipif(pexpect is None, reason="no pseudo-terminals here")
EPOCHS = as_answer(whole_number(1, 1000), "The number of epochs")
RATE = as_answer(number(1e-8, 100), "The learning rate")

# Three questions as train.py asks them, and what they came to.
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
    monkeypatch.setattr(cli.distributed, "broadcast_object", lambda value: "what the main process was told")
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
