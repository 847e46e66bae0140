"""The words at the end of a run: accuracies, phases of the schedule, generalisation gap, losses, time."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from training.recipe import Recipe


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
    """A line for each phase between two drops of the rate; one for the whole run where there are none."""
    bounds = [0, *(m for m in recipe.milestone_epochs if m < len(history)), len(history)]
    lines = [f"  Epochs        learning rate   train accuracy      {label} accuracy"]
    for start, end in itertools.pairwise(bounds):
        a, b = history[start], history[end - 1]
        epochs = f"{start + 1}-{end}"
        lines.append(
            f"  {epochs:<13} {a['learning_rate']:<15.4g} "
            f"{a['train_acc_percent']:5.2f}% -> {b['train_acc_percent']:5.2f}%    "
            f"{a[column]:5.2f}% -> {b[column]:5.2f}%"
        )
    return lines


def _reduction(what: str, first: float, last: float) -> str:
    change = 100 * (first - last) / first if first else 0.0
    word = "reduction" if change >= 0 else "increase"
    return f"{what.capitalize()} loss: {first:.4f} -> {last:.4f} ({abs(change):.0f}% {word})"


def duration(seconds: float) -> str:
    """`seconds` in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min {rest:02d} s" if hours else f"{minutes} min {rest:02d} s"
