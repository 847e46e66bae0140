"""evaluate.py on a small run: its metrics are the run's own, and it says whether they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from cifar import dataset, synthetic
from cifar.dataset import balanced_subset, load_dataset
from core.cli import run_main
from core.errors import RunError
from core.machine import versions
from helpers.small_run import NAMES, Evaluated, make_run
from inspection.inference import ShiftAccuracy
from training import checkpoint
from training.checkpoint import load_checkpoint, save_checkpoint
from training.engine import Metrics
from training.engine import evaluate as engine_evaluate
from training.recipe import Recipe
from utils import make_test_batches


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No report is drawn; the evaluations that it would have shown are in the list."""
    shown: list[Any] = []
    nothing = ShiftAccuracy(np.zeros((5, 5)), 30)
    monkeypatch.setattr(evaluate, "shift_accuracy", lambda *_, **__: nothing)  # the work of five passes
    monkeypatch.setattr(evaluate, "write_report", lambda evaluation, *_: shown.append(evaluation))
    return shown


def changed_file(evaluated: Evaluated, path: Path, **changes: Any) -> str:
    """Write the small run's best checkpoint with other entries to `path`; its name."""
    save_checkpoint(path, load_checkpoint(evaluated.run.files.best) | changes)
    return str(path)


def metrics_of(evaluated: Evaluated, *flags: str) -> dict[str, Any]:
    """Run evaluate.py with more flags; its JSON."""
    path = evaluated.folder / "more.json"
    assert evaluate.main([*evaluated.flags, *flags, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_json_holds_every_metric_and_top1_and_loss_equal_the_history_to_the_last_bit(evaluated) -> None:
    metrics, row = evaluated.metrics, evaluated.run.history[0]
    assert (metrics["top1"], metrics["loss"]) == (row["test_acc_percent"], row["test_loss"])
    assert metrics["recorded"] == {"top1": row["test_acc_percent"], "loss": row["test_loss"]}
    assert metrics["equals_recorded"] is True
    assert 10 < row["test_acc_percent"] < 90, "right and wrong answers, or this proves little"
    scores = {"top1", "top5", "loss", "superclass", "ece"}
    assert metrics.keys() >= scores | {"units", "weights"}
    assert metrics["images"] == 150 and metrics["images_per_s"] > 0
    assert metrics["top1"] <= metrics["top5"] <= 100 and metrics["top1"] <= metrics["superclass"] <= 100
    assert 0 < metrics["ece"] < 1
    assert (metrics["dataset"], metrics["model"], metrics["epoch"]) == ("cifar100", "resnet20", 1)
    assert (metrics["precision"], metrics["batch_size"], metrics["device"]) == ("fp32", 64, "cpu")
    classes = metrics["per_class"]
    assert set(classes) == set(NAMES["fine_label_names"])
    assert sum(entry["images"] for entry in classes.values()) == 150
    hits = sum(entry["images"] * entry["recall"] / 100 for entry in classes.values())
    assert 100 * hits / 150 == pytest.approx(metrics["top1"])
    assert metrics["tta"].keys() == scores | {"views"} and metrics["tta"]["views"] == 10
    assert metrics["tta"]["loss"] != metrics["loss"]


def test_json_holds_what_the_report_shows_further_down(evaluated) -> None:
    found, evaluation = evaluated.metrics, evaluated.evaluation
    shifts = found["shifts"]
    assert (shifts["pixels"], shifts["images"]) == ([-4, -2, 0, 2, 4], 30)
    assert shifts["top1"] == evaluation.shifts.top1_percent.tolist()
    assert shifts["top1"][2][2] > 40 > shifts["top1"][0][0], (
        "taught on these images, and these pixels are random"
    )
    risk = found["risk_coverage"]
    assert list(risk["risk_at_coverage"]) == [str(tenth) for tenth in range(10, 101, 10)]
    assert risk["risk_at_coverage"]["100"] == pytest.approx(100 - found["top1"])
    assert risk["risk_at_coverage"]["10"] < risk["area"] < risk["risk_at_coverage"]["100"]
    fitted = found["cross_fitted"]
    assert fitted["loss"] < found["loss"] and 0 < fitted["ece"] < 1 and len(fitted["temperatures"]) == 2
    assert found["against"] is None


def test_near_duplicates_are_found_in_a_subset_by_their_numbers(
    evaluated, without_report, tmp_path, monkeypatch
) -> None:
    """The list names every third test image; the run is tested on 150 of 200."""
    monkeypatch.setattr(dataset, "NEAR_DUPLICATES", tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("# every third\n" + "\n".join(map(str, range(0, 10_000, 3))))
    found = metrics_of(evaluated)["near_duplicates"]
    (shown,) = without_report
    data = load_dataset("cifar100", evaluated.data_dir).test
    copies = {image.tobytes() for image in data.images[::3]}
    listed = np.array([image.tobytes() in copies for image in shown.split.images])
    assert shown.near_duplicate.tolist() == listed.tolist() and 30 < listed.sum() < 70
    for name, mask in (("without", ~listed), ("with", listed)):
        correct = shown.logits.argmax(axis=1)[mask] == shown.split.labels[mask]
        assert found[name] == {"images": mask.sum(), "top1": pytest.approx(100 * correct.mean())}
    (tmp_path / "list.txt").write_text("10000\n")
    assert metrics_of(evaluated)["near_duplicates"]["with"] == {"images": 0, "top1": None}


def test_results_of_a_finished_run_and_its_last_state_compare_too(evaluated, without_report, capsys) -> None:
    evaluated.run.finish({})
    for path in (evaluated.run.files.results, evaluated.run.files.last):
        assert metrics_of(evaluated, "--weights", str(path))["equals_recorded"] is True
    assert "Top-1 equals the history's for epoch 1 exactly; so does the loss." in capsys.readouterr().out


def test_more_images_are_tested_on_request_and_compare_with_nothing(evaluated, without_report, capsys):
    assert metrics_of(evaluated, "--all-test")["images"] == 200
    assert "150 images, this on 200" in capsys.readouterr().out
    metrics = metrics_of(evaluated, "--limit-test", "100")
    assert (metrics["images"], metrics["equals_recorded"]) == (100, None)
    assert without_report[0].data_note == "all 200 test images of CIFAR-100"
    assert without_report[1].data_note == "a balanced subset of 100 of the 200 test images of CIFAR-100"
    assert without_report[1].name == "small"


def test_other_weights_than_recorded_are_told(evaluated, without_report, tmp_path, capsys) -> None:
    model = load_checkpoint(evaluated.run.files.best)["model"]
    model["fc.bias"] += torch.linspace(0, 3, 100)
    path = changed_file(evaluated, tmp_path / "changed.pth", model=model)
    metrics = metrics_of(evaluated, "--weights", path, "--batch-size", "50")
    assert metrics["equals_recorded"] is False
    out = capsys.readouterr().out
    assert "Warning: top-1 is" in out and "Different here: batches of 50." in out


def test_two_networks_are_compared_image_by_image(evaluated, without_report, tmp_path, capsys) -> None:
    """The other one prefers some classes, so that it gains and loses."""
    model = load_checkpoint(evaluated.run.files.best)["model"]
    model["fc.bias"] += torch.linspace(0, 12, 100)
    path = changed_file(evaluated, tmp_path / "other.pth", model=model)
    found = metrics_of(evaluated, "--against", path, "--tta")["against"]
    alone = metrics_of(evaluated, "--weights", path, "--tta")
    assert {key: found[key] for key in ("top1", "loss", "ece")} == {
        k: alone[k] for k in ("top1", "loss", "ece")
    }
    assert found["tta"].items() <= alone["tta"].items()
    assert (found["weights"], found["precision"]) == (path, "fp32")
    shown, other = without_report
    for kind, logits in (("single view", "logits"), ("10 views", "averaged_logits")):
        a, b = (getattr(each, logits).argmax(axis=1) == each.split.labels for each in (shown, other))
        paired = found["paired"][kind]
        assert (paired["gained"], paired["lost"]) == ((a & ~b).sum(), (b & ~a).sum())
        assert paired["gained"] > paired["lost"] > 0
        assert paired["difference_percent"] == pytest.approx(100 * (a.mean() - b.mean()))
        assert 0 < paired["p_value"] <= 1 and 0 < paired["standard_error_percent"] < 10
    for key in ("gained", "lost"):
        assert sum(row[key] for row in found["per_class"].values()) == found["paired"]["single view"][key]
    best = max(found["per_class"].items(), key=lambda item: item[1]["gained"] - item[1]["lost"])[0]
    out = capsys.readouterr().out
    assert f"A is right more often on: {best} " in out and "B is right more often on: class_" in out
    assert "McNemar's p" in out and metrics_of(evaluated)["against"] is None
    assert metrics_of(evaluated, "--against", path, "--precision", "bf16")["against"]["precision"] == "bf16"


def test_bf16_is_the_engines_bf16(evaluated, without_report) -> None:
    metrics = metrics_of(evaluated, "--precision", "bf16")
    split = balanced_subset(load_dataset("cifar100", evaluated.data_dir).test, 150, 3)
    measured = engine_evaluate(evaluated.run.model, make_test_batches(split, 64, "cpu"), precision="bf16")
    assert (metrics["top1"], metrics["loss"]) == (measured.accuracy_percent, measured.loss)
    assert metrics["loss"] != evaluated.metrics["loss"]


def test_a_run_on_synthetic_images_is_evaluated_on_them_and_says_so(
    evaluated, without_report, tmp_path, capsys, monkeypatch
):
    few = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8), np.arange(100)
    monkeypatch.setattr(synthetic, "generate", lambda split: few)
    data = load_dataset("synthetic", tmp_path)
    make_run(tmp_path, data, Recipe(model="resnet20", dataset="synthetic", epochs=2), "drawn")
    metrics = metrics_of(evaluated, "--weights", str(tmp_path / "drawn_best.pth"))
    assert (metrics["dataset"], metrics["images"]) == ("synthetic", 100)
    assert "all 100 test images of the synthetic data (not CIFAR-100)" in capsys.readouterr().out
    assert without_report[0].synthetic and metrics["near_duplicates"] is None


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--weights", "nowhere.pth"], 1, "nowhere.pth does not exist"),
        (["--limit-test", "201"], 2, "cannot take 201 of 200 images"),
        (["--output-dir", "file"], 1, "is a file, not a folder"),
        (["--output-dir", "empty"], 2, "no trained weights"),
        (["--model", "resnet32"], 2, "holds a resnet20, not a resnet32: pass --model resnet20"),
        (["--model", "resnet21"], 2, "--model 'resnet21' is not known"),
        (["--json", "empty/no/f.json"], 2, "there is no folder empty/no"),
        (["--json", "empty"], 2, "it is a folder"),
        (["--json", "small_best.pth"], 2, "is an input of this command"),
        (["--json", "photo.png"], 2, "photo.png exists and is not a .json file"),
        (["--output-dir", "empty", "--name", "x"], 2, "x_report.html: it is a folder"),
        (["--against", "photo.png"], 1, "photo.png is not a checkpoint"),
        (["--against", "small_best.pth"], 2, "is the file that is evaluated"),
        (["--against", "other.pth", "--json", "other.pth"], 2, "is an input of this command"),
        (["--against", "ten.pth"], 1, "ten.pth was trained on other classes (10)"),
    ],
)
def test_mistakes_are_one_line(evaluated, tmp_path, monkeypatch, capsys, flags, code, words) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("photo.png").write_bytes(b"photo")
    Path("empty/x_report.html").mkdir(parents=True)
    shutil.copy(evaluated.run.files.best, "small_best.pth")
    shutil.copy(evaluated.run.files.best, "other.pth")
    state = load_checkpoint("other.pth")
    model = state["model"] | {name: state["model"][name][:10] for name in ("fc.weight", "fc.bias")}
    ten = {name: state[name][:10] for name in ("classes", "superclass_of")} | {"model": model}
    changed_file(evaluated, Path("ten.pth"), **ten)
    monkeypatch.setattr(evaluate, "timed_logits", None)  # nothing is computed
    weights = [] if words.startswith("no ") else ["--weights", "small_best.pth"]
    assert run_main(lambda: evaluate.main([*evaluated.flags, *weights, *flags]), "evaluate.py") == code
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1
    assert words in error
    assert Path("photo.png").read_bytes() == b"photo"
    assert load_checkpoint("small_best.pth")["name"] == "small"


