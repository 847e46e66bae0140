"""A run's history: its rows and CSV table, the line of each epoch, the analysis at the end."""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.recipe import Recipe

# A run with a validation split measures it after each epoch, and the test images only at the end.
REQUIRED_COLUMNS = ("epoch", "learning_rate", "train_loss", "train_acc_percent")
HELD_OUT_COLUMNS = {"test": ("test_loss", "test_acc_percent"), "val": ("val_loss", "val_acc_percent")}


@dataclass(frozen=True)
class LoggedMetrics:
    """What a run logged for given weights: top-1 in percent, loss in nats; `where` names the source."""

    where: str
    accuracy_percent: float
    loss: float


def history_rows(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The complete rows of a checkpoint's history; incomplete or foreign entries are skipped."""
    rows = state.get("history")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [row for row in rows if any(_is_complete(row, columns) for columns in HELD_OUT_COLUMNS.values())]


def _is_complete(row: Mapping[str, Any], held_out: Sequence[str]) -> bool:
    values = [row.get(name) for name in (*REQUIRED_COLUMNS, *held_out)]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def weights_epoch(state: Mapping[str, Any]) -> int | None:
    """The epoch, from 1, after which a checkpoint's weights were saved; None if saved within an epoch."""
    epoch = state.get("epoch")
    if not isinstance(epoch, int):
        return None
    if state.get("kind") != "last":
        return epoch
    # a state to resume from names the epoch that comes next, or the one it stopped in
    return epoch - 1 if state.get("batches_done") == 0 and epoch > 1 else None


def find_logged_metrics(state: Mapping[str, Any]) -> LoggedMetrics | None:
    """The test metrics that a checkpoint holds for its own weights, or None."""
    epoch = weights_epoch(state)
    for row in history_rows(state):
        # a state to resume from holds the raw weights, other files the averaged ones where there are any
        raw = state.get("kind") == "last" or "ema_test_loss" not in row
        loss, accuracy = (name if raw else f"ema_{name}" for name in HELD_OUT_COLUMNS["test"])
        if row["epoch"] == epoch and _is_complete(row, (loss, accuracy)):
            return LoggedMetrics(f"the history's for epoch {epoch}", row[accuracy], row[loss])
    tests = state.get("final_test")
    best = tests.get("best") if isinstance(tests, dict) else None
    if state.get("kind") == "results" and isinstance(best, dict):
        values = best.get("accuracy_percent"), best.get("loss")
        if all(isinstance(value, int | float) for value in values):
            return LoggedMetrics("the run's at its end", *values)
    return None


def analyse(
    history: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    best_epoch: int,
    elapsed_s: float,
    final_test: Mapping[str, Any],
) -> list[str]:
    """The analysis of a finished run, as lines of text.

    Args:
        history: one row an epoch, from 1.
        best_epoch: the epoch of the best accuracy, from 1.
        final_test: with held-out images, the test Metrics of the best and the last epoch; else empty.
    """
    choice = recipe.selection_metric
    label = "validation" if recipe.val_split else "test"
    column = f"{choice}_acc_percent"
    best, last, first = history[best_epoch - 1], history[-1], history[0]
    lines = [f"Analysis ({recipe.model}, {recipe.data_note})"]
    if recipe.uses_averaging:
        lines.append(f"  All {label} figures are the averaged weights'.")
    lines.append(f"  Best {label} accuracy:  {best[column]:.2f}% (epoch {best_epoch})")
    lines.append(f"  Final {label} accuracy: {last[column]:.2f}% (epoch {len(history)})")
    if final_test:
        for key, epoch in (("best", best_epoch), ("last", len(history))):
            metrics = final_test[key]
            lines.append(
                f"  Test accuracy of the {key} epoch ({epoch}): {metrics.accuracy_percent:.2f}% "
                f"on {metrics.images:,} images that chose nothing"
            )
    else:
        lines.append(
            "  The best epoch was chosen on the test images, which flatters it: quote the final one too."
        )
    lines += _phases(history, recipe, column, label)
    gap = last["train_acc_percent"] - last[column]
    lines.append(
        f"  Generalisation gap: {gap:.2f} points "
        f"({last['train_acc_percent']:.2f}% training - {last[column]:.2f}% {label})"
    )
    for what, name in (("train", "train"), (choice, choice.removeprefix("ema_"))):
        lines.append("  " + _reduction(name, first[f"{what}_loss"], last[f"{what}_loss"]))
    lines.append(f"  Total time: {duration(elapsed_s)}")
    return lines


def _phases(history: Sequence[Mapping[str, Any]], recipe: Recipe, column: str, label: str) -> list[str]:
    """A line for each phase between two drops of the rate, or, where it changes with each batch, for each
    quarter of the run, with the rates of the first batches of its epochs."""
    count = len(history)
    inner = {count * quarter // 4 for quarter in (1, 2, 3)}
    if recipe.scheduler == "multistep":
        inner = set(recipe.milestone_epochs)
    bounds = [0, *sorted(epoch for epoch in inner if 0 < epoch < count), count]
    lines = [f"  Epochs        learning rate     train accuracy      {label} accuracy"]
    for start, end in itertools.pairwise(bounds):
        a, b = history[start], history[end - 1]
        epochs = f"{start + 1}-{end}"
        rates = [row["learning_rate"] for row in history[start:end]]
        rate = " - ".join(f"{value:.2g}" for value in dict.fromkeys((min(rates), max(rates))))
        lines.append(
            f"  {epochs:<13} {rate:<17} "
            f"{a['train_acc_percent']:5.2f}% -> {b['train_acc_percent']:5.2f}%    "
            f"{a[column]:5.2f}% -> {b[column]:5.2f}%"
        )
    return lines


def _reduction(what: str, first: float, last: float) -> str:
    change = 100 * (first - last) / first if first else 0.0
    word = "reduction" if change >= 0 else "increase"
    return f"{what.capitalize()} loss: {first:.4f} -> {last:.4f} ({abs(change):.0f}% {word})"


def duration(seconds: float) -> str:
    """`seconds` in minutes and seconds, or in seconds alone; from an hour on, in hours and minutes."""
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    if round(seconds) < 3600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))


def history_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The history as CSV: losses with 6 decimals, percentages with 4, rates with 8 significant digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([_cell(key, value) for key, value in row.items()])
    return out.getvalue()


def _cell(key: str, value: Any) -> str:
    if key == "epoch":
        return str(value)
    if key == "learning_rate":
        return f"{value:.8g}"
    return f"{value:.4f}" if key.endswith("_percent") else f"{value:.6f}"


def epoch_line(history: Sequence[Mapping[str, Any]], recipe: Recipe, is_best: bool) -> str:
    """The last epoch in the reference's form, with marks for the target accuracy and a new best."""
    row, split = history[-1], recipe.selection_split
    label, column = split.capitalize(), f"{recipe.selection_metric}_acc_percent"
    line = (
        f"Epoch [{row['epoch']}/{recipe.epochs}] - "
        f"Train Loss: {row['train_loss']:.4f}, Train Acc: {row['train_acc_percent']:.2f}% - "
        f"{label} Loss: {row[f'{split}_loss']:.4f}, {label} Acc: {row[f'{split}_acc_percent']:.2f}%"
    )
    if recipe.uses_averaging:
        line += f", Averaged weights: {row[column]:.2f}%"
    target = recipe.target_accuracy
    if row[column] >= target and all(earlier[column] < target for earlier in history[:-1]):
        line += f" [target {target:g}% reached]"
    if is_best:
        line += " [best]"
    return line + (" (synthetic data)" if recipe.dataset == "synthetic" else "")
