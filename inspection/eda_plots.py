"""Figures of the notebook: tables of small images, histograms, class balance, duplicates."""

import io
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator
from PIL import Image

from inspection.style import BLUE, GREEN, GREY, ORANGE, SKY_BLUE, VERMILLION, new_figure, png_bytes, styled

SCALE = 3  # a pixel of the data is 3x3 in the figure, at 120 dots per inch
# Pixels at that scale: a line of caption; between tiles; around the figure; beside the rows' headings.
LINE_PX, GAP_PX, MARGIN_PX, ROW_HEADING_PX = 15, 16, 18, 145
Names, Values = Sequence[str], Sequence[float]


def compact_png(figure: Figure) -> bytes:
    """A smaller `style.png_bytes`, without transparency: a notebook holds its figures."""
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
    scale: int = SCALE,
) -> Figure:
    """A table of small images, enlarged pixel by pixel, each with its caption below.

    Text is wrapped by its measured width, and a row is as high as its longest caption: none touches
    another. Underscores in it are drawn as spaces.

    Args:
        tiles: uint8 [R, C, H, W, 3].
        captions: [R][C]; a line break is kept.
        columns: [C] headings above.
        rows: [R] headings on the left.
        groups: [R][G] headings above each G-th part of a row.
        scale: pixels across for one of the data; text grows with it.
    """
    count, across, height, width = tiles.shape[:4]
    # All lengths are in pixels at SCALE; the resolution does the rest.
    tall, wide = height * SCALE, width * SCALE
    left = MARGIN_PX + (ROW_HEADING_PX if rows else 0)
    total_width = max(left + across * (wide + GAP_PX) + MARGIN_PX, 360)
    room = wide + GAP_PX - 6
    texts = [[_wrapped(name, room) for name in line] for line in captions or [[""] * across] * count]
    heads = [_wrapped(name, room, weight="bold") for name in columns or []]
    heading = _wrapped(title, total_width - 2 * MARGIN_PX, size=12, weight="bold")
    group_px = 24 if groups else 0
    depths = [group_px + tall + LINE_PX * max(map(len, line)) + GAP_PX for line in texts]
    top = MARGIN_PX + 24 * len(heading) + LINE_PX * max(map(len, heads), default=0) + 10
    total_height = top + sum(depths) + MARGIN_PX // 2

    # Half a pixel more: inches times dots per inch must not be cut to one pixel less.
    dpi = 40 * scale
    figure = Figure(figsize=((total_width + 0.5 / scale) / 120, (total_height + 0.5 / scale) / 120), dpi=dpi)
    FigureCanvasAgg(figure)
    canvas = np.full((total_height * scale // SCALE, total_width * scale // SCALE, 3), 255, dtype=np.uint8)

    def write(lines: Sequence[str], x: float, y: float, pitch: int = LINE_PX, **look: object) -> None:
        # A line at a time: matplotlib's own line spacing depends on the letters.
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
            lines = _wrapped(rows[row], ROW_HEADING_PX - 10, size=7.5, weight="bold")
            start = y + (tall - LINE_PX * len(lines)) / 2
            write(lines, MARGIN_PX, start, ha="left", fontsize=7.5, fontweight="bold")
        for column in range(across):
            x = left + column * (wide + GAP_PX)
            enlarged = tiles[row, column].repeat(scale, axis=0).repeat(scale, axis=1)
            corner = y * scale // SCALE, x * scale // SCALE
            canvas[corner[0] :, corner[1] :][: len(enlarged), : enlarged.shape[1]] = enlarged
            write(texts[row][column], x + wide / 2, y + tall + 3)
        y += depths[row] - group_px
    figure.figimage(canvas, 0, 0, origin="upper")
    return figure


def _wrapped(text: str, width_px: float, *, size: float = 7, weight: str = "normal") -> list[str]:
    """The text in lines of at most `width_px` at 120 dots per inch; a longer word is broken."""
    renderer = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=120)).get_renderer()
    font = FontProperties(size=size, weight=weight)

    def fits(line: str) -> bool:
        return renderer.get_text_width_height_descent(line, font, ismath=False)[0] <= width_px

    lines = []
    for paragraph in text.replace("_", " ").split("\n"):
        line = ""
        for part in re.split(r"(?<=[ -])(?=[^ ])", paragraph):  # after each space and hyphen
            if line and not fits((line + part).rstrip()):
                lines.append(line.rstrip())
                line = ""
            line += part
            while len(line) > 1 and not fits(line.rstrip()):
                end = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or fits(line[:n]))
                lines.append(line[:end])
                line = line[end:]
        lines.append(line.rstrip())
    return [line for line in lines if line]


