"""Classification metrics: small cases worked out by hand, and plain loops as a second opinion."""

import itertools
import math

import numpy as np
import pytest

from inspection import metrics as m

# Four classes under two superclasses; the largest logits: 0, 1, 3, 2, 0 for labels 0, 0, 2, 2, 3.
SUPERCLASS_OF = np.array([0, 0, 1, 1])
LABELS = np.array([0, 0, 2, 2, 3])
LOGITS = np.array(
    [[3.0, 1, 0, 0], [1, 2, 0, -1], [0, 0, 1, 4], [-1, 0, 5, 1], [2, 1.5, 1, 0]], dtype=np.float32
)
MATRIX = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]])


def test_scores_of_a_small_case_worked_out_by_hand() -> None:
    scores = m.score(LOGITS, LABELS, SUPERCLASS_OF)
    assert (scores.images, scores.top1_percent) == (5, 40.0)
    assert scores.superclass_percent == 80.0, "images 0 to 3 stay within their superclass"
    assert scores.top5_percent == 100.0, "there are four classes only"
    rows = [[math.exp(value) for value in row] for row in LOGITS.tolist()]
    losses = [-math.log(row[label] / sum(row)) for row, label in zip(rows, LABELS, strict=True)]
    assert scores.loss == pytest.approx(sum(losses) / 5, rel=1e-12)
    sure = [max(row) / sum(row) for row in rows]
    # 0.83, 0.66, 0.93, 0.97, 0.48: bins 12, 9, 13, 14 and 7 of 15, one image each
    right = [1, 0, 0, 1, 0]
    ece = sum(abs(s - r) for s, r in zip(sure, right, strict=True)) / 5
    assert scores.calibration.ece == pytest.approx(ece, rel=1e-12)
    assert scores.calibration.counts.nonzero()[0].tolist() == [7, 9, 12, 13, 14]


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_top_k_is_a_stable_sort_of_the_logits(k: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (300, 12)).round(1), rng.integers(0, 12, 300)  # rounded: ties occur
    pairs = zip(logits, labels, strict=True)
    hits = sum(label in np.argsort(-row, kind="stable")[:k] for row, label in pairs)
    assert m.top_k_percent(logits, labels, k) == 100 * hits / len(labels)
    assert m.top_k_percent(np.zeros((4, 12)), np.arange(4), k) == min(25.0 * k, 100), "equal logits"


def test_log_softmax_survives_huge_logits() -> None:
    huge = m.log_softmax(np.array([[1e30, 0.0], [-1e30, -1e30]]))
    assert huge.tolist() == [[0.0, -1e30], [-math.log(2)] * 2]
    assert m.log_softmax(huge).tolist() == huge.tolist(), "log-probabilities are logits too"


def test_calibration_bins_hold_their_upper_edge_and_empty_ones_have_no_mean() -> None:
    confidence = np.array([0.0, 0.5, 0.5000001, 1.0])
    found = m.calibrate(confidence, np.array([False, True, False, True]), bins=2)
    assert found.edges.tolist() == [0, 0.5, 1]
    assert found.counts.tolist() == [2, 2]
    assert found.accuracy.tolist() == [0.5, 0.5]
    assert found.confidence == pytest.approx([0.25, 0.75], abs=1e-6)
    assert found.ece == pytest.approx(0.25, abs=1e-6)
    perfect = m.calibrate(np.full(4, 0.75), np.array([True, True, True, False]), bins=4)
    assert perfect.ece == 0
    assert np.isnan(perfect.accuracy).tolist() == [True, True, False, True]


def test_calibration_error_is_the_definition_of_guo_et_al() -> None:
    rng = np.random.default_rng(1)
    confidence = np.append(rng.uniform(0.2, 1, 500), np.arange(16) / 15)
    correct = rng.uniform(size=516) < confidence**2
    total = 0.0
    for low, high in itertools.pairwise(np.arange(16) / 15):
        inside = (low < confidence) & (confidence <= high) | ((confidence == 0) & (low == 0))
        total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    found = m.calibrate(confidence, correct)
    assert found.ece == pytest.approx(total, rel=1e-9)
    assert found.counts.sum() == 516
    assert total > 0.1, "these answers are overconfident by construction"


def test_confusion_matrix_has_the_truth_in_rows() -> None:
    assert np.array_equal(m.confusion_matrix(LABELS, LOGITS.argmax(axis=1), 4), MATRIX)
    assert m.superclass_matrix(MATRIX, SUPERCLASS_OF, 2).tolist() == [[2, 0], [1, 2]]


def test_per_class_scores_of_a_small_case_with_what_is_not_defined() -> None:
    scores = m.per_class(MATRIX)
    assert scores.images.tolist() == [2, 0, 2, 1]
    np.testing.assert_allclose(scores.precision, [50, 0, 100, 0])
    np.testing.assert_allclose(scores.recall, [50, np.nan, 50, 0])
    np.testing.assert_allclose(scores.f1, [50, 0, 200 / 3, 0])
    nothing = m.per_class(np.array([[3, 0], [0, 0]]))
    assert np.isnan([nothing.precision[1], nothing.recall[1], nothing.f1[1]]).all()


def test_superclass_order_keeps_classes_together_and_in_their_order() -> None:
    order, starts = m.superclass_order(np.array([2, 0, 2, 1, 0]))
    assert order.tolist() == [1, 4, 3, 0, 2]
    assert starts == [0, 2, 3]


def test_confused_pairs_add_both_directions_and_name_the_worse_first() -> None:
    matrix = np.array([[9, 1, 0, 2], [5, 9, 3, 0], [0, 3, 9, 0], [2, 0, 0, 9]])
    pairs = m.most_confused(matrix, 10)
    assert [(p.first, p.second, p.first_as_second, p.second_as_first, p.total) for p in pairs] == [
        (1, 0, 5, 1, 6),
        (1, 2, 3, 3, 6),
        (0, 3, 2, 2, 4),
    ]
    assert m.most_confused(matrix, 1) == pairs[:1]
    assert m.most_confused(np.diag([1, 2]), 5) == []


def test_confidently_wrong_images_are_wrong_and_sorted() -> None:
    assert m.confidently_wrong(LOGITS, LABELS, 9).tolist() == [2, 1, 4]
    assert m.confidently_wrong(LOGITS, LABELS, 2).tolist() == [2, 1]
    assert m.confidently_wrong(LOGITS, LOGITS.argmax(axis=1), 2).tolist() == []
