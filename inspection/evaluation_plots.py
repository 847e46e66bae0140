"""Figures of an evaluation: calibration, risk, shifts, confusions, per-class bars, one image's prediction.

Class names are drawn as given, shortened where they are very long.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inspection.metrics import Calibration, RiskCoverage
from inspection.style import BLUE, GREY, SKY_BLUE, VERMILLION, new_figure, styled

MAX_NAME = 34  # characters; CIFAR-100's longest is large_omnivores_and_herbivores, 30
BARS_PER_COLUMN = 25
MAX_NUMBERED = 25  # classes: with more, the cells of a confusion matrix have no room for counts
Names = Sequence[str]


@styled()
def reliability_figure(bins: Calibration, title: str) -> Figure:
    """Accuracy against confidence by bin, above a histogram of the images in each bin."""
    used, widths = bins.counts > 0, np.diff(bins.edges)
    left, width = bins.edges[:-1][used], widths[used]
    accuracy, confidence = 100 * bins.accuracy[used], 100 * bins.confidence[used]

    figure = new_figure(8, 9, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    box = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    upper.bar(left, accuracy, width, color=BLUE, label="accuracy", **box)
    gap = {"align": "edge", "color": VERMILLION, "alpha": 0.35, "hatch": "//", "linewidth": 0}
    upper.bar(left, confidence - accuracy, width, accuracy, label="gap to confidence", **gap)
    upper.plot([0, 1], [0, 100], color="black", linestyle="--", label="perfect calibration")
    upper.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 1))
    upper.set_title(f"expected calibration error {100 * bins.ece:.2f} %")
    upper.legend(loc="best")
    lower.bar(bins.edges[:-1], bins.counts, widths, color=SKY_BLUE, **box)
    lower.set(xlabel="confidence of the prediction (fraction)", ylabel="images in the bin")
    lower.yaxis.set(major_locator=MaxNLocator(5, integer=True), major_formatter="{x:,.0f}")
    upper.grid(axis="y")
    lower.grid(axis="y")
    return figure


@styled({"axes.grid": True})
def risk_coverage_figure(curve: RiskCoverage, title: str) -> Figure:
    """The percentage of misclassified images among the most confident ones, against how many these are."""
    figure = new_figure(8, 5, title)
    axes = figure.subplots()
    axes.plot(curve.coverage_percent, curve.risk_percent, color=BLUE)
    axes.fill_between(curve.coverage_percent, curve.risk_percent, color=SKY_BLUE, alpha=0.35, linewidth=0)
    axes.set(xlabel="coverage: the most confident images (%)", ylabel="risk: misclassified among them (%)")
    axes.set(xlim=(0, 100), ylim=(0, None))
    axes.set_title(f"area under the curve {curve.area_percent:.2f} %")
    return figure


@styled()
def shift_figure(accuracy: np.ndarray, shifts_px: Sequence[int], title: str) -> Figure:
    """Accuracy in percent (float [S, S]) by how far the images are moved down (rows) and right (columns)."""
    figure = new_figure(7, 6.5, title)
    axes = figure.subplots()
    high = accuracy.max()
    low = min(accuracy.min(), high - 10)  # points: smaller differences, which are noise, look small
    image = axes.imshow(accuracy, cmap="Blues", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("top-1 accuracy (%)")
    for (row, column), value in np.ndenumerate(accuracy):
        color = "white" if value > low + 0.7 * (high - low) else "black"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    labels = [f"{pixels:+d}" if pixels else "0" for pixels in shifts_px]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="moved right by (pixels)", ylabel="moved down by (pixels)")
    return figure


@styled()
def confusion_figure(matrix: np.ndarray, names: Names, starts: Sequence[int] | None, title: str) -> Figure:
    """Counts of true class (rows) against predicted class (columns), coloured by percentage of the row.

    Args:
        matrix: [K, K] counts, rows and columns in the order to draw.
        names: one per class; with `starts`, one per group of classes.
        starts: the first index of each group: lines separate the groups, which are named at their middle.
    """
    counts, size = np.asarray(matrix), len(matrix)
    edges = np.array([*(range(size) if starts is None else starts), size])
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    figure = new_figure(13, 11.5, title)
    axes = figure.subplots()
    # With a linear scale the confusions, a few percent each, would all look like zero.
    norm = PowerNorm(0.5, vmin=0, vmax=100)
    image = axes.imshow(percent, cmap="Blues", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("percentage of the true class")
    middles = (edges[:-1] + edges[1:] - 1) / 2
    font = min(9.0, 0.8 * 9 * 72 / len(names))  # points: 80 % of a row, the axes being 9 inches high
    labels = [_shorten(name) for name in names]
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(middles, labels, **(slant if font > 8 else {"rotation": 90}), fontsize=font)
    axes.set_yticks(middles, labels, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class")
    if starts is not None:
        for draw in (axes.axhline, axes.axvline):
            for edge in edges[1:-1]:
                draw(edge - 0.5, color=GREY, linewidth=0.6)
    elif size <= MAX_NUMBERED:
        look = {"ha": "center", "va": "center", "fontsize": min(11.0, 160 / size)}
        for row, column in np.argwhere(counts > 0):
            color = "white" if percent[row, column] > 35 else "black"
            axes.text(column, row, f"{counts[row, column]:,.0f}", color=color, **look)
    return figure


@styled()
def per_class_bars_figure(names: Names, values: np.ndarray, quantity: str, title: str) -> Figure:
    """A bar per class, from the highest to the lowest, in columns of 25, with the mean as a line.

    Args:
        names: [K].
        values: [K] percent; NaN (not defined for that class) comes last, marked "none".
        quantity: what the values are, with its unit.
    """
    order = np.argsort(-values, kind="stable")  # NaN sorts last
    parts = [order[start : start + BARS_PER_COLUMN] for start in range(0, len(order), BARS_PER_COLUMN)]
    known = values[np.isfinite(values)]

    figure = new_figure(max(7.0, 4.2 * len(parts)), 1.8 + 0.27 * len(parts[0]), title)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.barh(range(len(part)), np.nan_to_num(values[part]), color=BLUE, height=0.75)
        for row, value in enumerate(values[part]):  # in a column of their own, clear of the mean
            text = f"{value:.0f}" if np.isfinite(value) else "none"
            axes.text(114, row, text, ha="right", va="center_baseline", fontsize=8)
        axes.set_yticks(range(len(part)), [_shorten(names[index]) for index in part], fontsize=9)
        # Every column has the same scale and the same bar height, the short last one too.
        axes.set_ylim(len(parts[0]) - 0.4, -0.6)
        axes.set(xlabel=quantity, xlim=(0, 115), xticks=range(0, 101, 25))
        axes.grid(axis="x")
        if len(known):
            axes.axvline(known.mean(), color=VERMILLION, linestyle="--", linewidth=1.3)
    if len(known):
        figure.legend(figure.axes[0].lines, [f"mean {known.mean():.1f}"], loc="outside upper right")
    return figure


@styled()
def prediction_figure(image: np.ndarray, names: Names, probabilities: np.ndarray, title: str) -> Figure:
    """The image beside bars of its classes, the most probable on top.

    Args:
        image: uint8 [H, W, 3].
        names: [K].
        probabilities: [K] fractions from 0 to 1, in any order.
    """
    percent = 100 * np.asarray(probabilities, dtype=float)
    order = np.argsort(-percent, kind="stable")

    figure = new_figure(10, max(4.2, 1.6 + 0.34 * len(names)), title)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
    # Small images keep their pixels; a photograph is smoothed as it shrinks.
    left.imshow(image, interpolation="nearest" if max(image.shape[:2]) <= 128 else "antialiased")
    left.set_axis_off()
    bars = right.barh(range(len(names)), percent[order], color=[BLUE, *[SKY_BLUE] * (len(names) - 1)])
    right.bar_label(bars, [f"{value:.1f} %" for value in percent[order]], padding=3)
    right.set_yticks(range(len(names)), [_shorten(names[index]) for index in order])
    right.set_ylim(max(len(names), 4) - 0.5, -0.5)  # no bar as thick as a wall
    right.set(xlabel="probability (%)", xlim=(0, 118), xticks=range(0, 101, 20))
    right.grid(axis="x")
    return figure


def _shorten(name: str) -> str:
    """The name, or its beginning and an ellipsis where it would squeeze the figure."""
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
