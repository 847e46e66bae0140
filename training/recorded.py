"""Whether a test of a checkpoint gives what its run recorded: the same figures, to the last bit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.machine import versions
from inspection.curves import HELD_OUT_COLUMNS, REQUIRED_COLUMNS
from training.engine import Metrics
from training.recipe import Recipe


@dataclass(frozen=True)
class LoggedMetrics:
    """What a run noted about weights: top-1 in percent, loss in nats, and where it stands, in words."""

    where: str
    accuracy_percent: float
    loss: float


@dataclass(frozen=True)
class Reproduction:
    """A sentence for people; `equal` is whether top-1 is the recorded one, None where nothing compares."""

    text: str
    equal: bool | None
    recorded: LoggedMetrics | None


def history_rows(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a checkpoint's history that have every figure they should; other things are left out."""
    rows = state.get("history")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [row for row in rows if any(_has(row, columns) for columns in HELD_OUT_COLUMNS.values())]


def _has(row: Mapping[str, Any], held_out: tuple[str, ...]) -> bool:
    values = [row.get(name) for name in (*REQUIRED_COLUMNS, *held_out)]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def weights_epoch(state: Mapping[str, Any]) -> int | None:
    """The finished epoch, from 1, that a checkpoint's weights are from; None for those within an epoch."""
    epoch = state.get("epoch")
    if not isinstance(epoch, int):
        return None
    if state.get("kind") != "last":
        return epoch
    # a state to resume from names the epoch that comes next, or the one it stopped in
    return epoch - 1 if state.get("batches_done") == 0 and epoch > 1 else None


def find_logged_metrics(state: Mapping[str, Any]) -> LoggedMetrics | None:
    """The test figures that a checkpoint holds of its own weights, or None."""
    epoch = weights_epoch(state)
    for row in history_rows(state):
        # a state to resume from holds the raw weights, other files the averaged ones where there are such
        raw = state.get("kind") == "last" or "ema_test_loss" not in row
        loss, accuracy = (name if raw else f"ema_{name}" for name in HELD_OUT_COLUMNS["test"])
        if row["epoch"] == epoch and _has(row, (loss, accuracy)):
            return LoggedMetrics(f"the history's for epoch {epoch}", row[accuracy], row[loss])
    tests = state.get("final_test")
    best = tests.get("best") if isinstance(tests, dict) else None
    if state.get("kind") == "results" and isinstance(best, dict):
        figures = best.get("accuracy_percent"), best.get("loss")
        if all(isinstance(value, int | float) for value in figures):
            return LoggedMetrics("the run's at its end", *figures)
    return None


def compare(
    measured: Metrics, state: Mapping[str, Any], recipe: Recipe, *, images_of_run: int, changes: list[str]
) -> Reproduction:
    """Whether `measured` is what the run recorded.

    Args:
        images_of_run: how many test images the run used; on other images nothing compares.
        changes: in which ways this test differs from the run's ("--precision bf16"), for the warning.
    """
    recorded = find_logged_metrics(state)
    if recorded is None:
        why = "its best epoch was chosen on validation images" if recipe.val_split else "none is in the file"
        return Reproduction(f"There is no test figure of these weights to compare with: {why}.", None, None)
    if measured.images != images_of_run:
        return Reproduction(
            f"Not compared with {recorded.where} ({recorded.accuracy_percent:.2f} %): that was measured on "
            f"{images_of_run:,} images, this on {measured.images:,}.",
            None,
            recorded,
        )
    if measured.accuracy_percent == recorded.accuracy_percent:
        difference = abs(measured.loss - recorded.loss)
        loss = "so does the loss" if difference == 0 else f"the loss differs by {difference:.1g} nats"
        return Reproduction(f"Top-1 equals {recorded.where} exactly; {loss}.", True, recorded)
    stored = state.get("versions")
    if isinstance(stored, dict):
        now = versions()
        changes = changes + [
            f"{name} {now[name]}" for name in now if stored.get(name, now[name]) != now[name]
        ]
    changed = ", ".join(changes) or "device or number of threads"
    return Reproduction(
        f"Warning: top-1 is {measured.accuracy_percent:.4f} %, {recorded.where} is "
        f"{recorded.accuracy_percent:.4f} %. Different here: {changed}.",
        False,
        recorded,
    )
