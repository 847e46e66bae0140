"""The reference run that the repository carries: its weights, table and recipe belong together."""

import csv
import json
from pathlib import Path

import pytest
import torch

import evaluate
from helpers import REPOSITORY
from model import build_model
from training.checkpoint import CARRIED_WEIGHTS, load_checkpoint, load_model
from training.recipe import Recipe

FOLDER = REPOSITORY / "docs" / "reference_run"
TABLE = ("epoch", "learning_rate", "train_loss", "train_acc_percent", "test_loss", "test_acc_percent")


@pytest.fixture(scope="module")
def history() -> list[dict[str, float]]:
    with open(FOLDER / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == TABLE
    return [{name: float(value) for name, value in row.items()} for row in rows]


def test_the_weights_are_small_and_load_without_running_code() -> None:
    assert CARRIED_WEIGHTS.stat().st_size < 4_000_000
    state = torch.load(CARRIED_WEIGHTS, weights_only=True)
    build_model("resnet56", num_classes=100).load_state_dict(state["model"])


def test_the_weights_hold_the_committed_history(history: list[dict[str, float]]) -> None:
    rows = load_checkpoint(CARRIED_WEIGHTS)["history"]
    assert [row["epoch"] for row in rows] == list(range(1, 101))
    for row, written in zip(rows, history, strict=True):
        assert written == pytest.approx({name: row[name] for name in TABLE}, abs=1e-6)


def test_the_weights_are_those_of_the_best_epoch(history: list[dict[str, float]]) -> None:
    state = load_checkpoint(CARRIED_WEIGHTS)
    best = max(history, key=lambda row: row["test_acc_percent"])
    assert state["epoch"] == best["epoch"]
    assert state["accuracy_percent"] == pytest.approx(best["test_acc_percent"])


def test_the_recipe_is_the_default_one_for_100_epochs() -> None:
    recipe = Recipe.from_dict(load_checkpoint(CARRIED_WEIGHTS)["recipe"])
    assert json.loads((FOLDER / "recipe.json").read_text("utf-8")) == recipe.to_dict()
    assert recipe == Recipe(epochs=100, precision=recipe.precision)


@pytest.mark.real_data
def test_evaluation_gives_the_recorded_accuracy(real_data_dir: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    weights, out = (
        ["--weights", str(CARRIED_WEIGHTS)],
        ["--output-dir", str(tmp_path), "--json", str(figures)],
    )
    # fp32, which every processor has; another precision moves a few of the 10,000 images
    assert evaluate.main([*weights, *out, "--data-dir", str(real_data_dir), "--precision", "fp32"]) == 0
    measured = json.loads(figures.read_text("utf-8"))
    assert measured["images"] == 10_000
    assert measured["top1"] == pytest.approx(measured["recorded"]["top1"], abs=0.2)
    assert measured["top5"] > 90


def test_the_hub_gives_the_carried_weights() -> None:
    network = torch.hub.load(str(REPOSITORY), "resnet56", source="local", pretrained=True)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(network(images), load_model(CARRIED_WEIGHTS).model(images))
    assert len(network.classes) == 100 and not network.training
