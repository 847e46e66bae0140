"""What train.py asks, from a pipe and at a real terminal, and what it makes of the answers."""

import builtins
import io
import os
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import train as train_module
from cifar.dataset import DatasetUnavailable, ImageData
from core.cli import run_main
from helpers import REPOSITORY
from helpers.stand_ins import EPOCHS, FINDER, QUICK, RATE, SUGGESTED, load, stand_in_images, taken
from train import main
from training.recipe import Recipe
from training.settings import NEW_RUN_FLAGS, Settings, build_parser

pexpect = pytest.importorskip("pexpect", reason="drives a pseudo-terminal") if os.name == "posix" else None


# ---- the questions ----


@pytest.mark.parametrize(
    ("answers", "flags", "asked", "expected"),
    [
        ("y\ny\n2\n", [], [FINDER, SUGGESTED, EPOCHS], (0.02, 2, True)),
        ("\n\n1\n", [], [FINDER, SUGGESTED, EPOCHS], (0.02, 1, True)),
        ("y\nn\n0.3\n1\n", [], [FINDER, SUGGESTED, RATE, EPOCHS], (0.3, 1, True)),
        ("y\nn\n\n1\n", [], [FINDER, SUGGESTED, RATE, EPOCHS], (0.1, 1, True)),
        ("n\n1\n", [], [FINDER, EPOCHS], (0.1, 1, False)),
        ("what\nn\n0\n-3\n2.5\n1\n", [], [FINDER, EPOCHS], (0.1, 1, False)),
        ("y\nn\nfast\n-1\nnan\n0.3\n1\n", [], [FINDER, SUGGESTED, RATE, EPOCHS], (0.3, 1, True)),
        ("n\n", [], [FINDER, EPOCHS], (0.1, 20, False)),
        ("", [], [FINDER, SUGGESTED, EPOCHS], (0.02, 20, True)),
        ("y\n1\n", ["--lr-finder"], [SUGGESTED, EPOCHS], (0.02, 1, True)),
        ("1\n", ["--no-lr-finder"], [EPOCHS], (0.1, 1, False)),
        ("1\n", ["--lr", "0.07"], [EPOCHS], (0.07, 1, False)),
        ("1\n", ["--lr", "0.07", "--lr-finder"], [EPOCHS], (0.07, 1, True)),
        ("n\n", ["--epochs", "1"], [FINDER], (0.1, 1, False)),
        ("", ["--lr", "0.07", "--epochs", "1"], [], (0.07, 1, False)),
        ("n\nn\n7\n", ["--yes", "--epochs", "1"], [], (0.02, 1, True)),
        ("n\nn\n7\n", ["--yes", "--epochs", "1", "--no-lr-finder"], [], (0.1, 1, False)),
        ("n\nn\n7\n", ["--yes"], [], (0.02, 20, True)),
        ("1\n", ["--scheduler", "onecycle", "--max-lr", "0.4"], [EPOCHS], (0.4, 1, False)),
    ],
)
def test_a_flag_given_is_a_question_not_asked(
    quick: pytest.MonkeyPatch,
    finder: list[str],
    capsys: pytest.CaptureFixture,
    answers: str,
    flags: list[str],
    asked: list[str],
    expected: tuple[float, int, bool],
) -> None:
    quick.setattr(sys, "stdin", io.StringIO(answers))
    recipes = []

    class Enough(Exception):
        """The questions are over."""

    def choose_compile_size(recipe: object, *_: object) -> None:
        recipes.append(recipe)
        raise Enough

    quick.setattr(train_module, "choose_compile_size", choose_compile_size)
    with pytest.raises(Enough):
        main(["--model", "resnet20", "--batch-size", "100", *flags])
    out = capsys.readouterr().out
    lr, epochs, ran = expected
    assert (recipes[0].max_lr or recipes[0].lr, recipes[0].epochs, bool(finder)) == (lr, epochs, ran)
    positions = [out.find(question) for question in asked]
    assert -1 not in positions and positions == sorted(positions)
    for question in {FINDER, SUGGESTED, RATE, EPOCHS} - set(asked):
        assert question not in out
    if not answers and asked:
        assert out.count("No answer: taking the default") == len(asked)
    wrong = [line for line in answers.splitlines() if line in ("what", "0", "-3", "2.5", "fast", "-1", "nan")]
    assert sum(out.count(f"not '{line}'") for line in set(wrong)) == len(wrong)
    if asked and asked[0] == FINDER and not ran:
        assert "No LR finder: the learning rate is 1.00e-01, the default." in out


