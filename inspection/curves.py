"""Figures of a training run: the learning-rate finder's curve, and the history epoch by epoch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from inspection.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILLION,
    new_figure,
    styled,
    write_png,
)

# Column prefix of the history, legend text, colour. Only what the rows hold is drawn.
SERIES = (
    ("train", "train", BLUE),
    ("val", "validation", GREEN),
    ("test", "test", VERMILLION),
    ("ema_test", "test, averaged weights", PURPLE),
    ("ema_val", "validation, averaged weights", PURPLE),
)
LINES_STYLE: dict[str, Any] = {
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "legend.fontsize": 9.0,
    "legend.framealpha": 0.9,
}


def plot_lr_finder(
    learning_rates: Sequence[float],
    losses: Sequence[float],
    suggested_lr: float | None,
    path: str | Path,
    **options: Any,
) -> Path:
    """Write `lr_finder_figure`, which takes the `options`, as a 1200 x 720 PNG; return the path.

    Raises:
        RunError: the file cannot be written.
    """
    return write_png(lr_finder_figure(learning_rates, losses, suggested_lr, **options), path)


@styled(LINES_STYLE)
def lr_finder_figure(
    learning_rates: Sequence[float],
    losses: Sequence[float],
    suggested_lr: float | None,
    *,
    smoothed: Sequence[float] | None = None,
    title: str = "Learning-rate finder",
) -> Figure:
    """Loss against learning rate (logarithmic axis), with the suggestion marked.

    Args:
        learning_rates: [N] positive, in the order they were tried; N at least 1.
        losses: [N] nats per image; may explode or be NaN: the view stays on the useful part.
        suggested_lr: None if the finder suggests none.
        smoothed: [N] the curve that the suggestion was read from, or None.
        title: wrapped when long.
    """
    rates, raw = np.array(learning_rates), _finite(losses)
    smooth = None if smoothed is None else _finite(smoothed)
    figure = new_figure(10, 6, title)
    axes = figure.subplots()
    axes.set_xscale("log")
    seen = [*rates, *([] if suggested_lr is None else [suggested_lr])]
    axes.set_xlim(min(seen) / 1.2, max(seen) * 1.2)
    axes.plot(rates, raw, color=SKY_BLUE, linewidth=1.4, label="loss", **_markers(raw))
    if smooth is not None:
        axes.plot(rates, smooth, color=BLUE, linewidth=2.2, label="loss, smoothed")
    curve = raw if smooth is None else smooth
    limits, note = _loss_view(raw, curve)
    axes.set_ylim(*limits)
    if suggested_lr is None:
        note = f"{note}; no suggestion".removeprefix("; ")
    else:
        _mark_suggestion(axes, rates, curve, suggested_lr)
    axes.set_xlabel(f"learning rate\n{note}".rstrip())
    axes.set_ylabel("training loss (nats per image)")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="best")
    return figure


def _mark_suggestion(axes: Axes, rates: np.ndarray, curve: np.ndarray, suggestion: float) -> None:
    """A vertical line, a dot on the curve, and the number above the axes, clear of both."""
    axes.axvline(suggestion, color=VERMILLION, linestyle="--", linewidth=1.6)
    order = np.argsort(rates, kind="stable")
    order = order[np.isfinite(curve[order])]
    if len(order):
        height = np.interp(math.log(suggestion), np.log(rates[order]), curve[order])
        axes.plot([suggestion], [height], "o", color=VERMILLION, markersize=8, zorder=5)
    left, right = np.log(axes.get_xlim())
    where = (math.log(suggestion) - left) / (right - left)
    side = "left" if where < 0.12 else "right" if where > 0.88 else "center"
    look = {"ha": side, "va": "bottom", "color": VERMILLION, "fontweight": "bold"}
    above = axes.get_xaxis_transform()
    axes.text(suggestion, 1.01, f"suggested {suggestion:.2e}", transform=above, **look)


def _loss_view(raw: np.ndarray, curve: np.ndarray) -> tuple[tuple[float, float], str]:
    """The y limits that show the fall of the loss however high it climbs later, and a note on what they hide.

    The fall is measured on `curve` up to its minimum; the view is up to 2.5 times as high.
    """
    notes = []
    bad = np.flatnonzero(~np.isfinite(raw))
    if len(bad):
        notes.append(f"loss not finite at {len(bad)} of {len(raw)} rates")
    values = curve[np.isfinite(curve)]
    if len(values) == 0:
        return (0.0, 1.0), "no finite loss to draw"
    visible = raw[np.isfinite(raw)]
    low = float(values.min())
    before = values[: int(values.argmin()) + 1]
    # The median stands in where the loss never falls; 2 % keeps a flat curve from filling the view
    # with its rounding noise.
    fall = max(float(before.max()), float(np.median(values))) - low
    fall = max(fall, 0.02 * abs(low), 1e-6)
    bottom = max(float(visible.min(initial=low)), low - fall) - 0.12 * fall
    highest = float(visible.max(initial=low))
    top = min(highest, low + 2.5 * fall)
    if highest > top:
        notes.append(f"loss climbs to {highest:.3g}, above this view")
    return (bottom, max(top, low + fall) + 0.12 * fall), "; ".join(notes)


def plot_history(rows: Sequence[Mapping[str, Any]], path: str | Path, **options: Any) -> Path:
    """Write `history_figure`, which takes the `options`, as a 1560 x 1080 PNG; return the path.

    Raises:
        RunError: the file cannot be written.
    """
    return write_png(history_figure(rows, **options), path)


@styled(LINES_STYLE)
def history_figure(
    rows: Sequence[Mapping[str, Any]],
    *,
    milestones: Sequence[int] = (),
    title: str = "Training history",
    target_accuracy: float | None = None,
    best_epoch: int | None = None,
) -> Figure:
    """Loss, accuracy, learning rate and generalisation gap against the epoch, two by two.

    Args:
        rows: one per epoch, at least one, with the columns of NAME_history.csv; a series of SERIES that
            no row has is not drawn, and a missing value leaves a gap in its line.
        milestones: epochs after which the learning rate drops; those within the history are drawn, half
            an epoch later, where the drop is.
        title: names the run ("synthetic", "subset of 2,560 images"); wrapped when long.
        target_accuracy: percent, or None.
        best_epoch: marked on the accuracy that chose it: validation if there is any, else test; of the
            averaged weights if there are any.
    """
    table = _columns(rows)
    epochs = table["epoch"]
    figure = new_figure(13, 9, title)
    (loss, accuracy), (rate, gap) = figure.subplots(2, 2)
    _draw_series(loss, table, "loss")
    _draw_series(accuracy, table, "acc_percent")
    if target_accuracy is not None:
        label = f"target {target_accuracy:g} %"
        accuracy.axhline(target_accuracy, color=BLACK, linestyle=":", linewidth=1.4, label=label)
    if best_epoch is not None:
        _mark_best(accuracy, table, best_epoch)
    _draw_rate(rate, epochs, table["learning_rate"])
    _draw_gap(gap, table)
    _draw_milestones((loss, accuracy, rate, gap), epochs, milestones)
    titles = ("Loss", "Accuracy", "Learning rate", "Generalisation gap")
    labels = ("loss (nats per image)", "accuracy (%)", "learning rate", "accuracy gap (points)")
    for axes, name, label in zip((loss, accuracy, rate, gap), titles, labels, strict=True):
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.legend(loc="best")
    return figure


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Column name to float64 [epochs]; NaN where a value is missing or not finite."""
    series = [f"{prefix}_{what}" for prefix, _, _ in SERIES for what in ("loss", "acc_percent")]
    return {name: _finite([row.get(name) for row in rows]) for name in ("epoch", "learning_rate", *series)}


