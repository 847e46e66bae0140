"""Evaluation figures: valid files, the given data in bars and cells, captions that never touch."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.transforms import Bbox
from PIL import Image

from inspection import curves, style
from inspection import evaluation_plots as rp

EDGES = np.linspace(0, 1, 6)
ACCURACY = [np.nan, 0.2, 0.4, 0.65, 0.8]
CONFIDENCE = [np.nan, 0.3, 0.5, 0.7, 0.95]
COUNTS = [0, 10, 20, 30, 2000]
LONG = "large_omnivores_and_herbivores"


def random_images(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def confusions(size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.poisson(0.3, (size, size)) + np.diag(rng.integers(40, 90, size))


WRITERS: dict[str, Callable[[Path], Path]] = {
    "reliability": lambda path: rp.plot_reliability(EDGES, ACCURACY, CONFIDENCE, COUNTS, 0.1, path),
    "confusion": lambda path: rp.plot_confusion(confusions(4), list("abcd"), path),
    "grid": lambda path: rp.plot_image_grid(random_images(3), ["a", "b", "c"], path, columns=2),
    "prediction": lambda path: rp.plot_prediction(random_images(1)[0], ["a", "b"], [0.4, 0.6], path),
    "bars": lambda path: rp.plot_per_class_bars(["a", "b"], [40.0, 60.0], path),
}
SIZES = {
    "reliability": (960, 1080),
    "confusion": (1560, 1380),
    # 40 + 2 columns of 212 is narrower than the least width; title 62, two rows of 192 + 8 + 21 + 18.
    "grid": (560, 540),
    "prediction": (1200, 504),
    "bars": (840, 280),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_file_is_a_png_of_the_expected_size_and_the_same_bytes_again(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "a.png")
    assert path == tmp_path / "a.png"
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG"
        assert image.size == SIZES[kind]
    assert WRITERS[kind](tmp_path / "b.png").read_bytes() == path.read_bytes()
    assert b"matplotlib" not in path.read_bytes().lower()


@pytest.mark.parametrize("kind", WRITERS)
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, kind: str, monkeypatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def break_off(*_: object, **__: object) -> None:
        raise MemoryError("while drawing")

    monkeypatch.setattr(rp.Figure, "savefig", break_off)
    with pytest.raises(MemoryError):
        WRITERS[kind](path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_look_agrees_with_the_training_figures() -> None:
    ours = rp.per_class_bars_figure(["a", "b"], [1, 2], "F1 (%)", "t")
    row = dict.fromkeys([*curves.REQUIRED_COLUMNS, *curves.HELD_OUT_COLUMNS["test"]], 1.0)
    theirs = curves.history_figure([row])
    for figure in (ours, theirs):
        axes = figure.axes[0]
        shown = {side for side, spine in axes.spines.items() if spine.get_visible()}
        assert (shown, axes.get_axisbelow(), figure.dpi) == ({"left", "bottom"}, True, 120)
        assert not figure._suptitle.get_parse_math()
    assert {to_hex(bar.get_facecolor()) for bar in ours.axes[0].patches} == {style.BLUE.lower()}
    assert theirs.axes[0].lines[0].get_color() == style.BLUE


def test_reliability_bars_carry_the_bins_and_skip_the_empty_one() -> None:
    figure = rp.reliability_figure(EDGES, ACCURACY, CONFIDENCE, COUNTS, 0.0843, "t")
    upper, lower = figure.axes
    accuracy, gap = upper.containers
    assert [bar.get_height() for bar in accuracy] == pytest.approx([20, 40, 65, 80])
    assert [bar.get_x() for bar in accuracy] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx([30, 50, 70, 95])
    assert [bar.get_height() for bar in lower.containers[0]] == COUNTS
    assert "8.43 %" in upper.get_title()
    assert upper.get_ylabel() and lower.get_ylabel() and lower.get_xlabel()


@pytest.mark.parametrize(
    ("edges", "accuracy"),
    [([0.0], []), ([0, 1], [0.5, 0.5]), ([0, 0.5, 0.5], [0.1, 0.2]), ([1, 0.5, 0], [0.1, 0.2])],
)
def test_bins_that_do_not_fit_are_refused(edges: list, accuracy: list) -> None:
    with pytest.raises(ValueError, match="bins need"):
        rp.reliability_figure(edges, accuracy, accuracy, [1] * len(accuracy), 0.0, "t")


def test_confusion_by_superclass_has_boundaries_and_group_names() -> None:
    matrix = confusions(100)
    names = [f"group {index}" for index in range(20)]
    boundaries = list(range(5, 100, 5))
    axes = rp.confusion_figure(matrix, names, boundaries, "t").axes[0]
    percent = 100 * matrix / matrix.sum(axis=1, keepdims=True)
    assert np.allclose(axes.images[0].get_array(), percent)
    assert len(axes.lines) == 2 * 19
    assert sorted({line.get_xdata()[0] for line in axes.lines} - {0}) == [cut - 0.5 for cut in boundaries]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert list(axes.get_yticks()) == [2 + 5 * index for index in range(20)]
    assert not axes.texts, "ten thousand numbers would be noise"


def test_boundaries_may_name_both_ends() -> None:
    figure = rp.confusion_figure(confusions(4), ["a", "b"], [0, 2, 4], "t")
    assert len(figure.axes[0].lines) == 2


def test_small_confusion_shows_each_count_that_is_not_zero() -> None:
    matrix = confusions(20) * 100
    axes = rp.confusion_figure(matrix, [LONG] * 20, None, "t").axes[0]
    shown = {(int(text.get_position()[1]), int(text.get_position()[0])): text for text in axes.texts}
    assert shown.keys() == {tuple(cell) for cell in np.argwhere(matrix > 0).tolist()}
    assert all(text.get_text() == f"{matrix[cell]:,}" for cell, text in shown.items())
    assert to_hex(shown[0, 0].get_color()) == "#ffffff", "black on dark blue is not legible"


def test_confusion_row_without_images_is_drawn_as_zero() -> None:
    axes = rp.confusion_figure([[0, 0], [1, 3]], ["a", "b"], None, "t").axes[0]
    assert axes.images[0].get_array().tolist() == [[0, 0], [25, 75]]


@pytest.mark.parametrize(
    ("matrix", "names", "boundaries"),
    [
        ([[1, 2]], ["a"], None),
        (np.zeros((0, 0)), [], None),
        ([[1, -1], [0, 1]], ["a", "b"], None),
        ([[1, np.nan], [0, 1]], ["a", "b"], None),
        ([[1, 0], [0, 1]], ["a"], None),
        ([[1, 0], [0, 1]], ["a", "b"], [1, 3]),
        ([[1, 0], [0, 1]], ["a"], [1]),
    ],
)
def test_bad_confusions_are_refused(matrix: list, names: list, boundaries: list | None) -> None:
    with pytest.raises(ValueError):
        rp.confusion_figure(matrix, names, boundaries, "t")


def test_grid_shows_each_pixel_as_a_block(tmp_path: Path) -> None:
    images = random_images(5)
    figure = rp.image_grid_figure(images, ["caption"] * 5, 3, "t")
    path = rp.plot_image_grid(images, ["caption"] * 5, tmp_path / "g.png", columns=3, title="t")
    with Image.open(path) as file:
        drawn = np.asarray(file.convert("RGB"))
    for tile, image in zip(figure.images, images, strict=True):
        left, top = int(tile.ox), drawn.shape[0] - int(tile.oy) - 192
        block = drawn[top : top + 192, left : left + 192]
        assert np.array_equal(block, image.repeat(6, axis=0).repeat(6, axis=1))


def test_captions_never_overlap_each_other_an_image_or_the_edge() -> None:
    captions = [f"true {LONG}\nguess household_electrical_devices {99 - n}.1 %" for n in range(7)]
    captions[2] = "W" * 90
    captions[3] = ""
    captions[5] = "one $x$ two"
    title = "Most confidently wrong of 10,000 synthetic test images, subset of 2,560 images " * 3
    figure = rp.image_grid_figure(random_images(7), captions, 3, title)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    boxes += [Bbox.from_bounds(image.ox, image.oy, 192, 192) for image in figure.images]
    for first, second in combinations(boxes, 2):
        assert not first.padded(-1).overlaps(second.padded(-1))
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    written = "".join(text.get_text() for text in figure.texts).replace(" ", "")
    for caption in [title, *captions]:
        assert "".join(caption.split()) in written, "no caption loses a letter"


@pytest.mark.parametrize(
    ("images", "captions", "columns"),
    [
        (random_images(2), ["one"], 2),
        (random_images(0), [], 2),
        (random_images(2), ["a", "b"], 0),
        (random_images(2).astype(np.float32), ["a", "b"], 2),
        (random_images(2)[..., :1], ["a", "b"], 2),
        (random_images(1)[0], ["a"], 2),
    ],
)
def test_bad_grids_are_refused(images: np.ndarray, captions: list, columns: int) -> None:
    with pytest.raises(ValueError):
        rp.image_grid_figure(images, captions, columns, "t")


def test_prediction_bars_are_sorted_and_the_image_is_given_as_it_is() -> None:
    image = random_images(1)[0]
    figure = rp.prediction_figure(image, ["a", LONG * 3, "c"], [0.1, 0.7, 0.2], "photo.png")
    left, right = figure.axes
    assert np.array_equal(left.images[0].get_array(), image)
    assert left.images[0].get_interpolation() == "nearest"
    assert [bar.get_width() for bar in right.patches] == pytest.approx([70, 20, 10])
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names[1:] == ["c", "a"]
    assert names[0].endswith("…") and len(names[0]) == rp.LONGEST_NAME
    assert [text.get_text() for text in right.texts] == ["70.0 %", "20.0 %", "10.0 %"]
    bottom, top = right.get_ylim()
    assert bottom > top, "the likeliest stands on top"


@pytest.mark.parametrize(
    ("names", "probabilities"),
    [([], []), (["a"], [0.5, 0.5]), (["a"], [1.5]), (["a"], [-0.1]), (["a"], [np.nan])],
)
def test_bad_predictions_are_refused(names: list, probabilities: list) -> None:
    with pytest.raises(ValueError):
        rp.prediction_figure(random_images(1)[0], names, probabilities, "t")


def test_hundred_classes_stand_in_columns_from_best_to_worst() -> None:
    rng = np.random.default_rng(0)
    names, values = [f"{LONG[:20]}_{n}" for n in range(100)], rng.uniform(20, 95, 100)
    values[7] = np.nan
    figure = rp.per_class_bars_figure(names, values, "F1 (%)", "t")
    assert len(figure.axes) == 4
    labels = [label for axes in figure.axes for label in axes.get_yticklabels()]
    assert [label.get_text() for label in labels] == [names[n] for n in np.argsort(-values)]
    widths = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert widths[:-1] == sorted(values[np.isfinite(values)], reverse=True)
    assert figure.axes[-1].texts[-1].get_text() == "none"
    assert all(axes.get_xlabel() == "F1 (%)" for axes in figure.axes)
    assert figure.axes[0].lines[0].get_xdata()[0] == pytest.approx(np.nanmean(values))
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in labels]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert min(box.height for box in boxes) >= 9, "pixels: smaller letters cannot be read"


def test_classes_without_any_value_can_be_drawn(tmp_path: Path) -> None:
    rp.plot_per_class_bars(["a", "b"], [np.nan, np.nan], tmp_path / "bars.png")


def test_bars_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 names for 1 values"):
        rp.per_class_bars_figure(["a", "b"], [1.0], "F1 (%)", "t")
    with pytest.raises(ValueError):
        rp.per_class_bars_figure([], [], "F1 (%)", "t")


@pytest.mark.parametrize("size", [20, 100])
def test_confusion_labels_are_not_clipped_and_rows_do_not_overlap(size: int) -> None:
    names = [f"{LONG}_{index}" for index in range(size)]
    figure = rp.confusion_figure(confusions(size), names, None, "t")
    figure.canvas.draw()
    rows = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    columns = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in combinations(rows, 2))
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in rows + columns)