def test_weights_of_unknown_training_are_evaluated_and_nothing_is_said_of_it(
    evaluated, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "PRETRAINED_WEIGHTS", evaluated.run.files.best)  # names the classes
    torch.save(evaluated.run.model.state_dict(), tmp_path / "mine.pth")
    flags = [*evaluated.flags, "--weights", str(tmp_path / "mine.pth"), "--output-dir", str(tmp_path)]
    flags += ["--limit-test", "100"]
    assert run_main(lambda: evaluate.main(flags), "evaluate.py") == 1
    assert "holds weights, but not as train.py writes them" in capsys.readouterr().err
    assert evaluate.main([*flags, "--model", "resnet20", "--json", str(tmp_path / "mine.json")]) == 0
    metrics = json.loads((tmp_path / "mine.json").read_text())
    split = balanced_subset(load_dataset("cifar100", evaluated.data_dir).test, 100, 0)
    measured = engine_evaluate(evaluated.run.model, make_test_batches(split, 100, "cpu"))
    assert (metrics["top1"], metrics["images"]) == (measured.accuracy_percent, 100)
    assert metrics["epoch"] is metrics["recorded"] is metrics["equals_recorded"] is None
    page, out = (tmp_path / "mine_report.html").read_text("utf-8"), capsys.readouterr().out
    assert "mine.pth: resnet20, a balanced subset of 100 of" in out
    assert ">Network<" in page
    assert not any(words in page for words in ("Training data", "epochs of SGD", "epoch 1", "seed 0"))


