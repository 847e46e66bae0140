"""The notebook's figures: pixels where they belong, captions that never touch."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from inspection import eda_plots
from inspection.style import png_bytes

LONG = "large_omnivores_and_herbivores"


def random_tiles(rows: int, columns: int, height: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, columns, height, 32, 3), dtype=np.uint8)


def boxes_of(figure: Figure) -> list[Bbox]:
    """The extents of the texts that the figure itself holds, in pixels."""
    figure.canvas.draw()
    return [text.get_window_extent() for text in figure.texts if text.get_text()]


def test_a_compact_png_is_smaller_and_the_same_picture() -> None:
    figure = eda_plots.tile_figure(random_tiles(2, 3), "t")
    whole, compact = png_bytes(figure), eda_plots.compact_png(figure)
    assert len(compact) < len(whole)
    pictures = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in (whole, compact)]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("scale", [3, 4, 6])
def test_tiles_are_drawn_pixel_by_pixel_in_reading_order(scale: int) -> None:
    tiles = random_tiles(2, 3)
    figure = eda_plots.tile_figure(tiles, "title", captions=[["a", "b", "c"]] * 2, scale=scale)
    image = np.asarray(Image.open(io.BytesIO(png_bytes(figure))))[..., :3]
    last = -1
    for tile in tiles.reshape(-1, 32, 32, 3):
        big = tile.repeat(scale, axis=0).repeat(scale, axis=1)
        corners = [(y, x) for y, x in np.argwhere((image == big[0, 0]).all(axis=2))
                   if np.array_equal(image[y : y + len(big), x : x + len(big)], big)]  # fmt: skip
        assert len(corners) == 1
        y, x = corners[0]
        assert y * image.shape[1] + x > last
        last = y * image.shape[1] + x


@pytest.mark.parametrize("height", [32, 66])
@pytest.mark.parametrize("scale", [3, 4])
def test_no_text_touches_another_or_leaves_the_figure(height: int, scale: int) -> None:
    captions = [
        ["aquarium_fish", LONG, "synthetic-polygons-1\n/ synthetic-crescents-5"],
        ["W" * 90, "", "$x$"],
    ]
    figure = eda_plots.tile_figure(
        random_tiles(2, 3, height),
        "A title that is much too long for a figure of three small images and has to be wrapped",
        captions=captions,
        columns=["HorizontalFlip", "Pad + RandomCrop", "the first four together"],
        rows=["most colourful", "0.9 to 1\n1,000 pairs,\n100 % of one label"],
        groups=[["people"]] * 2,
        scale=scale,
    )
    boxes = boxes_of(figure)
    assert len(boxes) > 20
    for first, second in itertools.combinations(boxes, 2):
        assert not Bbox.intersection(first.padded(-0.5), second.padded(-0.5)), (first, second)
    width, height = figure.bbox.size
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    written = "".join(text.get_text() for text in figure.texts).replace(" ", "")
    for caption in itertools.chain(*captions):
        assert "".join(caption.replace("_", "").split()) in written, "no caption loses a letter"


@pytest.mark.parametrize("columns", [2, 10])
def test_a_title_of_any_length_stays_inside(columns: int) -> None:
    title = "CIFAR-100: the 14 most similar pairs of different labels, test above training " * 2
    for end in range(20, len(title), 20):
        figure = eda_plots.tile_figure(random_tiles(1, columns), title[:end])
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes_of(figure))


def test_headings_of_groups_fit_above_five_tiles() -> None:
    names = [["large_man-made_outdoor_things", LONG]]
    first, second = boxes_of(eda_plots.tile_figure(random_tiles(1, 10), "t", groups=names))[1:]
    assert first.x1 < second.x0


def test_histogram_bars_are_percentages_of_each_channel() -> None:
    histogram = np.zeros((3, 256))
    histogram[0, 10], histogram[0, 20] = 3, 1
    histogram[1:, 0] = 7
    figure = eda_plots.histogram_figure(histogram, np.array([0.2, 0.4, 0.6]), "t")
    heights = [axes.patches[0].get_data().values for axes in figure.axes]
    assert heights[0][10] == 75 and heights[0][20] == 25
    assert heights[1][0] == heights[2][0] == 100
    marks = [axes.lines[0].get_xdata()[0] for axes in figure.axes]
    np.testing.assert_allclose(marks, [51, 102, 153])


def test_balance_shows_every_count_and_names_superclasses_at_their_middle() -> None:
    figure = eda_plots.balance_figure((np.arange(6), np.full(6, 2)), ["a_b", "c"], [0, 4], "t")
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == list(range(6))
    assert [label.get_text() for label in lower.get_xticklabels()] == ["a b", "c"]
    assert lower.get_xticks().tolist() == [1.5, 4.5]


def test_similarity_draws_what_it_is_given() -> None:
    counts, agreement = [[9, 5, 0, 1], [8, 4, 2, 1]], [[1.0, 5.0, np.nan, 100.0], [0.0, 1.0, 2.0, 3.0]]
    figure = eda_plots.similarity_figure(np.linspace(0.2, 1.0, 5), counts, agreement, 0.6, "t")
    upper, lower = figure.axes
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), [9, 5, np.nan, 1])
    assert lower.lines[1].get_ydata().tolist() == [0, 1, 2, 3]
    assert [line.get_xdata()[0] for line in (upper.lines[2], lower.lines[2])] == [0.6, 0.6]


def test_spread_counts_the_images() -> None:
    figure = eda_plots.spread_figure(np.array([1.0, 1.0, 250.0]), np.array([0.0, 0.0, 30.0]), "t")
    counts = figure.axes[0].collections[0].get_array()
    assert np.nansum(np.ma.filled(counts, np.nan)) == 3
