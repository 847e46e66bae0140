"""The pictures of an evaluation: calibration, confusions, images with captions, bars by class.

Arrays in, PNG files out, which appear whole or not at all; no display, no `pyplot`, and the same
input gives the same bytes. Every `plot_*` function writes what the `*_figure` function after it
builds, returns the path, and raises ValueError for input that does not fit together, RunError for a
file that cannot be written. Class names are drawn as given, shortened where they are very long.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike as Numbers

from inspection.style import BLACK, BLUE, GREY, SKY_BLUE, VERMILLION, new_figure, styled, write_png

LONGEST_NAME = 34  # characters; CIFAR-100's longest is large_omnivores_and_herbivores, 30
ROWS_OF_BARS = NUMBERED_CLASSES = 25  # bars in a column; classes whose confusions have room for counts
TILE_PX = 192  # images of the grid are enlarged to about this size, by a whole factor
Names = Sequence[str]


def plot_reliability(
    edges: Numbers,
    accuracy: Numbers,
    confidence: Numbers,
    counts: Numbers,
    ece: float,
    path: str | Path,
    *,
    title: str = "Reliability",
) -> Path:
    """Accuracy against confidence by bin, over a histogram of the images in each bin.

    Args:
        edges: [B + 1] increasing, 0 to 1. counts: [B] images.
        accuracy, confidence: [B] means of the bin, fractions; ignored (NaN is fine) where it is empty.
        ece: expected calibration error, a fraction (Guo et al. 2017).
    """
    return write_png(reliability_figure(edges, accuracy, confidence, counts, ece, title), path)


@styled()
def reliability_figure(
    edges: Numbers, accuracy: Numbers, confidence: Numbers, counts: Numbers, ece: float, title: str
) -> Figure:
    """The figure of `plot_reliability`."""
    edges, counts = np.asarray(edges, dtype=float), np.asarray(counts)
    accuracy, confidence = np.asarray(accuracy, dtype=float), np.asarray(confidence, dtype=float)
    bins, used, widths = len(edges) - 1, counts > 0, np.diff(edges)
    fits = accuracy.shape == confidence.shape == counts.shape == (bins,)
    if bins < 1 or not fits or not (widths > 0).all():
        raise ValueError(f"{bins} bins need {bins + 1} rising edges, {bins} accuracies, confidences, counts")
    left, width, right, sure = edges[:-1][used], widths[used], accuracy[used], confidence[used]

    figure = new_figure(8, 9, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    box = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    upper.bar(left, 100 * right, width, color=BLUE, label="accuracy", **box)
    gap = {"align": "edge", "color": VERMILLION, "alpha": 0.35, "hatch": "//", "linewidth": 0}
    upper.bar(left, 100 * (sure - right), width, 100 * right, label="gap to confidence", **gap)
    upper.plot([0, 1], [0, 100], color=BLACK, linestyle="--", label="perfect calibration")
    upper.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(edges[0], edges[-1]))
    upper.set_title(f"expected calibration error {100 * ece:.2f} %")
    upper.legend(loc="best")
    lower.bar(edges[:-1], counts, widths, color=SKY_BLUE, **box)
    lower.set(xlabel="confidence of the prediction (fraction)", ylabel="images in the bin")
    thousands = FuncFormatter(lambda count, _: f"{count:,.0f}")
    lower.yaxis.set(major_locator=MaxNLocator(5, integer=True), major_formatter=thousands)
    upper.grid(axis="y")
    lower.grid(axis="y")
    return figure


def plot_confusion(
    matrix: Numbers,
    names: Names,
    path: str | Path,
    *,
    boundaries: Sequence[int] | None = None,
    title: str = "Confusion matrix",
) -> Path:
    """Counts of true class (rows) against predicted class (columns), coloured by share of the row.

    Args:
        matrix: [K, K] counts, rows and columns in the order to draw.
        names: one a class; with `boundaries`, one a group.
        boundaries: the first index of every group but the first (0 and K may be there too): thin lines
            are drawn there, and group names stand at the middle of each group.
    """
    return write_png(confusion_figure(matrix, names, boundaries, title), path)


@styled()
def confusion_figure(matrix: Numbers, names: Names, boundaries: Sequence[int] | None, title: str) -> Figure:
    """The figure of `plot_confusion`."""
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(f"a confusion matrix is square and not empty, not {counts.shape}")
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError("a confusion matrix holds counts: finite and not negative")
    size = len(counts)
    cuts = np.unique([0, size, *(range(size) if boundaries is None else boundaries)])
    if cuts[0] < 0 or cuts[-1] > size or len(names) != len(cuts) - 1:
        raise ValueError(f"{len(names)} names for {len(cuts) - 1} rows or groups of rows")
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    figure = new_figure(13, 11.5, title)
    axes = figure.subplots()
    # With a linear scale the confusions, a few percent each, would all look like zero.
    norm = PowerNorm(0.5, vmin=0, vmax=100)
    image = axes.imshow(percent, cmap="Blues", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the true class (%)")
    middles = (cuts[:-1] + cuts[1:] - 1) / 2
    font = min(9.0, 0.8 * 9 * 72 / len(names))  # points: 80 % of a row, the axes being 9 inches high
    labels = [_shorten(name) for name in names]
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(middles, labels, **(slant if font > 8 else {"rotation": 90}), fontsize=font)
    axes.set_yticks(middles, labels, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class")
    if boundaries is not None:
        for draw in (axes.axhline, axes.axvline):
            for cut in cuts[1:-1]:
                draw(cut - 0.5, color=GREY, linewidth=0.6)
    elif size <= NUMBERED_CLASSES:
        _write_counts(axes, counts, percent)
    return figure


def _write_counts(axes: Axes, counts: np.ndarray, percent: np.ndarray) -> None:
    """The count in each cell that is not zero, white on the dark ones."""
    look = {"ha": "center", "va": "center", "fontsize": min(11.0, 160 / len(counts))}
    for row, column in np.argwhere(counts > 0):
        color = "white" if percent[row, column] > 35 else BLACK
        axes.text(column, row, f"{counts[row, column]:,.0f}", color=color, **look)


def plot_image_grid(
    images: np.ndarray, captions: Names, path: str | Path, *, columns: int = 6, title: str = "Images"
) -> Path:
    """Images enlarged pixel by pixel, row by row, each with its caption below.

    Captions are wrapped by measure, and a row is as high as its longest caption: none touches another.

    Args:
        images: [N, H, W, 3] uint8, N at least 1.
        captions: [N]; a line break in one is kept.
    """
    return write_png(image_grid_figure(images, captions, columns, title), path)


@styled()
def image_grid_figure(images: np.ndarray, captions: Names, columns: int, title: str) -> Figure:
    """The figure of `plot_image_grid`."""
    images = _as_images(images, 4)
    if len(images) != len(captions) or columns < 1:
        raise ValueError(f"{len(images)} images, {len(captions)} captions, {columns} columns")
    scale = max(1, TILE_PX // max(images.shape[1:3]))
    tall, wide = (scale * side for side in images.shape[1:3])
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = min(columns, len(images))
    cell, line, margin = wide + 20, 21, 20  # pixels, as all below
    width = max(columns * cell + 2 * margin, 560)
    heading = _wrap_to_width(title, width - 2 * margin, FontProperties(size=11, weight="bold"))
    texts = [_wrap_to_width(caption, wide, FontProperties(size=8)) for caption in captions]
    rows = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    heights = [tall + 8 + line * max(map(len, row)) + 18 for row in rows]
    top = margin + 30 * len(heading) + 12
    height = top + sum(heights)

    # Half a pixel more: inches times dpi must not be cut to one pixel less.
    figure = Figure(figsize=((width + 0.5) / 150, (height + 0.5) / 150), dpi=150)
    FigureCanvasAgg(figure)

    def write(lines: list[str], x: float, y: float, pitch: float, **look: Any) -> None:
        # A line at a time: matplotlib's own pitch depends on the letters, and would need a guess.
        for number, text in enumerate(lines):
            where = (x / width, (y - (number + 0.8) * pitch) / height)
            figure.text(*where, text, ha="center", va="baseline", **look)

    write(heading, width / 2, height - margin, 30, fontsize=11, fontweight="bold")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        x = (width - columns * cell) // 2 + column * cell + (cell - wide) // 2
        y = height - top - sum(heights[:row]) - tall
        figure.figimage(tile, x, y, origin="upper")
        write(texts[index], x + wide / 2, y - 8, line, fontsize=8)
    return figure


def plot_prediction(
    image: np.ndarray, names: Names, probabilities: Numbers, path: str | Path, *, title: str = "Prediction"
) -> Path:
    """The image beside bars of its classes, the likeliest on top.

    Args:
        image: [H, W, 3] uint8. names: [K]. probabilities: [K] fractions 0 to 1.
    """
    return write_png(prediction_figure(image, names, probabilities, title), path)


@styled()
def prediction_figure(image: np.ndarray, names: Names, probabilities: Numbers, title: str) -> Figure:
    """The figure of `plot_prediction`."""
    image, percent = _as_images(image, 3), 100 * np.asarray(probabilities, dtype=float)
    if len(names) == 0 or percent.shape != (len(names),):
        raise ValueError(f"{len(names)} names for {percent.size} probabilities")
    if not ((percent >= 0) & (percent <= 100.001)).all():
        raise ValueError("probabilities must lie between 0 and 1")
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


def plot_per_class_bars(
    names: Names, values: Numbers, path: str | Path, *, quantity: str = "accuracy (%)", title: str = "Classes"
) -> Path:
    """A bar a class, from the best to the worst, in columns of 25, with the mean as a line.

    Args:
        names: [K]. values: [K] percent; NaN (no image of that class) comes last and says "none".
        quantity: what the values are, with its unit.
    """
    return write_png(per_class_bars_figure(names, values, quantity, title), path)


@styled()
def per_class_bars_figure(names: Names, values: Numbers, quantity: str, title: str) -> Figure:
    """The figure of `plot_per_class_bars`."""
    percent = np.asarray(values, dtype=float)
    if len(names) == 0 or percent.shape != (len(names),):
        raise ValueError(f"{len(names)} names for {percent.size} values")
    order = np.argsort(-percent, kind="stable")  # NaN sorts last
    parts = [order[start : start + ROWS_OF_BARS] for start in range(0, len(order), ROWS_OF_BARS)]
    known = percent[np.isfinite(percent)]

    figure = new_figure(max(7.0, 4.2 * len(parts)), 1.8 + 0.27 * len(parts[0]), title)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.barh(range(len(part)), np.nan_to_num(percent[part]), color=BLUE, height=0.75)
        for row, value in enumerate(percent[part]):  # in a column of their own, clear of the mean
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


def _as_images(images: np.ndarray, dimensions: int) -> np.ndarray:
    """The images as an array; refuse with ValueError what is empty or not uint8 [..., H, W, 3]."""
    images = np.asarray(images)
    if images.ndim != dimensions or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        shape = "[N, H, W, 3]" if dimensions == 4 else "[H, W, 3]"
        raise ValueError(f"images must be uint8 {shape}, not {images.dtype} {images.shape}")
    return images


def _shorten(name: str) -> str:
    """The name, or its beginning and an ellipsis when it would squeeze the figure."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _wrap_to_width(text: str, width_px: int, font: FontProperties) -> list[str]:
    """The lines of `text` at 150 dpi that each fit `width_px`; a word too long alone is broken."""
    renderer = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=150)).get_renderer()

    def fits(line: str) -> bool:
        return renderer.get_text_width_height_descent(line, font, ismath=False)[0] <= width_px

    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}".strip()
            if line and not fits(joined):
                lines.append(line)
                joined = word
            while len(joined) > 1 and not fits(joined):
                end = next(n for n in range(len(joined) - 1, 0, -1) if n == 1 or fits(joined[:n]))
                end = joined.rfind("_", 0, end) + 1 or end  # class names break at their underscores
                lines.append(joined[:end])
                joined = joined[end:]
            line = joined
        lines.append(line)
    return lines
