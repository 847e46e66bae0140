"""What a choice of seed, split, schedule, data or name makes of a run of train.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import train as train_module
from helpers.stand_ins import (
    EPOCH_LINE,
    QUICK,
    TEST_IMAGES,
    columns,
    load,
    stand_in_images,
    stand_in_network,
    taken,
)
from model import BasicBlock
from train import main
from training.engine import evaluate
from utils import make_test_batches


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
    quick.setattr(train_module, "plot_history", lambda *_, title, **__: titles.append(title))
    assert main([*QUICK, "--epochs", "1", "--limit-train", "200", "--limit-test", "100"]) == 0
    out = capsys.readouterr().out
    note = "CIFAR-100, 200 training images only, 100 test images only"
    assert f"Data: {note}, 200 train / 100 test" in out and f"Analysis (resnet20, {note})" in out
    assert titles and all(note in title for title in titles)
    assert load("output/CNN_Model_best.pth")["recipe"]["limit_train"] == 200


def test_one_cycle_is_stepped_by_the_batch(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert main([*QUICK, "--epochs", "5", "--scheduler", "onecycle", "--max-lr", "0.5"]) == 0
    rates = columns("output/CNN_Model_history.csv")["learning_rate"]
    assert rates == pytest.approx(
        [0.02, 0.47623253, 0.43326323, 0.23131855, 0.043442133], rel=1e-6
    )  # torch's
    assert "onecycle with its peak at learning rate 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("name", [[], ["--name", "mine"], ["--name", "my_synthetic_run"]])
def test_a_synthetic_run_says_so_everywhere(
    quick: pytest.MonkeyPatch, finder: list[str], capsys: pytest.CaptureFixture, name: list[str]
) -> None:
    titles: list[str] = []
    quick.setattr(train_module, "plot_history", lambda *_, title, **__: titles.append(title))
    quick.setattr(train_module, "plot_lr_finder", lambda *a, title, **_: titles.append(title) or a[3])
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
