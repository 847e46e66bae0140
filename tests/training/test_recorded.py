"""Which recorded figure belongs to a checkpoint's weights, and what is said where there is none."""

from typing import Any

import pytest

from training.engine import Metrics
from training.recipe import Recipe
from training.recorded import compare, find_logged_metrics, history_rows, weights_epoch

RECIPE = Recipe()
HELD_OUT = Recipe(val_split=5000)


def rows(split: str, count: int = 3) -> list[dict[str, Any]]:
    common = {"learning_rate": 0.1, "train_loss": 2.0, "train_acc_percent": 40.0}
    held = [{f"{split}_loss": 2.0 + e, f"{split}_acc_percent": 30.0 + e} for e in range(1, count + 1)]
    return [{"epoch": epoch, **common, **row} for epoch, row in enumerate(held, start=1)]


def best(**more: Any) -> dict[str, Any]:
    return {"kind": "best", "epoch": 2, "history": rows("test"), **more}


def check(state: dict[str, Any], metrics: Metrics, recipe: Recipe = RECIPE, changes: list[str] | None = None):
    return compare(metrics, state, recipe, images_of_run=100, changes=changes or [])


@pytest.mark.parametrize(
    ("state", "epoch"),
    [
        ({"kind": "best", "epoch": 7}, 7),
        ({"kind": "results", "epoch": 7}, 7),
        ({"kind": "last", "epoch": 7, "batches_done": 0}, 6),
        ({"kind": "last", "epoch": 7, "batches_done": 3}, None),
        ({"kind": "last", "epoch": 1, "batches_done": 0}, None),
        ({"epoch": "7"}, None),
        ({}, None),
    ],
)
def test_epoch_that_weights_are_from(state: dict[str, Any], epoch: int | None) -> None:
    assert weights_epoch(state) == epoch


def test_figure_of_the_weights_own_epoch_is_found() -> None:
    found = find_logged_metrics(best())
    assert (found.accuracy_percent, found.loss) == (32.0, 4.0) and "epoch 2" in found.where
    last = best(kind="last", epoch=4, batches_done=0)
    assert find_logged_metrics(last).accuracy_percent == 33.0
    assert find_logged_metrics({**last, "batches_done": 1}) is None


def test_with_held_out_images_only_the_final_test_counts() -> None:
    tests = {"best": {"loss": 1.5, "accuracy_percent": 61.0, "images": 100}}
    state = best(history=rows("val"), final_test=tests)
    assert find_logged_metrics(state) is None, "only the results file tells the test of its own weights"
    assert find_logged_metrics({**state, "kind": "results"}).accuracy_percent == 61.0
    assert "validation images" in check(state, Metrics(1.5, 61.0, 100), HELD_OUT).text


@pytest.mark.parametrize(
    ("metrics", "equal", "words"),
    [
        (Metrics(4.0, 32.0, 100), True, "exactly; so does the loss"),
        (Metrics(4.0 + 2e-7, 32.0, 100), True, "exactly; the loss differs by 2e-07 nats"),
        (Metrics(4.0, 32.000001, 100), False, "Different here: batches of 7"),
        (Metrics(4.0, 32.0, 99), None, "100 images, this on 99"),
    ],
)
def test_equal_means_to_the_last_bit(metrics: Metrics, equal: bool | None, words: str) -> None:
    found = check(best(), metrics, changes=["batches of 7"])
    assert (found.equal, words in found.text) == (equal, True)
    assert found.recorded.accuracy_percent == 32.0


def test_another_version_is_named_as_a_reason() -> None:
    found = check(best(versions={"torch": "1.0", "unknown": "2"}), Metrics(4.0, 31.0, 100))
    assert "torch" in found.text and "unknown" not in found.text and "numpy" not in found.text
    assert "device or number of threads" in check(best(), Metrics(4.0, 31.0, 100)).text


@pytest.mark.parametrize(
    "history",
    [None, 7, "text", {}, [None], [[1, 2]], [{"epoch": 2}], [{**rows("test")[1], "test_loss": "low"}],
     [{**rows("test")[1], "train_loss": float("nan")}]],
)  # fmt: skip
def test_a_foreign_history_is_left_out(history: Any) -> None:
    assert history_rows({"history": history}) == []
    found = check(best(history=history, final_test=5), Metrics(4.0, 32.0, 100))
    assert (found.equal, found.recorded) == (None, None)
