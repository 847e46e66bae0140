"""evaluate.py on a small run: its figures are the run's own."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_html_page import Tags

import evaluate
from cifar import synthetic
from cifar.dataset import balanced_subset, load_dataset
from conftest import REPOSITORY
from core.cli import run_main
from helpers.small_run import NAMES, Evaluated, make_run
from inspection import report
from training.checkpoint import load_checkpoint, save_checkpoint
from training.engine import evaluate as engine_evaluate
from training.recipe import Recipe
from utils import make_test_batches


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where no report is looked at, leave out the drawing; what would have been drawn is in the list."""
    shown: list[Any] = []

    def write(evaluation: Any, folder: Path) -> Path:
        shown.append(evaluation)
        return folder / f"{evaluation.name}_report.html"

    monkeypatch.setattr(evaluate, "write_report", write)
    return shown


def figures_of(evaluated: Evaluated, *flags: str) -> dict[str, Any]:
    """Run evaluate.py with more flags; its JSON."""
    path = evaluated.folder / "more.json"
    assert evaluate.main([*evaluated.flags, *flags, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_top1_and_loss_equal_the_history_to_the_last_bit(evaluated: Evaluated) -> None:
    row = evaluated.run.history[0]
    assert evaluated.code == 0
    assert evaluated.figures["top1"] == row["test_acc_percent"]
    assert evaluated.figures["loss"] == row["test_loss"]
    assert evaluated.figures["recorded"] == {"top1": row["test_acc_percent"], "loss": row["test_loss"]}
    assert evaluated.figures["equals_recorded"] is True
    assert 10 < row["test_acc_percent"] < 90, "right and wrong answers, or this proves little"


def test_json_holds_every_figure(evaluated: Evaluated) -> None:
    figures = evaluated.figures
    assert {"top1", "top5", "loss", "superclass", "ece", "images"} <= set(figures)
    assert figures["images"] == 150
    assert figures["top1"] <= figures["top5"] <= 100 and figures["top1"] <= figures["superclass"] <= 100
    assert 0 < figures["ece"] < 1
    assert (figures["dataset"], figures["model"], figures["epoch"]) == ("cifar100", "resnet20", 1)
    assert (figures["precision"], figures["batch_size"], figures["device"]) == ("fp32", 64, "cpu")
    classes = figures["per_class"]
    assert set(classes) == set(NAMES["fine_label_names"])
    assert sum(entry["images"] for entry in classes.values()) == 150
    hits = sum(entry["images"] * entry["recall"] / 100 for entry in classes.values())
    assert 100 * hits / 150 == pytest.approx(figures["top1"])
    assert figures["tta"]["views"] == 10 and set(figures["tta"]) == {
        "top1", "top5", "loss", "superclass", "ece", "views",
    }  # fmt: skip
    assert figures["tta"]["loss"] != figures["loss"]


def test_results_of_a_finished_run_and_its_last_state_compare_too(evaluated, without_report, capsys) -> None:
    evaluated.run.finish()
    for path in (evaluated.run.files.results, evaluated.run.files.last):
        assert figures_of(evaluated, "--weights", str(path))["equals_recorded"] is True
    assert "Top-1 equals the history's for epoch 1 exactly; so does the loss." in capsys.readouterr().out


def test_more_images_are_tested_on_request_and_compare_with_nothing(
    evaluated, without_report, capsys
) -> None:
    assert figures_of(evaluated, "--all-test")["images"] == 200
    assert "150 images, this on 200" in capsys.readouterr().out
    figures = figures_of(evaluated, "--limit-test", "100")
    assert (figures["images"], figures["equals_recorded"]) == (100, None)
    assert without_report[0].data == "all 200 test images of CIFAR-100"
    assert without_report[1].data == "a balanced subset of 100 of the 200 test images of CIFAR-100"
    assert without_report[1].name == "small"


def test_other_weights_than_recorded_are_told(evaluated, without_report, tmp_path, capsys) -> None:
    state = load_checkpoint(evaluated.run.files.best)
    state["model"]["fc.bias"] += torch.linspace(0, 3, 100)
    path = tmp_path / "changed.pth"
    save_checkpoint(path, state)
    figures = figures_of(evaluated, "--weights", str(path), "--batch-size", "50")
    assert figures["equals_recorded"] is False
    out = capsys.readouterr().out
    assert "Warning: top-1 is" in out and "Different here: batches of 50." in out


def test_bf16_is_the_engines_bf16(evaluated, without_report) -> None:
    figures = figures_of(evaluated, "--precision", "bf16")
    split = balanced_subset(load_dataset("cifar100", evaluated.data_dir).test, 150, 3)
    measured = engine_evaluate(evaluated.run.model, make_test_batches(split, 64, "cpu"), precision="bf16")
    assert (figures["top1"], figures["loss"]) == (measured.accuracy_percent, measured.loss)
    assert figures["loss"] != evaluated.figures["loss"]


def test_fp32_on_a_gpu_with_tf32_is_named_so(tf32_gpu: torch.device) -> None:
    test = SimpleNamespace(device=tf32_gpu, precision="fp32", batch_size=5000)
    assert evaluate.Outcome.setting_note.fget(test) == "Some GPU, fp32 (TF32), batches of 5,000"


def test_a_run_on_synthetic_images_is_evaluated_on_them_and_says_so(
    evaluated, without_report, tmp_path, capsys, monkeypatch
) -> None:
    few = [np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8), np.arange(100)] * 2
    monkeypatch.setattr(synthetic, "generate", lambda: few)
    data = load_dataset("synthetic", tmp_path)
    make_run(tmp_path, data, Recipe(model="resnet20", dataset="synthetic", epochs=2), "drawn")
    figures = figures_of(evaluated, "--weights", str(tmp_path / "drawn_best.pth"))
    assert (figures["dataset"], figures["images"]) == ("synthetic", 100)
    assert "all 100 test images of the synthetic data (not CIFAR-100)" in capsys.readouterr().out
    assert without_report[0].synthetic and "synthetic" in without_report[0].data
    page = Tags(report.report_page(without_report[0], fake_pictures()))
    assert "on synthetic data" in page.text
    assert "No figure here says anything about CIFAR-100." in page.text


def fake_pictures() -> dict[str, Any]:
    """One small file under every key, for what the words of the page say."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    keys = ("confusion_superclasses", "f1", "confusion", "confidently_wrong", "reliability")
    return {key: report.Picture(buffer.getvalue(), "alt", "caption") for key in keys}


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--weights", "nowhere.pth"], 1, "nowhere.pth does not exist"),
        (["--limit-test", "201"], 2, "cannot take 201 of 200 images"),
        (["--output-dir", "{file}"], 1, "is a file, not a folder"),
        (["--output-dir", "{empty}"], 2, "no trained weights"),
        (["--json", "{empty}/no/f.json"], 1, "cannot write"),
    ],
)
def test_mistakes_are_one_line(evaluated, without_report, tmp_path, capsys, flags, code, words) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    places = {"file": tmp_path / "file", "empty": tmp_path / "empty"}
    flags = [flag.format(**places) for flag in flags]
    weights = (
        []
        if "{empty}" in str(flags) or words.startswith("no ")
        else ["--weights", str(evaluated.run.files.best)]
    )
    assert run_main(lambda: evaluate.main([*evaluated.flags, *weights, *flags]), "evaluate.py") == code
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1
    assert words in error


def test_weights_of_other_classes_are_refused(evaluated, tmp_path, capsys) -> None:
    state = load_checkpoint(evaluated.run.files.best)
    state["classes"] = list(reversed(state["classes"]))
    save_checkpoint(tmp_path / "x.pth", state)
    flags = [*evaluated.flags, "--weights", str(tmp_path / "x.pth")]
    assert run_main(lambda: evaluate.main(flags), "evaluate.py") == 1
    assert "other classes" in capsys.readouterr().err


def test_a_name_that_is_no_plain_name_does_not_leave_the_folder(evaluated, without_report, tmp_path) -> None:
    state = load_checkpoint(evaluated.run.files.best)
    state["name"] = "../../evil"
    save_checkpoint(tmp_path / "mine.pth", state)
    figures_of(evaluated, "--weights", str(tmp_path / "mine.pth"))
    assert without_report[0].name == "mine"


def test_the_script_refuses_contradictions_with_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--all-test", "--limit-test", "5"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "not allowed with" in done.stderr
