"""The main job: questions, files, words, refusals; mostly on a stand-in network and stand-in images."""

import argparse
import builtins
import contextlib
import csv
import functools
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dialogue
import run as run_module
import train as train_module
from cli import LOG, run_main
from dataset import DatasetUnavailable, ImageData, Split
from engine import evaluate
from flags import build_parser
from lr_suggestion import LRFinderResult
from model import MODELS, BasicBlock, count_parameters
from train import main
from utils import make_test_batches

pexpect = pytest.importorskip("pexpect", reason="drives a pseudo-terminal") if os.name == "posix" else None
REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN_IMAGES, TEST_IMAGES = 300, 200
# Nothing asked, nothing measured: 3 batches an epoch, whatever the processor.
QUICK = ["--yes", "--no-lr-finder", "--model", "resnet20", "--batch-size", "100", "--precision", "fp32"]
EPOCH_LINE = re.compile(
    r"Epoch \[(\d+)/(\d+)\] - Train Loss: (\d+\.\d{4}), Train Acc: (\d+\.\d{2})% - "
    r"(Test|Val) Loss: (\d+\.\d{4}), (?:Test|Val) Acc: (\d+\.\d{2})%"
    r"( \[target [\d.]+% reached\])?( \[best\])?( \(synthetic data\))?"
)


# ---- a stand-in network, stand-in images ----