# ---- an earlier run ----


class Keyboard(io.StringIO):
    """Standard input that passes for a terminal; `input` gives `answers` one by one."""

    def isatty(self) -> bool:
        return True

    @classmethod
    def typed(cls, patch: pytest.MonkeyPatch, *answers: str) -> list[str]:
        """Patch it in; returns the list of the questions that were asked."""
        questions: list[str] = []
        left = list(answers)

        def fake_input(question: str) -> str:
            questions.append(question)
            if not left:
                raise EOFError
            return left.pop(0)

        patch.setattr(sys, "stdin", cls())
        patch.setattr(builtins, "input", fake_input)
        return questions


@pytest.mark.parametrize(("answer", "name"), [("y", "CNN_Model"), ("n", "CNN_Model-2"), ("", "CNN_Model-2")])
def test_at_a_terminal_it_is_asked(quick: pytest.MonkeyPatch, answer: str, name: str) -> None:
    taken()
    questions = Keyboard.typed(quick, answer)
    assert main([*QUICK[1:], "--epochs", "1"]) == 0
    assert len(questions) == 1 and "Overwrite it? (y/n, default: n)" in questions[0]
    assert load(f"output/{name}_best.pth")["name"] == name


# ---- no data ----


@pytest.fixture
def no_data(quick: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """CIFAR-100 is not here, and its sources are a port of this machine that nobody listens at."""
    from cifar import dataset

    data = stand_in_images()

    def load_dataset(name: str, *arguments: object, **options: object) -> ImageData:
        return (
            replace(data, name=name)
            if name == "synthetic"
            else dataset.load_dataset(name, *arguments, **options)
        )

    quick.setattr(train_module, "load_dataset", load_dataset)
    quick.setattr(dataset, "SOURCES", tuple(f"http://127.0.0.1:9/{name}.tar.gz" for name in "ab"))
    quick.delenv("CIFAR100_URL", raising=False)
    return quick


NO_DATA = ["--data-dir", "nowhere"]


def test_without_data_and_network_one_message_and_exit_1(
    no_data: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code = run_main(lambda: main([*QUICK, "--epochs", "1", *NO_DATA]), "train.py")
    out, err = capsys.readouterr()
    assert code == 1
    assert err.startswith("train.py: error: CIFAR-100 could not be downloaded:\n") and "Traceback" not in err
    for words in ("http://127.0.0.1:9/a.tar.gz: ", "http://127.0.0.1:9/b.tar.gz: ", "--dataset synthetic"):
        assert words in err
    assert "nowhere/cifar-100-python.tar.gz" in err.replace(os.sep, "/")
    assert "Epoch [" not in out and not list(Path("output").glob("*.pth"))


@pytest.mark.parametrize("typed", [["maybe", "y"], [""], ["n"]])
def test_at_a_terminal_the_synthetic_set_is_offered(
    no_data: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, typed: list[str]
) -> None:
    questions = Keyboard.typed(no_data, *typed)
    code = run_main(lambda: main([*QUICK[1:], "--epochs", "1", *NO_DATA]), "train.py")
    out, err = capsys.readouterr()
    assert questions == ["Train on the built-in synthetic images instead? (y/n, default: y): "] * len(typed)
    assert "CIFAR-100 could not be downloaded" in out
    if typed == ["n"]:
        assert (code, err) == (1, "train.py: error: no data to train on\n")
    else:
        assert code == 0
        assert load("output/CNN_Model_synthetic_best.pth")["recipe"]["dataset"] == "synthetic"


def test_a_pipe_is_offered_nothing(no_data: pytest.MonkeyPatch) -> None:
    no_data.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    with pytest.raises(DatasetUnavailable):
        main([*QUICK[1:], "--epochs", "1", *NO_DATA])


# ---- the command that resumes ----

MACHINE_FLAGS = {
    "data_dir": ["--data-dir", "my data"],
    "data_url": ["--data-url", "https://example.org/a?b&c"],
    "workers": ["--workers", "0"],
    "tensorboard": ["--tensorboard"],
    "checkpoint_every": ["--checkpoint-every", "0.123456789"],
    "device": ["--device", "cpu"],
    "compile": ["--compile", "off"],
    "deterministic": ["--deterministic"],
    "sync_bn": ["--sync-bn"],
}


def test_every_flag_about_the_machine_is_in_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("CIFAR_DATA", "CIFAR100_URL"):
        monkeypatch.delenv(variable, raising=False)
    parser, state = build_parser(), tmp_path / "my runs" / "a_last.pth"
    recipe_flags = {field.name for field in fields(Recipe)} | {"recipe"}
    assert set(vars(parser.parse_args([]))) - recipe_flags - NEW_RUN_FLAGS == set(MACHINE_FLAGS)
    new_run = ["--yes", "--no-lr-finder", "--name", "a", "--overwrite", "--output-dir", str(tmp_path)]
    given = [*new_run, "--epochs", "3", "--lr", "0.2", "--milestones", "1", "2"]
    for name, flags in {"": [], **MACHINE_FLAGS}.items():
        command = Settings.from_args(parser.parse_args([*given, *flags])).resume_command(state)
        assert shlex.split(command) == ["python", "train.py", "--resume", str(state), *flags], name
        assert parser.parse_args(shlex.split(command)[2:])


# ---- the whole program at a real terminal ----


ON_STAND_INS = """
import sys
import pytest
import train
from cifar import dataset
from core.cli import run_main
from helpers import stand_ins
patch = pytest.MonkeyPatch()
data = dataset.DatasetUnavailable("CIFAR-100 could not be downloaded:\\n  nobody: not there")
stand_ins.stand_in(patch, plots=False)
loads = train.load_dataset
def load_dataset(name, *rest, **options):
    if name == "cifar100" and "--no-data" in sys.argv:
        raise data
    return loads(name)
patch.setattr(train, "load_dataset", load_dataset)
argv = [argument for argument in sys.argv[1:] if argument != "--no-data"]
sys.exit(run_main(lambda: train.main(argv), "train.py"))
"""


def at_a_terminal(folder: Path, *flags: str) -> "pexpect.spawn":
    """train.py on stand-ins at a pseudo-terminal, started in `folder`."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    command = ["-c", ON_STAND_INS, "--model", "resnet20", "--batch-size", "100", *flags]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return pexpect.spawn(
        sys.executable,
        command,
        cwd=folder,
        env=environment,
        encoding="utf-8",
        timeout=200,
        dimensions=(40, 120),
    )


@pytest.mark.skipif(pexpect is None, reason="no pseudo-terminals here")
def test_a_session_at_a_terminal(tmp_path: Path) -> None:
    child = at_a_terminal(tmp_path, "--no-data")
    child.expect_exact("Train on the built-in synthetic images instead? (y/n, default: y): ")
    assert "CIFAR-100 could not be downloaded" in child.before
    child.sendline("")
    child.expect_exact(FINDER)
    child.sendline("perhaps")
    child.expect_exact("Please answer y or n, not 'perhaps'.")
    child.expect_exact(FINDER)
    child.sendline("y")
    child.expect(r"Use suggested LR \d\.\d\de-\d\d\? \(y/n, default: y\): ")
    child.sendline("n")
    child.expect_exact(RATE)
    child.sendline("quick")
    child.expect_exact("Please answer again.")
    child.expect_exact(RATE)
    child.sendline("0.05")
    child.expect_exact(EPOCHS)
    child.sendline("0")
    child.expect_exact("from 1 to 100,000, not '0'. Please answer again.")
    child.expect_exact(EPOCHS)
    child.sendline("2")
    child.expect_exact("Training: 2 epochs, learning rate 0.05")
    child.expect(r"epoch 1/2: .*batch")  # a bar
    child.expect(r"Epoch \[2/2\] - .* \(synthetic data\)")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert (tmp_path / "output" / "CNN_Model_synthetic_training_results.pth").exists()


@pytest.mark.skipif(pexpect is None, reason="no pseudo-terminals here")
def test_the_end_of_input_at_a_terminal_takes_the_defaults(tmp_path: Path) -> None:
    child = at_a_terminal(tmp_path, "--no-lr-finder")
    child.expect_exact(EPOCHS)
    child.sendeof()
    child.expect_exact("No answer: taking the default, 20.")
    child.expect_exact("Training: 20 epochs, learning rate 0.1, x 0.2 after")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
