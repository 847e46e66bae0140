"""The pictures of a training run: the learning-rate search, and the history epoch by epoch.

Plain lists in, PNG files out, which appear whole or not at all. Nothing here needs a display or
touches `pyplot`'s global state, and the same input gives the same bytes. Each figure has a
`*_figure` builder that returns it unsaved, and a `plot_*` function that writes it.
"""

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
# A run that holds images out measures those after each epoch, and the test images only at its end.
REQUIRED_COLUMNS = ("epoch", "learning_rate", "train_loss", "train_acc_percent")
HELD_OUT_COLUMNS = {"test": ("test_loss", "test_acc_percent"), "val": ("val_loss", "val_acc_percent")}

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
    *,
    smoothed: Sequence[float] | None = None,
    title: str = "Learning-rate finder",
) -> Path:
    """Write `lr_finder_figure` as a 1200 x 720 PNG; return its path, or raise RunError."""
    figure = lr_finder_figure(learning_rates, losses, suggested_lr, smoothed=smoothed, title=title)
    return write_png(figure, path)


@styled(LINES_STYLE)
def lr_finder_figure(
    learning_rates: Sequence[float],
    losses: Sequence[float],
    suggested_lr: float | None,
    *,
    smoothed: Sequence[float] | None = None,
    title: str = "Learning-rate finder",
) -> Figure:
    """Loss against learning rate (log axis), with the suggestion marked.

    Args:
        learning_rates: [N] positive, in the order they were tried.
        losses: [N] nats per image; may explode or be NaN, and the view stays on the useful part.
        suggested_lr: marked and labelled; None where the search found none.
        smoothed: [N] the curve that the suggestion was read from, or None.
        title: says what was searched; wrapped when long.

    Raises:
        ValueError: no points, unequal lengths, or a learning rate that is not positive and finite.
    """
    rates, raw = _as_floats(learning_rates), _as_floats(losses)
    smooth = None if smoothed is None else _as_floats(smoothed)
    if len(rates) == 0:
        raise ValueError("the learning-rate finder gave no points to draw")
    if len(rates) != len(raw) or (smooth is not None and len(smooth) != len(rates)):
        counts = f"{len(rates)} rates, {len(raw)} losses"
        counts += "" if smooth is None else f", {len(smooth)} smoothed losses"
        raise ValueError(f"unequal lengths: {counts}")
    suggestions = [] if suggested_lr is None else [suggested_lr]
    if not all(math.isfinite(rate) and rate > 0 for rate in [*rates, *suggestions]):
        raise ValueError("learning rates must be positive and finite for a logarithmic axis")

    figure = new_figure(10, 6, title)
    axes = figure.subplots()
    axes.set_xscale("log")
    seen = [*rates, *suggestions]
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
    """A line through the axes, a dot on the curve, and the number above the axes, clear of both."""
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
    """The y limits that show the fall of the loss however high it climbs later, and what they hide.

    The fall is measured on `curve` up to its minimum; up to 2.5 times as much room is given.
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


def plot_history(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    milestones: Sequence[int] = (),
    title: str = "Training history",
    target_accuracy: float | None = None,
    best_epoch: int | None = None,
) -> Path:
    """Write `history_figure` as a 1560 x 1080 PNG; return its path, or raise RunError."""
    marks = {"target_accuracy": target_accuracy, "best_epoch": best_epoch}
    return write_png(history_figure(rows, milestones=milestones, title=title, **marks), path)


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
        rows: one mapping an epoch with REQUIRED_COLUMNS and those of either entry of
            HELD_OUT_COLUMNS; the same with ema_ before them are drawn where present. Text
            from a CSV file is read as numbers; None, "" and values that are not finite leave a hole
            in the line.
        milestones: epochs after which the rate drops; those inside the history are drawn, half an
            epoch later, where the drop is.
        target_accuracy: percent, or None.
        best_epoch: marked on the validation accuracy where there is one, else on the test accuracy; on
            that of the averaged weights where there are such.
        title: names the run ("synthetic", "subset of 2,560 images"); wrapped when long.

    Raises:
        ValueError: no rows, a required column missing, or a value that is not a number.
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
    if len(rows) == 0:
        raise ValueError("the history has no rows to draw")
    for index, row in enumerate(rows, start=1):
        held_out = HELD_OUT_COLUMNS["val" if "val_loss" in row else "test"]
        missing = [name for name in (*REQUIRED_COLUMNS, *held_out) if name not in row]
        if missing:
            raise ValueError(f"history row {index} lacks {', '.join(missing)}")
    series = [f"{prefix}_{what}" for prefix, _, _ in SERIES for what in ("loss", "acc_percent")]
    names = dict.fromkeys([*REQUIRED_COLUMNS, *series])
    table = {name: _as_floats([row.get(name) for row in rows]) for name in names}
    if np.isnan(table["epoch"]).any():
        raise ValueError("a history row has no epoch number")
    return table


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
    """The rate of each epoch as steps, on a log axis when it spans a factor of five or more."""
    axes.plot(epochs, rates, color=BLUE, drawstyle="steps-mid", label="rate", **_markers(rates))
    finite = rates[np.isfinite(rates)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() >= 5:
        axes.set_yscale("log")
        # A span of under two decades has too few powers of ten to read a value from.
        few = finite.max() / finite.min() < 100
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))


def _draw_gap(axes: Axes, table: Mapping[str, np.ndarray]) -> None:
    """Train accuracy minus what was held out, in percentage points; above zero is overfitting."""
    axes.axhline(0, color=GREY, linewidth=1)
    for prefix, label, color in SERIES[1:3]:
        values = table["train_acc_percent"] - table[f"{prefix}_acc_percent"]
        if np.isfinite(values).any():
            look = {"color": color, "label": f"train minus {label}"}
            axes.plot(table["epoch"], values, **look, **_markers(values))


def _draw_milestones(panels: Sequence[Axes], epochs: np.ndarray, milestones: Sequence[int]) -> None:
    """A thin vertical line in every panel at each drop of the rate; named in the rate's legend."""
    inside = [m for m in sorted(set(milestones)) if epochs.min() <= m < epochs.max()]
    names = ", ".join(str(m) for m in inside)
    label = f"drops after epoch {names}" if len(inside) <= 6 else f"drops, {len(inside)} in all"
    for axes in panels:
        for milestone in inside:
            named = axes is panels[2] and milestone == inside[0]
            look = {"color": GREY, "linestyle": "--", "linewidth": 0.8, "zorder": 1}
            axes.axvline(milestone + 0.5, label=label if named else None, **look)


def _as_floats(values: Sequence[Any]) -> np.ndarray:
    """float64 [N]; None, "" and infinities become NaN, other text that is no number is refused."""
    try:
        floats = [math.nan if value is None or value == "" else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a list of numbers: {error}") from error
    array = np.array(floats, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _markers(values: np.ndarray) -> dict[str, Any]:
    """Dots where a line alone would hide points: short histories, and lone values among holes."""
    few = np.count_nonzero(np.isfinite(values)) <= 25
    return {"marker": "o", "markersize": 4} if few else {}


def _plain_number(value: float, _position: int | None = None) -> str:
    """0.02 rather than 2 x 10^-2: rates are written so on the command line."""
    return f"{value:g}"