def _draw_series(axes: Axes, table: Mapping[str, np.ndarray], what: str) -> None:
    """One line for each series of SERIES that has any value."""
    for prefix, label, color in SERIES:
        values = table[f"{prefix}_{what}"]
        if np.isfinite(values).any():
            axes.plot(table["epoch"], values, color=color, label=label, **_markers(values))


def _mark_best(axes: Axes, table: Mapping[str, np.ndarray], best_epoch: int) -> None:
    """A star at the best epoch, with its accuracy in the legend."""
    series = [table[f"{prefix}_acc_percent"] for prefix in ("ema_val", "ema_test", "val", "test")]
    chosen_on = next((values for values in series if np.isfinite(values).any()), series[-1])
    for value in chosen_on[(table["epoch"] == best_epoch) & np.isfinite(chosen_on)][:1]:
        label = f"best epoch {best_epoch}: {value:.2f} %"
        look = {"color": ORANGE, "markeredgecolor": BLACK, "markersize": 15, "linestyle": "none"}
        axes.plot([best_epoch], [value], marker="*", zorder=5, label=label, **look)


def _draw_rate(axes: Axes, epochs: np.ndarray, rates: np.ndarray) -> None:
    """The learning rate as steps, on a logarithmic axis when it spans a factor of five or more."""
    axes.plot(epochs, rates, color=BLUE, drawstyle="steps-mid", label="learning rate", **_markers(rates))
    finite = rates[np.isfinite(rates)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() >= 5:
        axes.set_yscale("log")
        # A span of under two decades has too few powers of ten to read a value from.
        few = finite.max() / finite.min() < 100
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))


def _draw_gap(axes: Axes, table: Mapping[str, np.ndarray]) -> None:
    """Training accuracy minus held-out accuracy, in percentage points; above zero is overfitting."""
    axes.axhline(0, color=GREY, linewidth=1)
    for prefix, label, color in SERIES[1:3]:
        values = table["train_acc_percent"] - table[f"{prefix}_acc_percent"]
        if np.isfinite(values).any():
            look = {"color": color, "label": f"train minus {label}"}
            axes.plot(table["epoch"], values, **look, **_markers(values))


def _draw_milestones(panels: Sequence[Axes], epochs: np.ndarray, milestones: Sequence[int]) -> None:
    """A thin vertical line in every panel at each drop of the learning rate, named in its legend."""
    inside = [m for m in sorted(set(milestones)) if epochs.min() <= m < epochs.max()]
    names = ", ".join(str(m) for m in inside)
    label = f"drops after epoch {names}" if len(inside) <= 6 else f"drops, {len(inside)} in all"
    for axes in panels:
        for milestone in inside:
            named = axes is panels[2] and milestone == inside[0]
            look = {"color": GREY, "linestyle": "--", "linewidth": 0.8, "zorder": 1}
            axes.axvline(milestone + 0.5, label=label if named else None, **look)


def _finite(values: Sequence[float | None]) -> np.ndarray:
    """float64 [N], with NaN for None and infinities."""
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _markers(values: np.ndarray) -> dict[str, Any]:
    """Markers where a line alone would hide points: short histories, and single values between gaps."""
    few = np.count_nonzero(np.isfinite(values)) <= 25
    return {"marker": "o", "markersize": 4} if few else {}


def _plain_number(value: float, _position: int | None = None) -> str:
    """0.02 rather than 2 x 10^-2, as on the command line."""
    return f"{value:g}"
