"""The reference run that the repository carries: its weights, table and recipe belong together."""

import csv
import json
from pathlib import Path

import pytest
import torch

import evaluate
from helpers import REPOSITORY
from training.checkpoint import CARRIED_WEIGHTS, load_checkpoint, load_model
from training.recipe import Recipe

FOLDER = REPOSITORY / "docs" / "reference_run"
TABLE = ("epoch", "learning_rate", "train_loss", "train_acc_percent", "test_loss", "test_acc_percent")


def test_the_weights_are_small_and_safe_and_hold_the_committed_history_and_recipe() -> None:
    assert CARRIED_WEIGHTS.stat().st_size < 4_000_000
    torch.load(CARRIED_WEIGHTS, weights_only=True)
    state = load_checkpoint(CARRIED_WEIGHTS)
    with open(FOLDER / "history.csv", newline="") as file:
        table = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert tuple(table[0]) == TABLE
    assert [row["epoch"] for row in state["history"]] == list(range(1, 101))
    for row, written in zip(state["history"], table, strict=True):
        assert written == pytest.approx({name: row[name] for name in TABLE}, abs=1e-6)
    best = max(table, key=lambda row: row["test_acc_percent"])
    assert state["epoch"] == best["epoch"]
    assert state["accuracy_percent"] == pytest.approx(best["test_acc_percent"])
    recipe = Recipe.from_dict(state["recipe"])
    assert Recipe.from_dict(json.loads((FOLDER / "recipe.json").read_text("utf-8"))) == recipe
    assert recipe == Recipe(epochs=100, precision=recipe.precision)


@pytest.mark.real_data
def test_evaluation_gives_the_recorded_accuracy(real_data_dir: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    places = {"weights": CARRIED_WEIGHTS, "output-dir": tmp_path, "json": metrics, "data-dir": real_data_dir}
    # fp32, which every processor has; another precision moves a few of the 10,000 images
    assert evaluate.main([*(f"--{flag}={path}" for flag, path in places.items()), "--precision", "fp32"]) == 0
    measured = json.loads(metrics.read_text("utf-8"))
    assert measured["images"] == 10_000
    assert measured["top1"] == pytest.approx(measured["recorded"]["top1"], abs=0.2)
    assert measured["top5"] > 90


def test_the_hub_gives_the_carried_weights() -> None:
    network = torch.hub.load(str(REPOSITORY), "resnet56", source="local", pretrained=True)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(network(images), load_model(CARRIED_WEIGHTS).model(images))
    assert len(network.classes) == 100 and not network.training
