"""Figures of a training run: the learning-rate finder's curve, and the history epoch by epoch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from inspection import style

# Column prefix of the history, legend text, colour. Only what the rows hold is drawn.
SERIES = (
    ("train", "train", style.BLUE),
    ("val", "validation", style.GREEN),
    ("test", "test", style.VERMILLION),
    ("ema_test", "test, averaged weights", style.PURPLE),
    ("ema_val", "validation, averaged weights", style.PURPLE),
)
LINES_STYLE: dict[str, Any] = {
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "legend.fontsize": 9.0,
    "legend.framealpha": 0.9,
}
Values = Sequence[float]
PLAIN_NUMBER = "{:g}".format  # 0.02 rather than 2 x 10^-2, as on the command line


def plot_lr_finder(
    learning_rates: Values, losses: Values, suggested_lr: float | None, path: str | Path, **options: Any
) -> Path:
    """`write_png` of `lr_finder_figure`, which takes the `options`: 1200 x 720 pixels."""
    return style.write_png(lr_finder_figure(learning_rates, losses, suggested_lr, **options), path)


@style.styled(LINES_STYLE)
def lr_finder_figure(
    learning_rates: Values,
    losses: Values,
    suggested_lr: float | None,
    *,
    smoothed: Values | None = None,
    title: str = "Learning-rate finder",
) -> Figure:
    """Loss against learning rate (logarithmic axis), with the suggestion marked.

    Args:
        learning_rates: [N] positive and increasing; N at least 1.
        losses: [N] nats per image; may explode or be NaN: the view stays on the useful part.
        suggested_lr: None if the finder suggests none.
        smoothed: [N] the curve that the suggestion was read from, or None.
        title: wrapped when long.
    """
    rates, raw = np.array(learning_rates), _finite(losses)
    figure = style.new_figure(10, 6, title)
    axes = figure.subplots()
    axes.set_xscale("log")
    ends = [rates[0], rates[-1], suggested_lr or rates[0]]
    axes.set_xlim(min(ends) / 1.2, max(ends) * 1.2)
    axes.plot(rates, raw, color=style.SKY_BLUE, linewidth=1.4, label="loss", **_markers(raw))
    curve = raw
    if smoothed is not None:
        curve = _finite(smoothed)
        axes.plot(rates, curve, color=style.BLUE, linewidth=2.2, label="loss, smoothed")
    limits, note = _loss_view(raw, curve)
    axes.set_ylim(*limits)
    if suggested_lr is None:
        note = f"{note}; no suggestion".removeprefix("; ")
    else:
        _mark_suggestion(axes, rates, curve, suggested_lr)
    axes.set_xlabel(f"learning rate\n{note}".rstrip())
    axes.set_ylabel("training loss (nats per image)")
    axes.xaxis.set(major_formatter=PLAIN_NUMBER, minor_formatter=NullFormatter())
    axes.legend(loc="best")
    return figure


def _mark_suggestion(axes: Axes, rates: np.ndarray, curve: np.ndarray, suggestion: float) -> None:
    """A vertical line, a dot on the curve, and the number above the axes, clear of both."""
    axes.axvline(suggestion, color=style.VERMILLION, linestyle="--", linewidth=1.6)
    finite = np.isfinite(curve)
    if finite.any():
        height = np.interp(math.log(suggestion), np.log(rates[finite]), curve[finite])
        axes.plot([suggestion], [height], "o", color=style.VERMILLION, markersize=8, zorder=5)
    left, right = np.log(axes.get_xlim())
    where = (math.log(suggestion) - left) / (right - left)
    side = "left" if where < 0.12 else "right" if where > 0.88 else "center"
    look = {"ha": side, "va": "bottom", "color": style.VERMILLION, "fontweight": "bold"}
    above = axes.get_xaxis_transform()
    axes.text(suggestion, 1.01, f"suggested {suggestion:.2e}", transform=above, **look)


def _loss_view(raw: np.ndarray, curve: np.ndarray) -> tuple[tuple[float, float], str]:
    """The y limits that show the fall of the loss however high it climbs later, and a note on what they hide.

    The fall is measured on `curve` up to its minimum; the view is up to 2.5 times as high.
    """
    values, visible = curve[np.isfinite(curve)], raw[np.isfinite(raw)]
    if len(values) == 0:
        return (0.0, 1.0), "no finite loss to draw"
    notes = []
    if len(visible) < len(raw):
        notes.append(f"loss not finite at {len(raw) - len(visible)} of {len(raw)} rates")
    low = values.min()
    # The median stands in where the loss never falls; 2 % keeps a flat curve from filling the view
    # with its rounding noise.
    fall = max(values[: values.argmin() + 1].max(), np.median(values)) - low
    fall = max(fall, 0.02 * abs(low), 1e-6)
    bottom = max(visible.min(initial=low), low - fall) - 0.12 * fall
    highest = visible.max(initial=low)
    top = min(highest, low + 2.5 * fall)
    if highest > top:
        notes.append(f"loss climbs to {highest:.3g}, above this view")
    return (bottom, max(top, low + fall) + 0.12 * fall), "; ".join(notes)


def plot_history(rows: Sequence[Mapping[str, Any]], path: str | Path, **options: Any) -> Path:
    """`write_png` of `history_figure`, which takes the `options`: 1560 x 1080 pixels."""
    return style.write_png(history_figure(rows, **options), path)


@style.styled(LINES_STYLE)
def history_figure(
    rows: Sequence[Mapping[str, Any]],
    *,
    milestones: Sequence[int] = (),
    title: str = "Training history",
    target_accuracy: float | None = None,
    best_epoch: int | None = None,
) -> Figure:
    """Loss, accuracy, learning rate and generalisation gap against the epoch, two by two.

    The gap is training minus held-out accuracy; above zero is overfitting.

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

    def column(name: str) -> np.ndarray:
        return _finite([row.get(name) for row in rows])

    epochs = column("epoch")
    accuracies = {prefix: column(f"{prefix}_acc_percent") for prefix, *_ in SERIES}
    figure = style.new_figure(13, 9, title)
    panels = loss, accuracy, rate, gap = figure.subplots(2, 2).ravel()
    for prefix, label, color in SERIES:
        _draw_line(loss, epochs, column(f"{prefix}_loss"), color=color, label=label)
        _draw_line(accuracy, epochs, accuracies[prefix], color=color, label=label)
    if target_accuracy is not None:
        label = f"target {target_accuracy:g} %"
        accuracy.axhline(target_accuracy, color="black", linestyle=":", linewidth=1.4, label=label)
    if best_epoch is not None:
        _mark_best(accuracy, epochs, accuracies, best_epoch)
    _draw_rate(rate, epochs, column("learning_rate"))
    gap.axhline(0, color=style.GREY, linewidth=1)
    for prefix, label, color in SERIES[1:3]:
        difference = accuracies["train"] - accuracies[prefix]
        _draw_line(gap, epochs, difference, color=color, label=f"train minus {label}")
    _draw_milestones(panels, epochs, milestones)
    titles = ("Loss", "Accuracy", "Learning rate", "Generalisation gap")
    labels = ("loss (nats per image)", "accuracy (%)", "learning rate", "accuracy gap (points)")
    for axes, name, label in zip(panels, titles, labels, strict=True):
        axes.set(title=name, xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.legend(loc="best")
    return figure


def _draw_line(axes: Axes, epochs: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """The values against the epochs, if there are any."""
    if np.isfinite(values).any():
        axes.plot(epochs, values, **look, **_markers(values))


def _mark_best(axes: Axes, epochs: np.ndarray, accuracies: Mapping[str, np.ndarray], best_epoch: int) -> None:
    """A star at the best epoch, with its accuracy in the legend."""
    series = [accuracies[prefix] for prefix in ("ema_val", "ema_test", "val", "test")]
    chosen_on = next((values for values in series if np.isfinite(values).any()), series[-1])
    for value in chosen_on[(epochs == best_epoch) & np.isfinite(chosen_on)]:
        label = f"best epoch {best_epoch}: {value:.2f} %"
        look = {"color": style.ORANGE, "markeredgecolor": "black", "markersize": 15, "linestyle": "none"}
        axes.plot([best_epoch], [value], marker="*", zorder=5, label=label, **look)


def _draw_rate(axes: Axes, epochs: np.ndarray, rates: np.ndarray) -> None:
    """The learning rate as steps, on a logarithmic axis when it spans a factor of five or more."""
    look = {"color": style.BLUE, "drawstyle": "steps-mid", "label": "learning rate"}
    axes.plot(epochs, rates, **look, **_markers(rates))
    lowest, highest = np.nanmin(rates), np.nanmax(rates)
    if lowest > 0 and highest / lowest >= 5:
        axes.set_yscale("log")
        # A span of under two decades has too few powers of ten to read a value from.
        few = highest / lowest < 100
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PLAIN_NUMBER)


def _draw_milestones(panels: Sequence[Axes], epochs: np.ndarray, milestones: Sequence[int]) -> None:
    """A thin vertical line in every panel at each drop of the learning rate, named in its legend."""
    inside = [m for m in sorted(set(milestones)) if epochs.min() <= m < epochs.max()]
    names = ", ".join(map(str, inside))
    label = f"drops after epoch {names}" if len(inside) <= 6 else f"drops, {len(inside)} in all"
    for axes in panels:
        for milestone in inside:
            named = axes is panels[2] and milestone == inside[0]
            look = {"color": style.GREY, "linestyle": "--", "linewidth": 0.8, "zorder": 1}
            axes.axvline(milestone + 0.5, label=label if named else None, **look)


def _finite(values: Sequence[float | None]) -> np.ndarray:
    """float64 [N], with NaN for None and infinities."""
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _markers(values: np.ndarray) -> dict[str, Any]:
    """Markers where a line alone would hide points: short histories, and single values between gaps."""
    few = np.count_nonzero(np.isfinite(values)) <= 25
    return {"marker": "o", "markersize": 4} if few else {}
