"""A run's history: its rows, the metrics logged for given weights, and the analysis at the end."""

from typing import Any, NamedTuple

import pytest

from training.history import analyse, duration, find_logged_metrics, history_rows, weights_epoch
from training.recipe import Recipe


class Figures(NamedTuple):
    """As much of a pass's metrics as the analysis reads."""

    accuracy_percent: float
    images: int


def history(epochs: int, choice: str = "test") -> list[dict[str, Any]]:
    """Accuracy rises by one point an epoch (training) or half of one, loss falls to a tenth of epoch 1's."""
    rows = []
    for epoch in range(1, epochs + 1):
        left = 1 - 0.9 * (epoch - 1) / max(epochs - 1, 1)
        rows.append(
            {
                "epoch": epoch,
                "learning_rate": 0.1 if epoch <= 2 else 0.02,
                "train_loss": 4.0 * left,
                "train_acc_percent": 10.0 + epoch,
                f"{choice}_loss": 5.0 * left,
                f"{choice}_acc_percent": 10.0 + epoch / 2,
            }
        )
    return rows


def test_the_numbers_are_the_historys() -> None:
    recipe = Recipe(epochs=5, milestones=(2, 4))
    lines = analyse(history(5), recipe, 3, 3725.0, {})
    text = "\n".join(lines)
    assert lines[0] == "Analysis (resnet56, CIFAR-100)"
    assert "Best test accuracy:  11.50% (epoch 3)" in text
    assert "Final test accuracy: 12.50% (epoch 5)" in text
    assert "Generalisation gap: 2.50 points (15.00% training - 12.50% test)" in text
    assert "Train loss: 4.0000 -> 0.4000 (90% reduction)" in text
    assert "Test loss: 5.0000 -> 0.5000 (90% reduction)" in text
    assert "chosen on the test images, which flatters it" in text
    assert lines[-1].strip() == "Total time: 1 h 02 min"
    assert all("\n" not in line for line in lines)


def test_with_held_out_images_test_figures_are_given_apart() -> None:
    tests = {"best": Figures(70.126, 10_000), "last": Figures(69.0, 10_000)}
    lines = analyse(history(5, "val"), Recipe(epochs=5, val_split=500), 4, 1.0, tests)
    text = "\n".join(lines)
    assert "Best validation accuracy:  12.00% (epoch 4)" in text
    assert "Test accuracy of the best epoch (4): 70.13% on 10,000 images" in text
    assert "Test accuracy of the last epoch (5): 69.00% on 10,000 images" in text
    assert "500 held out" in lines[0] and "flatters" not in text


def test_each_phase_of_the_schedule_has_its_line() -> None:
    lines = analyse(history(5), Recipe(epochs=5, milestones=(2, 4)), 5, 1.0, {})
    start = next(number for number, line in enumerate(lines) if "learning rate" in line)
    phases = [line.split() for line in lines[start + 1 : start + 4]]
    assert [phase[0] for phase in phases] == ["1-2", "3-4", "5-5"]
    assert [phase[1] for phase in phases] == ["0.1", "0.02", "0.02"]
    assert phases[1][2:] == ["13.00%", "->", "14.00%", "11.50%", "->", "12.00%"]


def test_where_the_rate_changes_with_each_batch_quarters_have_lines_with_its_range() -> None:
    rows = [
        row | {"learning_rate": rate}
        for row, rate in zip(history(6), (1, 3, 2, 0.5, 0.25, 0.125), strict=True)
    ]
    lines = analyse(rows, Recipe(epochs=6, scheduler="onecycle"), 5, 1.0, {})
    start = next(number for number, line in enumerate(lines) if "learning rate" in line)
    assert [line[:34].strip() for line in lines[start + 1 : start + 5]] == [
        "1-1           1",
        "2-3           2 - 3",
        "4-4           0.5",
        "5-6           0.12 - 0.25",
    ]


def test_a_risen_loss_is_an_increase() -> None:
    rows = history(2)
    rows[1]["test_loss"] = 7.5
    text = "\n".join(analyse(rows, Recipe(epochs=2), 1, 1.0, {}))
    assert "Test loss: 5.0000 -> 7.5000 (50% increase)" in text
    rows[0]["train_loss"] = 0.0
    assert "Train loss: 0.0000" in "\n".join(analyse(rows, Recipe(epochs=2), 1, 1.0, {}))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.6, "1 h 00 min"), (36_061, "10 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# What a checkpoint logs of its own weights


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


def test_metrics_of_the_weights_own_epoch_are_found() -> None:
    best = {"kind": "best", "epoch": 2, "history": history(3)}
    found = find_logged_metrics(best)
    assert (found.accuracy_percent, found.where) == (11.0, "the history's for epoch 2")
    last = best | {"kind": "last", "epoch": 4, "batches_done": 0}
    assert find_logged_metrics(last).accuracy_percent == 11.5
    assert find_logged_metrics(last | {"batches_done": 1}) is None


def test_averaged_weights_have_their_own_metrics_except_in_a_state_to_resume_from() -> None:
    rows = [row | {"ema_test_loss": 1.0, "ema_test_acc_percent": 77.0} for row in history(3)]
    assert find_logged_metrics({"kind": "best", "epoch": 3, "history": rows}).accuracy_percent == 77.0
    last = {"kind": "last", "epoch": 4, "batches_done": 0, "history": rows}
    assert find_logged_metrics(last).accuracy_percent == 11.5


def test_with_held_out_images_only_the_final_test_counts() -> None:
    tests = {"best": {"loss": 1.5, "accuracy_percent": 61.0, "images": 100}}
    state = {"kind": "best", "epoch": 2, "history": history(3, "val"), "final_test": tests}
    assert find_logged_metrics(state) is None, "only the results file holds the test of its own weights"
    assert find_logged_metrics(state | {"kind": "results"}).accuracy_percent == 61.0


@pytest.mark.parametrize(
    "rows",
    [None, 7, "text", {}, [None], [[1, 2]], [{"epoch": 2}], [{**history(2)[1], "test_loss": "low"}],
     [{**history(2)[1], "train_loss": float("nan")}]],
)  # fmt: skip
def test_a_foreign_history_is_skipped(rows: Any) -> None:
    assert history_rows({"history": rows}) == []
    assert find_logged_metrics({"kind": "best", "epoch": 2, "history": rows, "final_test": 5}) is None
