"""Whole runs of train.py: what they say and the files they leave."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from helpers import REPOSITORY
from helpers.stand_ins import (
    EPOCH_LINE,
    EPOCHS,
    FINDER,
    QUICK,
    columns,
    forget_log,
    load,
    stand_in,
    stand_in_images,
    stand_in_network,
)
from model import BasicBlock, count_parameters
from train import main
from training.engine import evaluate
from training.recipe import Recipe
from utils import make_test_batches

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


def test_the_first_line_names_tf32(tf32_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(train.LOG, "info", lines.append)
    train.log_header(Recipe(), stand_in_network(BasicBlock), tf32_gpu, images=(300, 200))
    assert lines[0].startswith("Device: Some GPU, fp32 (TF32) | Network: ")


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


# ---- other runs ----


@pytest.mark.parametrize(("epochs", "words"), [("1", "Training: 1 epoch, "), ("2", "Training: 2 epochs, ")])
def test_messages_read_well(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, epochs: str, words: str
) -> None:
    assert main([*QUICK, "--epochs", epochs]) == 0
    assert words in capsys.readouterr().out


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