def test_weights_of_other_classes_are_refused(evaluated, tmp_path) -> None:
    classes = list(reversed(evaluated.evaluation.data.classes))
    path = changed_file(evaluated, tmp_path / "x.pth", classes=classes)
    with pytest.raises(RunError, match="other classes"):
        evaluate.main([*evaluated.flags, "--weights", path])


def test_a_name_that_is_no_plain_name_does_not_leave_the_folder(evaluated, without_report, tmp_path) -> None:
    metrics_of(evaluated, "--weights", changed_file(evaluated, tmp_path / "mine.pth", name="../../evil"))
    assert without_report[0].name == "mine"


ROW = {"epoch": 2, "learning_rate": 0.1, "train_loss": 2.0, "train_acc_percent": 40.0}
STATE = {"kind": "best", "epoch": 2, "history": [ROW | {"test_loss": 4.0, "test_acc_percent": 32.0}]}


@pytest.mark.parametrize(
    ("state", "measured", "equal", "words"),
    [
        ({}, (4.0, 32.0, 10_000), True, "Top-1 equals the history's for epoch 2 exactly; so does the loss."),
        ({}, (4.0 + 2e-7, 32.0, 10_000), True, "exactly; the loss differs by 2e-07 nats."),
        (
            {},
            (4.0, 31.95, 10_000),
            True,
            "but for 5 images, as rounding explains. Different here: batches of 7.",
        ),
        ({}, (4.0, 32.11, 10_000), False, "is 32.0000 %. Different here: batches of 7."),
        ({}, (4.0, 32.0, 9_999), None, "10,000 images, this on 9,999."),
        (
            {"versions": {"torch": "1.0", "other": "2"}},
            (4.0, 31.0, 10_000),
            False,
            "batches of 7, torch {torch}.",
        ),
        ({"history": 7}, (4.0, 32.0, 10_000), None, "none is in the file."),
    ],
)
def test_equal_means_but_for_rounding(state: dict, measured: tuple, equal: bool | None, words: str) -> None:
    state, changes = STATE | state, ["batches of 7"]
    found = evaluate.compare(Metrics(*measured), state, Recipe(), images_of_run=10_000, changes=changes)
    assert (found.equal, found.text.endswith(words.format(torch=versions()["torch"]))) == (equal, True)
    assert (found.recorded is None) == (state["history"] == 7)


def test_reasons_without_changed_settings_and_without_test_metrics() -> None:
    measured = Metrics(4.0, 31.0, 100)
    found = evaluate.compare(measured, STATE, Recipe(), images_of_run=100, changes=[])
    assert found.text.endswith("Different here: device or number of threads.")
    found = evaluate.compare(measured, {}, Recipe(val_split=5000), images_of_run=100, changes=[])
    assert found.text.endswith("its best epoch was chosen on validation images.")