def stand_in_network(block: type, *, num_classes: int = 100, **_: object) -> nn.Module:
    """A network that trains in a millisecond, in the place of ResNet-20."""
    layers = [
        nn.Conv2d(3, 8, 3, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(32, num_classes))


def stand_in_images() -> ImageData:
    """Noise with a tint for each class, 3 training and 2 test images a class: learnt in part."""
    draws = np.random.default_rng(0)
    tints = draws.integers(0, 200, (100, 1, 1, 3))

    def split(per_class: int) -> Split:
        labels = np.tile(np.arange(100), per_class)
        noise = draws.integers(0, 56, (len(labels), 32, 32, 3))
        return Split((tints[labels] + noise).astype(np.uint8), labels)

    names = tuple(f"class{label}" for label in range(100)), tuple(f"group{group}" for group in range(20))
    return ImageData("cifar100", split(3), split(2), *names, np.arange(100) // 5)


def stand_in(patch: pytest.MonkeyPatch, *, plots: bool = True) -> None:
    """Let train.py run on stand-ins: a pytest fixture here, the whole program under a terminal."""
    data = stand_in_images()
    patch.setitem(MODELS, "resnet20", functools.partial(stand_in_network, BasicBlock))
    patch.setattr(dialogue, "load_dataset", lambda name, *_, **__: replace(data, name=name))
    if not plots:
        patch.setattr(run_module, "plot_history", lambda rows, path, **_: path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """main() on stand-ins, without plots, in an empty folder; standard input is at its end."""
    stand_in(monkeypatch, plots=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    yield monkeypatch
    forget_log()


def forget_log() -> None:
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


def columns(path: str | Path) -> dict[str, list[float]]:
    """The columns of a history CSV as numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def load(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)


# ---- one whole run, looked at from all sides ----


@dataclass(frozen=True)
class Finished:
    folder: Path
    out: str
    err: str

    def path(self, ending: str) -> Path:
        return self.folder / f"CNN_Model{ending}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run of 10 epochs with the LR finder and all plots, drops after epochs 4, 7 and 9."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--yes", *QUICK[2:], "--epochs", "10", "--output-dir", str(folder), "--target-accuracy", "3"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(argv) == 0
        forget_log()
    return Finished(folder, out.getvalue(), err.getvalue())


def test_it_leaves_its_files_and_nothing_else(finished: Finished) -> None:
    endings = ["_best.pth", "_history.csv", "_last.prev.pth", "_last.pth", "_log.txt", "_lr_finder.png"]
    endings += ["_training_plots.png", "_training_results.pth"]
    assert sorted(path.name for path in finished.folder.iterdir()) == [f"CNN_Model{e}" for e in endings]


def test_the_first_line_says_what_is_trained(finished: Finished) -> None:
    first = finished.out.splitlines()[0]
    parameters = count_parameters(stand_in_network(BasicBlock))
    for words in (
        "Device: ",
        "fp32",
        f"resnet20, {parameters:,} parameters",
        "Data: CIFAR-100, 300 train / 200 test",
        "SGD, batch 100, weight decay 0.0005, multistep",
        "reference augmentation, seed 0",
    ):
        assert words in first
    for words in ("Command: python ", "Versions: code ", f"torch {version('torch')}"):
        assert words in finished.out


def test_a_line_an_epoch_in_the_references_form_with_marks(finished: Finished) -> None:
    lines = [line for line in finished.out.splitlines() if line.startswith("Epoch [")]
    matches = [EPOCH_LINE.fullmatch(line) for line in lines]
    assert all(matches) and len(matches) == 10, lines
    assert [(match[1], match[2], match[5]) for match in matches] == [
        (str(n), "10", "Test") for n in range(1, 11)
    ]
    accuracies = [float(match[7]) for match in matches]
    bests = [accuracy > max(accuracies[:n], default=-1) for n, accuracy in enumerate(accuracies)]
    assert [bool(match[9]) for match in matches] == bests
    assert max(accuracies) >= 3, "the stand-in should learn that much"
    first = next(n for n, accuracy in enumerate(accuracies) if accuracy >= 3)
    assert [bool(match[8]) for match in matches] == [n == first for n in range(10)]
    assert not any(match[10] for match in matches)


def test_the_history_holds_what_the_lines_say_and_each_epochs_rate(finished: Finished) -> None:
    table = columns(finished.path("_history.csv"))
    assert list(table) == [
        "epoch",
        "learning_rate",
        "train_loss",
        "train_acc_percent",
        "test_loss",
        "test_acc_percent",
    ]
    assert table["epoch"] == list(range(1, 11))
    said = [EPOCH_LINE.fullmatch(line) for line in finished.out.splitlines() if line.startswith("Epoch [")]
    for name, group, digits in (
        ("train_loss", 3, 4),
        ("train_acc_percent", 4, 2),
        ("test_loss", 6, 4),
        ("test_acc_percent", 7, 2),
    ):
        assert table[name] == pytest.approx([float(match[group]) for match in said], abs=0.6 * 10**-digits)
    lr = load(finished.path("_last.pth"))["recipe"]["lr"]
    drops = [0] * 4 + [1] * 3 + [2] * 2 + [3]
    assert table["learning_rate"] == pytest.approx([lr * 0.2**n for n in drops], rel=1e-6)
    assert table["train_loss"][-1] < table["train_loss"][0]


def test_the_suggested_rate_is_taken_and_its_plot_named(finished: Finished) -> None:
    suggested = re.search(r"LR finder: suggested LR (\S+) \(.+\); loss .+ over learning rates", finished.out)
    assert suggested and f"{load(finished.path('_best.pth'))['recipe']['lr']:.2e}" == suggested[1]
    assert f"LR finder plot: {finished.path('_lr_finder.png')}" in finished.out


@pytest.mark.parametrize("ending", ["_lr_finder.png", "_training_plots.png"])
def test_the_plots_are_pictures_with_something_on_them(finished: Finished, ending: str) -> None:
    from PIL import Image

    with Image.open(finished.path(ending)) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 400
    assert 0.005 < (pixels < 128).mean() < 0.5


def test_the_checkpoints_load_with_plain_torch_and_say_what_made_them(finished: Finished) -> None:
    table = columns(finished.path("_history.csv"))
    best_epoch = int(np.argmax(table["test_acc_percent"])) + 1
    best, last, results = (
        load(finished.path(e)) for e in ("_best.pth", "_last.pth", "_training_results.pth")
    )
    for state, kind in ((best, "best"), (last, "last"), (results, "results")):
        assert state["kind"] == kind and state["name"] == "CNN_Model"
        assert state["recipe"]["model"] == "resnet20" and state["recipe"]["epochs"] == 10
        assert state["versions"]["torch"] == version("torch") and "albumentations" in state["versions"]
        assert len(state["classes"]) == len(state["superclass_of"]) == 100
        assert len(state["superclasses"]) == 20
    assert best["epoch"] == results["epoch"] == last["best"]["epoch"] == best_epoch
    assert results["accuracy_percent"] == max(table["test_acc_percent"])
    assert len(results["history"]) == len(last["history"]) == 10
    assert results["history"][-1]["test_acc_percent"] == table["test_acc_percent"][-1]
    assert all(torch.equal(value, results["model"][name]) for name, value in best["model"].items())
    assert last["epoch"] == 11 and last["batches_done"] == 0
    assert results["elapsed_s"] > 0 and results["final_test"] == {}


def test_the_results_hold_the_weights_of_the_best_epoch(finished: Finished) -> None:
    batches = make_test_batches(stand_in_images().test, 5000, "cpu")
    model = stand_in_network(BasicBlock)
    for ending, expected in (("_training_results.pth", "accuracy_percent"), ("_last.pth", None)):
        state = load(finished.path(ending))
        model.load_state_dict(state["model"])
        accuracy = evaluate(model, batches).accuracy_percent
        assert accuracy == (state[expected] if expected else state["history"][-1]["test_acc_percent"])


def test_the_log_file_holds_what_was_shown_and_there_are_no_bars(finished: Finished) -> None:
    assert finished.path("_log.txt").read_text("utf-8") == finished.out
    assert finished.err == ""
    assert "\r" not in finished.out and "\x1b" not in finished.out


def test_the_run_ends_with_an_analysis(finished: Finished) -> None:
    table = columns(finished.path("_history.csv"))
    words = [
        f"Best test accuracy:  {max(table['test_acc_percent']):.2f}%",
        f"Final test accuracy: {table['test_acc_percent'][-1]:.2f}% (epoch 10)",
        "chosen on the test images, which flatters",
        "Generalisation gap:",
        "Train loss:",
        "Total time:",
        f"Results: {finished.path('_training_results.pth')}",
    ]
    words += [f"\n  {phase} " for phase in ("1-4", "5-7", "8-9", "10-10")]
    assert all(word in finished.out for word in words), finished.out


# ---- the questions ----


FINDER = "Do you want to run LR Finder? (y/n, default: y): "
SUGGESTED = "Use suggested LR 2.00e-02? (y/n, default: y): "
RATE = "Enter learning rate (default 1.00e-01): "
EPOCHS = "Select number of epochs for training (default 20): "


@pytest.fixture
def finder(quick: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the LR finder and suggests 0.02; the list says whether it ran."""
    ran: list[str] = []

    def find_lr(*_: object, **__: object) -> LRFinderResult:
        ran.append("ran")
        rates, losses = np.logspace(-4, 0, 30).tolist(), np.linspace(5, 4, 30).tolist()
        return LRFinderResult(rates, losses, losses, 0.02, "steepest descent of the smoothed loss")

    quick.setattr(dialogue, "find_lr", find_lr)
    quick.setattr(dialogue, "plot_lr_finder", lambda *arguments, **_: arguments[3])
    return ran


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

    def start_run(_: argparse.Namespace, recipe: object, *__: object) -> None:
        recipes.append(recipe)
        raise Enough

    quick.setattr(train_module, "start_run", start_run)
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


@pytest.mark.parametrize(("epochs", "words"), [("1", "Training: 1 epoch, "), ("2", "Training: 2 epochs, ")])
def test_messages_read_well(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, epochs: str, words: str
) -> None:
    assert main([*QUICK, "--epochs", epochs]) == 0
    assert words in capsys.readouterr().out


# ---- choices ----


def test_the_same_seed_gives_the_same_run_and_another_seed_another(quick: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*QUICK, "--epochs", "2", "--name", name, "--seed", seed]) == 0
    histories = [Path(f"output/{name}_history.csv").read_bytes() for name in "abc"]
    assert histories[0] == histories[1] != histories[2]


def test_with_a_validation_split_the_test_images_are_read_once_at_the_end(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tested: list[int] = []

    def counting(model: nn.Module, batches: list, **options: object) -> object:
        tested.append(sum(len(labels) for _, labels in batches))
        metrics = evaluate(model, batches, **options)
        # the validation accuracy falls, so that the best epoch is the first, not the last
        return replace(metrics, accuracy_percent=50.0 - len(tested)) if len(tested) <= 3 else metrics

    quick.setattr(train_module, "evaluate", counting)
    assert main([*QUICK, "--epochs", "3", "--val-split", "100"]) == 0
    assert tested == [100] * 3 + [TEST_IMAGES] * 2  # the best and the last epoch
    out = capsys.readouterr().out
    assert "100 held out for validation, 200 train / 200 test" in out
    lines = [EPOCH_LINE.fullmatch(line) for line in out.splitlines() if line.startswith("Epoch [")]
    assert [match[5] for match in lines] == ["Val"] * 3
    table = columns("output/CNN_Model_history.csv")
    assert list(table)[-2:] == ["val_loss", "val_acc_percent"] and "test_acc_percent" not in table
    results = load("output/CNN_Model_training_results.pth")
    assert results["chosen_on"] == "val"
    assert results["epoch"] == int(np.argmax(table["val_acc_percent"])) + 1 == 1
    batches = make_test_batches(stand_in_images().test, 5000, "cpu")
    for key, state in (("best", results), ("last", load("output/CNN_Model_last.pth"))):
        model = stand_in_network(BasicBlock)
        model.load_state_dict(state["model"])
        stored = results["final_test"][key]
        assert stored["loss"] == pytest.approx(evaluate(model, batches).loss, rel=1e-6)
        assert stored["images"] == TEST_IMAGES
        assert f"Test accuracy of the {key} epoch" in out
        assert f"{stored['accuracy_percent']:.2f}% on 200 images that chose nothing" in out
    assert "flatters" not in out


def test_a_subset_says_so_wherever_its_figures_stand(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    titles: list[str] = []
    quick.setattr(run_module, "plot_history", lambda *_, title, **__: titles.append(title))
    assert main([*QUICK, "--epochs", "1", "--limit-train", "200", "--limit-test", "100"]) == 0
    out = capsys.readouterr().out
    note = "CIFAR-100, 200 training images only, 100 test images only"
    assert f"Data: {note}, 200 train / 100 test" in out and f"Analysis (resnet20, {note})" in out
    assert titles and all(note in title for title in titles)
    assert load("output/CNN_Model_best.pth")["recipe"]["limit_train"] == 200


def test_one_cycle_rises_and_falls_by_the_batch(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main([*QUICK, "--epochs", "5", "--scheduler", "onecycle", "--max-lr", "0.5"]) == 0
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=15, anneal_strategy="cos")
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cycle.step()
    assert columns("output/CNN_Model_history.csv")["learning_rate"] == pytest.approx(rates[::3], rel=1e-6)
    assert "onecycle with its peak at learning rate 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("name", [[], ["--name", "mine"], ["--name", "my_synthetic_run"]])
def test_a_synthetic_run_says_so_everywhere(
    quick: pytest.MonkeyPatch, finder: list[str], capsys: pytest.CaptureFixture, name: list[str]
) -> None:
    titles: list[str] = []
    quick.setattr(run_module, "plot_history", lambda *_, title, **__: titles.append(title))
    quick.setattr(dialogue, "plot_lr_finder", lambda *a, title, **_: titles.append(title) or a[3])
    flags = [flag for flag in QUICK if flag != "--no-lr-finder"]
    assert main([*flags, "--epochs", "1", "--dataset", "synthetic", *name]) == 0
    assert all("synthetic" in path.name for path in Path("output").iterdir())
    assert len(titles) >= 2 and all("synthetic data (not CIFAR-100)" in title for title in titles)
    out = capsys.readouterr().out
    assert all("CIFAR-100" not in line.replace("(not CIFAR-100)", "") for line in out.splitlines())
    for start in ("Device: ", "Epoch [", "Analysis ("):
        lines = [line for line in out.splitlines() if line.startswith(start)]
        assert lines and all("synthetic" in line for line in lines), start
    [results] = Path("output").glob("*_training_results.pth")
    assert load(results)["recipe"]["dataset"] == "synthetic"


# ---- earlier runs ----


def taken(name: str = "CNN_Model") -> Path:
    """A finished run of that name, as far as its files go."""
    path = Path("output") / f"{name}_best.pth"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"precious")
    return path


def test_a_finished_run_is_kept_and_the_next_name_taken(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = taken()
    taken("CNN_Model-2")
    assert main([*QUICK, "--epochs", "1"]) == 0
    assert path.read_bytes() == b"precious"
    assert load("output/CNN_Model-3_best.pth")["name"] == "CNN_Model-3"
    assert "CNN_Model is kept" in capsys.readouterr().out


def test_overwrite_replaces_it(quick: pytest.MonkeyPatch) -> None:
    taken()
    assert main([*QUICK, "--epochs", "1", "--overwrite"]) == 0
    assert load("output/CNN_Model_best.pth")["kind"] == "best"
    assert not Path("output/CNN_Model-2_best.pth").exists()


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
    import dataset

    data = stand_in_images()

    def load_dataset(name: str, *arguments: object, **options: object) -> ImageData:
        return (
            replace(data, name=name)
            if name == "synthetic"
            else dataset.load_dataset(name, *arguments, **options)
        )

    quick.setattr(dialogue, "load_dataset", load_dataset)
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


# ---- refusals ----


WRONG = [
    ["--epochs", "0"],
    ["--lr", "nan"],
    ["--max-lr", "0.4"],
    ["--scheduler", "onecycle", "--max-lr", "0.4", "--lr", "0.1"],
    ["--scheduler", "onecycle", "--milestones", "3"],
    ["--scheduler", "linear"],
    ["--batch-size", "60000"],
    ["--test-batch-size", "0"],
    ["--limit-train", "50001"],
    ["--limit-train", "50"],
    ["--limit-test", "0"],
    ["--val-split", "50000"],
    ["--milestones", "9", "5"],
    ["--epochs", "5", "--milestones", "5"],
    ["--momentum", "1"],
    ["--weight-decay", "-1"],
    ["--gamma", "0"],
    ["--seed", "-1"],
    ["--workers", "-1"],
    ["--target-accuracy", "101"],
    ["--checkpoint-every", "0"],
    ["--model", "resnet57"],
    ["--augment", "none at all"],
    ["--dataset", "cifar10"],
    ["--device", "tpu"],
    ["--precision", "fp8"],
    ["--compile", "maybe"],
    ["--name", "../elsewhere"],
    ["--no-such-flag"],
]


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_a_wrong_value_is_one_line_and_exit_2_before_data_is_touched(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, argv: list[str]
) -> None:
    quick.setattr(dialogue, "load_dataset", lambda *_, **__: pytest.fail("data was touched"))
    try:
        code = run_main(lambda: main(["--yes", *argv]), "train.py")
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("train.py: error: ") and err.count("\n") == 1
    assert any(flag in err for flag in ["--batch-size", *argv] if flag.startswith("--"))
    assert not Path("output").exists()


def test_a_device_that_is_not_there_is_refused_before_data_is_touched(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    quick.setattr(dialogue, "load_dataset", lambda *_, **__: pytest.fail("data was touched"))
    quick.setattr(torch.cuda, "device_count", lambda: 0)
    assert run_main(lambda: main(["--yes", "--device", "cuda"]), "train.py") == 2
    assert "--device cuda" in capsys.readouterr().err


def test_every_choice_has_a_default_that_trains(quick: pytest.MonkeyPatch) -> None:
    """No flag is required: the namespace of no flags goes through."""
    args = build_parser().parse_args([])
    recipe = train_module.starting_recipe(args, None, torch.device("cpu"))
    assert (recipe.model, recipe.epochs, recipe.batch_size) == ("resnet56", 20, 128)


@pytest.mark.parametrize("where", ["file", "under a file", "read-only"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_data_is_touched(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, where: str
) -> None:
    quick.setattr(dialogue, "load_dataset", lambda *_, **__: pytest.fail("data was touched"))
    Path("taken").write_text("a file")
    folder = {"file": "taken", "under a file": "taken/deeper", "read-only": "closed"}[where]
    if where == "read-only":
        Path(folder).mkdir(mode=0o500)
        if os.name != "posix" or os.geteuid() == 0:
            pytest.skip("root writes anywhere")
    code = run_main(lambda: main([*QUICK, "--epochs", "1", "--output-dir", folder]), "train.py")
    err = capsys.readouterr().err
    assert code == 1 and err.startswith("train.py: error: ") and err.count("\n") == 1
    assert folder in err
    assert Path("taken").read_text() == "a file"


def test_a_diverging_run_stops_with_its_epoch_batch_and_rate_and_keeps_what_was_saved(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from recipe import Recipe

    class Diverges(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            Diverges.calls += 1
            return super().forward(logits, labels) * (math.nan if Diverges.calls == 5 else 1)

    quick.setattr(Recipe, "build_criterion", lambda self: Diverges())
    code = run_main(lambda: main([*QUICK, "--epochs", "4", "--lr", "0.03"]), "train.py")
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1
    assert "NaN or infinite in batch 2 of epoch 2/4 at learning rate 0.03" in err
    last = load("output/CNN_Model_last.pth")
    assert (last["epoch"], last["batches_done"]) == (2, 0)
    assert all(bool(torch.isfinite(value).all()) for value in last["model"].values())


# ---- the whole program ----


ON_STAND_INS = """
import sys
import pytest
import dataset, test_train
from cli import run_main
from train import main
patch = pytest.MonkeyPatch()
data = dataset.DatasetUnavailable("CIFAR-100 could not be downloaded:\\n  nobody: not there", [])
test_train.stand_in(patch, plots=False)
loads = test_train.dialogue.load_dataset
def load_dataset(name, *rest, **options):
    if name == "cifar100" and "--no-data" in sys.argv:
        raise data
    return loads(name)
patch.setattr(test_train.dialogue, "load_dataset", load_dataset)
argv = [argument for argument in sys.argv[1:] if argument != "--no-data"]
sys.exit(run_main(lambda: main(argv), "train.py"))
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


def test_the_program_itself_with_answers_from_a_pipe(tmp_path: Path) -> None:
    """ResNet-20 on the built-in images, LR finder included, without stand-ins."""
    flags = ["--dataset", "synthetic", "--model", "resnet20", "--batch-size", "8"]
    flags += ["--limit-train", "256", "--limit-test", "200"]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *flags],
        cwd=tmp_path,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        input="y\ny\n2\n",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    out = done.stdout
    positions = [out.index(words) for words in (FINDER + "y\n", "Use suggested LR ", EPOCHS + "2\n")]
    assert positions == sorted(positions)
    lines = [EPOCH_LINE.fullmatch(line) for line in out.splitlines() if line.startswith("Epoch [")]
    assert len(lines) == 2 and all(lines)
    names = {path.name.removeprefix("CNN_Model_synthetic") for path in (tmp_path / "output").iterdir()}
    assert {"_history.csv", "_lr_finder.png", "_training_plots.png", "_best.pth", "_last.pth"} <= names
    assert not list(tmp_path.glob("data/*"))


def test_the_program_itself_refuses_a_wrong_value(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), "--batch-size", "60000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train.py: error: --batch-size 60000") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_data
def test_one_epoch_on_the_real_images(
    real_data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--yes", "--no-lr-finder", "--model", "resnet20", "--limit-train", "512", "--limit-test", "200"]
    where = ["--data-dir", str(real_data_dir), "--output-dir", str(tmp_path)]
    assert main([*flags, *where, "--epochs", "1", "--batch-size", "32"]) == 0
    forget_log()
    table = columns(tmp_path / "CNN_Model_history.csv")
    assert 3.5 < table["train_loss"][0] < 5.5  # ln 100 = 4.6
    results = load(tmp_path / "CNN_Model_training_results.pth")
    assert results["classes"][0] == "apple" and results["superclasses"][0] == "aquatic_mammals"
    assert "Epoch [1/1] - Train Loss: " in capsys.readouterr().out
