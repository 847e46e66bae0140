"""Evaluation figures: the given data in bars and cells, and legible labels."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from inspection import evaluation_plots as plots
from inspection.metrics import Calibration, RiskCoverage

BINS = Calibration(
    edges=np.linspace(0, 1, 6),
    accuracy=np.array([np.nan, 0.2, 0.4, 0.65, 0.8]),
    confidence=np.array([np.nan, 0.3, 0.5, 0.7, 0.95]),
    counts=np.array([0, 10, 20, 30, 2000]),
    ece=0.0843,
)
LONG = "large_omnivores_and_herbivores"


def confusions(size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.poisson(0.3, (size, size)) + np.diag(rng.integers(40, 90, size))


def test_reliability_bars_carry_the_bins_and_skip_the_empty_one() -> None:
    upper, lower = plots.reliability_figure(BINS, "t").axes
    accuracy, gap = upper.containers
    assert [bar.get_height() for bar in accuracy] == pytest.approx([20, 40, 65, 80])
    assert [bar.get_x() for bar in accuracy] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx([30, 50, 70, 95])
    assert [bar.get_height() for bar in lower.containers[0]] == BINS.counts.tolist()
    assert "8.43 %" in upper.get_title()


def test_risk_is_drawn_against_coverage() -> None:
    curve = RiskCoverage(np.array([25.0, 50, 75, 100]), np.array([0, 0, 100 / 3, 50]), 20.83)
    (axes,) = plots.risk_coverage_figure(curve, "t").axes
    assert axes.lines[0].get_xydata().tolist() == [[25, 0], [50, 0], [75, 100 / 3], [100, 50]]
    assert "20.83 %" in axes.get_title() and axes.get_xlim() == (0, 100) and axes.get_ylim()[0] == 0


def test_shifts_are_cells_with_their_accuracy_and_noise_is_pale() -> None:
    accuracy = np.arange(70.0, 79.0).reshape(3, 3)
    axes = plots.shift_figure(accuracy, (-1, 0, 1), "t").axes[0]
    (image,) = axes.images
    assert image.get_array().tolist() == accuracy.tolist() and image.get_clim() == (68, 78)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-1", "0", "+1"]
    found = {text.get_position(): text for text in axes.texts}
    assert found[2, 0].get_text() == "72.0" and found[0, 2].get_text() == "76.0", "x is to the right"
    assert to_hex(found[0, 0].get_color()) == "#000000" and to_hex(found[2, 2].get_color()) == "#ffffff"
    assert axes.yaxis_inverted(), "down is down"
    flat = plots.shift_figure(np.zeros((3, 3)), (-1, 0, 1), "t").axes[0].images[0]
    assert flat.get_clim() == (-10, 0)


def test_confusion_by_superclass_has_lines_and_group_names() -> None:
    matrix, starts = confusions(100), list(range(0, 100, 5))
    names = [f"group {index}" for index in range(20)]
    axes = plots.confusion_figure(matrix, names, starts, "t").axes[0]
    percent = 100 * matrix / matrix.sum(axis=1, keepdims=True)
    assert np.allclose(axes.images[0].get_array(), percent)
    assert len(axes.lines) == 2 * 19
    assert sorted({line.get_xdata()[0] for line in axes.lines} - {0}) == [start - 0.5 for start in starts[1:]]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert list(axes.get_yticks()) == [2 + 5 * index for index in range(20)]
    assert not axes.texts, "ten thousand numbers would be noise"


def test_small_confusion_shows_each_count_that_is_not_zero() -> None:
    matrix = confusions(20) * 100
    matrix[3] = 0  # a row without images is drawn as zero
    axes = plots.confusion_figure(matrix, [LONG] * 20, None, "t").axes[0]
    assert not axes.images[0].get_array()[3].any()
    shown = {(int(text.get_position()[1]), int(text.get_position()[0])): text for text in axes.texts}
    assert shown.keys() == {tuple(cell) for cell in np.argwhere(matrix > 0).tolist()}
    assert all(text.get_text() == f"{matrix[cell]:,}" for cell, text in shown.items())
    assert to_hex(shown[0, 0].get_color()) == "#ffffff", "black on dark blue is not legible"


@pytest.mark.parametrize("size", [20, 100])
def test_confusion_labels_are_not_clipped_and_rows_do_not_overlap(size: int) -> None:
    names = [f"{LONG}_{index}" for index in range(size)]
    figure = plots.confusion_figure(confusions(size), names, None, "t")
    figure.canvas.draw()
    rows = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    columns = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in combinations(rows, 2))
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in rows + columns)


def test_prediction_bars_are_sorted_and_the_image_is_given_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    figure = plots.prediction_figure(image, ["a", LONG * 3, "c"], np.array([0.1, 0.7, 0.2]), "photo.png")
    left, right = figure.axes
    assert np.array_equal(left.images[0].get_array(), image)
    assert left.images[0].get_interpolation() == "nearest"
    assert [bar.get_width() for bar in right.patches] == pytest.approx([70, 20, 10])
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names[1:] == ["c", "a"]
    assert names[0].endswith("…") and len(names[0]) == plots.MAX_NAME
    assert [text.get_text() for text in right.texts] == ["70.0 %", "20.0 %", "10.0 %"]
    bottom, top = right.get_ylim()
    assert bottom > top, "the most probable stands on top"


def test_hundred_classes_stand_in_columns_from_best_to_worst() -> None:
    rng = np.random.default_rng(0)
    names, values = [f"{LONG[:20]}_{n}" for n in range(100)], rng.uniform(20, 95, 100)
    values[7] = np.nan
    figure = plots.per_class_bars_figure(names, values, "F1 (%)", "t")
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