@styled({"axes.grid": True})
def histogram_figure(histogram: np.ndarray, mean: np.ndarray, title: str) -> Figure:
    """The percentage of pixels at each level, a panel per channel, with the channel's mean marked.

    Args:
        histogram: [3, 256] counts.
        mean: [3] on the 0-1 scale.
    """
    percent = 100 * histogram / histogram.sum(axis=1, keepdims=True)
    figure = new_figure(12, 3.8, title)
    panels = figure.subplots(1, 3, sharey=True)
    channels = zip(panels, ("red", "green", "blue"), (VERMILLION, GREEN, BLUE), strict=True)
    for channel, (axes, name, color) in enumerate(channels):
        axes.stairs(percent[channel], np.arange(257) - 0.5, fill=True, color=color)
        level = 255 * mean[channel]
        axes.axvline(level, color="black", linestyle="--", label=f"mean {level:.1f}")
        axes.set(title=name, xlabel="level (0-255)", xlim=(-3, 258), xticks=[0, 64, 128, 192, 255])
        axes.legend(loc="upper center")
    panels[0].set_ylabel("percentage of the pixels")
    return figure


@styled()
def balance_figure(counts: Sequence[np.ndarray], names: Names, starts: Sequence[int], title: str) -> Figure:
    """The number of images of each class, training above test, with the classes grouped by superclass.

    Args:
        counts: training and test, int [K] each, in the order to draw.
        names: superclasses, in the same order.
        starts: the first class of each superclass.
    """
    size = len(counts[0])
    figure = new_figure(13, 6, title)
    panels = figure.subplots(2, 1, sharex=True)
    sizes = np.diff([*starts, size])
    colors = np.repeat(np.resize([BLUE, SKY_BLUE], len(starts)), sizes)
    for axes, values, split in zip(panels, counts, ("training", "test"), strict=True):
        axes.bar(range(size), values, color=colors)
        axes.set(ylabel=f"{split} images", xlim=(-1, size), ylim=(0, 1.15 * np.max(values)))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
    labels = [name.replace("_", " ") for name in names]
    panels[1].set_xticks(
        starts + (sizes - 1) / 2, labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=8.5
    )
    panels[1].set_xlabel("classes (one bar each), by superclass")
    return figure


@styled()
def spread_figure(brightness: np.ndarray, colour: np.ndarray, title: str) -> Figure:
    """A 2D histogram of the images' brightness and colour (float [N], levels), on a logarithmic scale."""
    figure = new_figure(8.5, 5.2, title)
    axes = figure.subplots()
    bins = [np.linspace(0, 256, 65), np.linspace(0, max(64, float(np.max(colour))) * 1.001, 65)]
    look = {"cmap": "cividis_r", "norm": LogNorm(vmin=1), "cmin": 1}
    counts, _, _, image = axes.hist2d(brightness, colour, bins=bins, **look)
    image.set_clim(1, max(float(np.nanmax(counts)), 2.0))
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("images (logarithmic)")
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    bar.ax.minorticks_off()
    axes.set(xlabel="brightness: mean level (0-255)", xticks=[0, 64, 128, 192, 255])
    axes.set_ylabel("colour: largest minus smallest\nchannel (levels)")
    return figure


@styled({"axes.grid": True})
def similarity_figure(
    edges: np.ndarray, counts: Sequence[Values], agreement: Sequence[Values], threshold: float, title: str
) -> Figure:
    """Pairs in each band of similarity, and the percentage with equal labels: as they are, and mirrored.

    Args:
        edges: [B + 1].
        counts: pairs as they are and mirrored, [B] each.
        agreement: percent, of the same two, [B] each.
    """
    figure = new_figure(10, 6.6, title)
    upper, lower = figure.subplots(2, 1, sharex=True)
    looks = (
        {"color": BLUE, "marker": "o", "label": "test image as it is"},
        {"color": ORANGE, "marker": "s", "linestyle": "--", "label": "test image mirrored"},
    )
    middles = (np.asarray(edges)[:-1] + np.asarray(edges)[1:]) / 2
    for values, percent, look in zip(counts, agreement, looks, strict=True):
        upper.plot(middles, np.where(np.asarray(values) > 0, values, np.nan), **look)
        lower.plot(middles, percent, **look)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter("{x:,.0f}")
    upper.set_ylabel("test images in the band")
    lower.set(ylabel="pairs with equal labels (%)", ylim=(-4, 104))
    lower.set_xlabel(f"similarity to the nearest training image, in bands of {edges[1] - edges[0]:.2g}")
    for axes in (upper, lower):
        axes.axvline(threshold, color=GREY, linestyle=":", linewidth=2, label=f"threshold {threshold:g}")
    upper.legend(loc="upper right")
    return figure
