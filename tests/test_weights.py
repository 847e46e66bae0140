"""The trained networks: weights, histories, recipes, metrics and the README's table belong together."""

import csv
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from cifar.dataset import balanced_subset, load_dataset
from evaluate import SAME_WITHIN
from helpers import REPOSITORY
from model import build_model, count_macs, count_parameters
from training.checkpoint import PRETRAINED_WEIGHTS, load_checkpoint, load_model
from training.engine import evaluate
from training.presets import PRESETS as PRESET_TEXTS
from training.presets import preset_values
from training.recipe import Recipe
from utils import make_test_batches

WEIGHTS, RUNS = REPOSITORY / "weights", REPOSITORY / "docs" / "runs"
COLUMNS = ("epoch", "learning_rate", "train_loss", "train_acc_percent", "test_loss", "test_acc_percent")
README = (REPOSITORY / "README.md").read_text("utf-8")
# of the README: the run's folder, its network, parameters, multiply-adds, epochs, accuracy of the last and
# the best epoch and over ten views, top-5, calibration error, the weights' file
ROW = re.compile(
    r"^\| \[.+\]\(docs/runs/(\w+)\) \| (\w+) \| ([\d,]+) \| ([\d,]+) \| (\d+) "
    + r"\| \**([\d.]+)\** " * 5
    + r"\| `?(?:weights/)?([\w.]+|—)`? \|$",
    re.MULTILINE,
)
ROWS = {row[0]: row[1:] for row in ROW.findall(README)}
PRETRAINED = {folder: WEIGHTS / row[-1] for folder, row in ROWS.items() if row[-1] != "—"}
# what was given beside --recipe NAME, by the run's folder
PRESETS = {
    "resnet56_best": ("best", {}),
    "wrn_16_4": ("teacher", {}),
    "resnet56_reference": ("reference", {"epochs": 100, "seed": 1}),
    "resnet56_fast": ("fast", {}),
    "resnet56_fast_distilled": (
        "fast",
        {name: preset_values("best")[name] for name in preset_values("best") if name.startswith("distill")}
        | {"teacher": ("weights/wrn_16_4_cifar100.pth",)},
    ),
}


def history(folder: str) -> list[dict[str, float]]:
    with open(RUNS / folder / "history.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_the_table_shows_every_run_and_every_file() -> None:
    assert set(ROWS) == set(PRESETS) == {path.name for path in RUNS.iterdir()}
    assert set(PRETRAINED.values()) == set(WEIGHTS.glob("*.pth"))
    assert max(PRETRAINED, key=lambda folder: float(ROWS[folder][4])) == "wrn_16_4"
    assert PRETRAINED["resnet56_best"] == PRETRAINED_WEIGHTS
    assert sum(path.stat().st_size for path in PRETRAINED.values()) < 20e6


def test_the_checksums_are_those_of_the_files() -> None:
    sums = {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in PRETRAINED.values()}
    lines = [line.split("  ") for line in (WEIGHTS / "SHA256SUMS").read_text("utf-8").splitlines()]
    assert {digest: name for digest, name in lines} == sums


@pytest.mark.parametrize("folder", PRESETS)
def test_a_row_holds_the_figures_of_its_run(folder: str) -> None:
    network, parameters, macs, epochs, last, best, views, top5, error, _ = ROWS[folder]
    with torch.device("meta"):
        model = build_model(network)
    assert (parameters, macs) == (f"{count_parameters(model):,}", f"{count_macs(model):,}")
    curve = [row["test_acc_percent"] for row in history(folder)]
    assert (len(curve), f"{curve[-1]:.2f}", f"{max(curve):.2f}") == (int(epochs), last, best)
    metrics = json.loads((RUNS / folder / "metrics.json").read_text("utf-8"))
    assert (metrics["model"], metrics["images"], metrics["equals_recorded"]) == (network, 10_000, True)
    assert metrics["recorded"]["top1"] == pytest.approx(max(curve))
    assert (f"{metrics['tta']['top1']:.2f}", f"{metrics['top5']:.2f}") == (views, top5)
    assert f"{100 * metrics['ece']:.2f}" == error


@pytest.mark.parametrize("folder", PRESETS)
def test_a_run_is_of_its_preset(folder: str) -> None:
    recipe = Recipe.from_dict(json.loads((RUNS / folder / "recipe.json").read_text("utf-8")))
    preset, given = PRESETS[folder]
    assert recipe == Recipe(**{**preset_values(preset), **given, "precision": recipe.precision})


@pytest.mark.parametrize("folder", PRESETS)
def test_the_help_gives_the_accuracy(folder: str) -> None:
    goal, _ = PRESET_TEXTS[PRESETS[folder][0]]
    assert f" {history(folder)[-1]['test_acc_percent']:.1f} %" in goal


@pytest.mark.parametrize("folder", PRETRAINED)
def test_weights_are_safe_and_hold_the_committed_history_and_recipe(folder: str) -> None:
    torch.load(PRETRAINED[folder], weights_only=True)
    state, table = load_checkpoint(PRETRAINED[folder]), history(folder)
    assert tuple(table[0]) == COLUMNS
    for row, written in zip(state["history"], table, strict=True):
        assert written == pytest.approx({name: row[name] for name in COLUMNS}, abs=6e-5)
    best = max(table, key=lambda row: row["test_acc_percent"])
    assert (state["epoch"], state["accuracy_percent"]) == (best["epoch"], best["test_acc_percent"])
    assert state["recipe"] == json.loads((RUNS / folder / "recipe.json").read_text("utf-8"))


@pytest.mark.real_data
@pytest.mark.parametrize("folder", PRETRAINED)
def test_evaluation_gives_the_recorded_accuracy(real_data_dir: Path, folder: str) -> None:
    """On all images for the best network, on a tenth of them for the others."""
    trained, test = load_model(PRETRAINED[folder]), load_dataset("cifar100", real_data_dir).test
    split = test if folder == "resnet56_best" else balanced_subset(test, 1000, seed=0)
    # fp32, which every processor has; another precision moves a few of the 10,000 images
    measured = evaluate(trained.model, make_test_batches(split, 1000, "cpu"))
    tolerance = SAME_WITHIN if split is test else 4.0  # three standard errors of a thousand images
    assert measured.accuracy_percent == pytest.approx(trained.state["accuracy_percent"], abs=tolerance)


@pytest.mark.parametrize(
    ("name", "pretrained", "folder"),
    [
        ("resnet56", True, "resnet56_best"),
        ("resnet56", "reference", "resnet56_reference"),
        ("wrn_16_4", True, "wrn_16_4"),
    ],
)
def test_the_hub_gives_the_pretrained_weights(name: str, pretrained: bool | str, folder: str) -> None:
    network = torch.hub.load(str(REPOSITORY), name, source="local", pretrained=pretrained)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(network(images), load_model(PRETRAINED[folder]).model(images))
    assert len(network.classes) == 100 and not network.training
