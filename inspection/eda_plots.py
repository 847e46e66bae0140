"""The pictures of the data's notebook: tables of small images, histograms, balance, duplicates.

Arrays in, figures out (`compact_png` makes PNGs of them); no display, no `pyplot`, and the same input
gives the same bytes. Every function raises ValueError for input that does not fit together.
"""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from inspection.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY_BLUE,
    VERMILLION,
    new_figure,
    png_bytes,
    styled,
)

DPI = 120
SCALE = 3  # a pixel of the data is 3x3 in the figure
LINE_PX, GAP_PX, MARGIN_PX = 15, 16, 18  # a line of caption; between tiles; around the figure
CHARACTERS = 14  # of a caption's line: 7 points on a 32-pixel tile and its gap
Names = Sequence[str]


def compact_png(figure: Figure) -> bytes:
    """`figures.png_bytes` without transparency and better packed: a notebook carries its pictures about."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png_bytes(figure))) as image:
        image.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@styled()
def tile_figure(
    tiles: np.ndarray,
    title: str,
    *,
    captions: Sequence[Names] | None = None,
    columns: Names | None = None,
    rows: Names | None = None,
    groups: Sequence[Names] | None = None,
) -> Figure:
    """A table of small images, enlarged pixel by pixel, each with its caption below.

    Args:
        tiles: uint8 [R, C, H, W, 3].
        captions: [R][C]; a line break is kept, long names are wrapped, an underscore reads as a space.
        columns, rows: [C] headings above, [R] headings on the left.
        groups: [R][G] headings above each G-th part of a row.
    """
    tiles = np.asarray(tiles)
    if tiles.ndim != 5 or tiles.dtype != np.uint8 or tiles.shape[-1] != 3 or not tiles.size:
        raise ValueError(f"tiles must be uint8 [R, C, H, W, 3], not {tiles.dtype} {tiles.shape}")
    count, across, height, width = tiles.shape[:4]
    for what, names in (("captions", captions), ("rows", rows), ("groups", groups)):
        if names is not None and len(names) != count:
            raise ValueError(f"{len(names)} {what} for {count} rows of images")
    if columns is not None and len(columns) != across:
        raise ValueError(f"{len(columns)} headings for {across} columns")
    if captions is not None and any(len(line) != across for line in captions):
        raise ValueError(f"every row needs {across} captions")

    tall, wide = height * SCALE, width * SCALE
    letters = CHARACTERS * width // 32
    texts = [[_wrapped(name, letters) for name in line] for line in captions or [[""] * across] * count]
    heads = [_wrapped(name, letters) for name in columns or []]
    left = MARGIN_PX + (145 if rows else 0)
    total_width = left + across * (wide + GAP_PX) + MARGIN_PX
    heading = textwrap.wrap(title, total_width // 13)
    group_px = 24 if groups else 0
    depths = [group_px + tall + LINE_PX * max(map(len, line)) + GAP_PX for line in texts]
    top = MARGIN_PX + 24 * len(heading) + LINE_PX * max(map(len, heads), default=0) + 10
    total_height = top + sum(depths) + MARGIN_PX // 2

    figure = Figure(figsize=((total_width + 0.5) / DPI, (total_height + 0.5) / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    canvas = np.full((total_height, total_width, 3), 255, dtype=np.uint8)

    def write(lines: Sequence[str], x: float, y: float, pitch: int = LINE_PX, **look: object) -> None:
        for number, text in enumerate(lines):
            where = (x / total_width, 1 - (y + (number + 0.8) * pitch) / total_height)
            figure.text(*where, text, **{"ha": "center", "va": "baseline", "fontsize": 7} | look)

    write(heading, total_width / 2, MARGIN_PX, 24, fontsize=12, fontweight="bold")
    for column, lines in enumerate(heads):
        x = left + column * (wide + GAP_PX) + wide / 2
        write(lines, x, top - 6 - LINE_PX * len(lines), fontweight="bold")
    y = top
    for row in range(count):
        for part, name in enumerate(groups[row] if groups else ()):
            x = left + part * across // len(groups[row]) * (wide + GAP_PX)
            write([name.replace("_", " ")], x, y, 20, ha="left", fontsize=9, fontweight="bold")
        y += group_px
        if rows:
            lines = _wrapped(rows[row], 18)
            start = y + (tall - LINE_PX * len(lines)) / 2
            write(lines, MARGIN_PX, start, ha="left", fontsize=7.5, fontweight="bold")
        for column in range(across):
            x = left + column * (wide + GAP_PX)
            enlarged = tiles[row, column].repeat(SCALE, axis=0).repeat(SCALE, axis=1)
            canvas[y : y + tall, x : x + wide] = enlarged
            write(texts[row][column], x + wide / 2, y + tall + 3)
        y += depths[row] - group_px
    figure.figimage(canvas, 0, 0, origin="upper")
    return figure


def _wrapped(name: str, letters: int) -> list[str]:
    """The caption's lines, none longer than `letters`."""
    parts = (textwrap.wrap(part.replace("_", " "), letters) for part in name.split("\n"))
    return [line for lines in parts for line in lines]


@styled({"axes.grid": True})
def histogram_figure(histogram: np.ndarray, mean: np.ndarray, title: str) -> Figure:
    """The share of pixels at each level, a panel a channel, with the channel's mean marked.

    Args:
        histogram: [3, 256] counts. mean: [3] on the 0-1 scale.
    """
    if np.shape(histogram) != (3, 256) or np.shape(mean) != (3,):
        raise ValueError(
            f"a histogram is [3, 256] and a mean [3], not {np.shape(histogram)}, {np.shape(mean)}"
        )
    percent = 100 * histogram / histogram.sum(axis=1, keepdims=True)
    figure = new_figure(12, 3.8, title)
    panels = figure.subplots(1, 3, sharey=True)
    channels = zip(panels, ("red", "green", "blue"), (VERMILLION, GREEN, BLUE), strict=True)
    for channel, (axes, name, color) in enumerate(channels):
        axes.stairs(percent[channel], np.arange(257) - 0.5, fill=True, color=color)
        level = 255 * mean[channel]
        axes.axvline(level, color=BLACK, linestyle="--", label=f"mean {level:.1f}")
        axes.set(title=name, xlabel="level (0-255)", xlim=(-3, 258), xticks=[0, 64, 128, 192, 255])
        axes.legend(loc="upper center")
    panels[0].set_ylabel("share of the pixels (%)")
    return figure


@styled()
def balance_figure(counts: Sequence[np.ndarray], names: Names, starts: Sequence[int], title: str) -> Figure:
    """Images of each class, training above test, the classes one superclass after another.

    Args:
        counts: two of [K], training and test, in the order to draw.
        names: superclasses, in the same order. starts: the first class of each.
    """
    size = len(counts[0])
    if len(counts) != 2 or len(counts[1]) != size or len(names) != len(starts):
        raise ValueError("two lists of counts of one length are needed, and a start for each superclass")
    figure = new_figure(13, 6, title)
    panels = figure.subplots(2, 1, sharex=True)
    ends = [*starts[1:], size]
    for axes, values, split in zip(panels, counts, ("training", "test"), strict=True):
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            color = SKY_BLUE if number % 2 else BLUE
            axes.bar(np.arange(start, end), values[start:end], width=0.8, color=color)
        axes.set(ylabel=f"{split} images", xlim=(-1, size), ylim=(0, 1.15 * np.max(values)))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    labels = [name.replace("_", " ") for name in names]
    panels[1].set_xticks(middles, labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=8.5)
    panels[1].set_xlabel("classes (one bar each), by superclass")
    return figure


@styled()
def spread_figure(brightness: np.ndarray, colour: np.ndarray, title: str) -> Figure:
    """How many images have each brightness and colour, in levels: a map with a logarithmic colour scale."""
    if np.shape(brightness) != np.shape(colour) or np.size(brightness) == 0:
        raise ValueError("a brightness and a colour are needed for each image")
    figure = new_figure(8.5, 5.2, title)
    axes = figure.subplots()
    bins = [np.linspace(0, 256, 65), np.linspace(0, max(64, float(np.max(colour))) * 1.001, 65)]
    counts, _, _, image = axes.hist2d(
        brightness, colour, bins=bins, cmap="cividis_r", norm=LogNorm(vmin=1), cmin=1
    )
    image.set_clim(1, max(float(np.nanmax(counts)), 2.0))
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("images (logarithmic)")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    bar.ax.minorticks_off()
    axes.set(
        xlabel="brightness: mean level (0-255)", ylabel="colour: largest minus smallest\nchannel (levels)"
    )
    axes.set_xticks([0, 64, 128, 192, 255])
    return figure


@styled({"axes.grid": True})
def similarity_figure(
    edges: np.ndarray,
    counts: Sequence[np.ndarray],
    agreement: Sequence[np.ndarray],
    threshold: float,
    title: str,
) -> Figure:
    """Pairs in each band of similarity, and how many of them have one label: as they are, and mirrored.

    Args:
        edges: [B + 1]. counts: two of [B] pairs, as they are and mirrored. agreement: two of [B] percent.
    """
    bands = len(edges) - 1
    if (
        any(len(values) != bands for values in (*counts, *agreement))
        or len(counts) != 2
        or len(agreement) != 2
    ):
        raise ValueError(f"two counts and two agreements of {bands} bands are needed")
    figure = new_figure(10, 6.6, title)
    upper, lower = figure.subplots(2, 1, sharex=True)
    looks = (
        {"color": BLUE, "marker": "o", "label": "test image as it is"},
        {"color": ORANGE, "marker": "s", "linestyle": "--", "label": "test image mirrored"},
    )
    middles = (np.asarray(edges)[:-1] + np.asarray(edges)[1:]) / 2
    for values, share, look in zip(counts, agreement, looks, strict=True):
        upper.plot(middles, np.where(np.asarray(values) > 0, values, np.nan), **look)
        lower.plot(middles, share, **look)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    upper.set_ylabel("test images in the band")
    lower.set(ylabel="pairs with equal labels (%)", ylim=(-4, 104))
    lower.set_xlabel(f"similarity to the nearest training image, in bands of {edges[1] - edges[0]:.2g}")
    for axes in (upper, lower):
        _mark_threshold(axes, threshold)
    upper.legend(loc="upper right")
    return figure


def _mark_threshold(axes: Axes, threshold: float) -> None:
    axes.axvline(threshold, color=GREY, linestyle=":", linewidth=2, label=f"threshold {threshold:g}")
