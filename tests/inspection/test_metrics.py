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


def test_paired_test_of_a_small_case_worked_out_by_hand() -> None:
    first, second = np.array([[1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]], dtype=bool)
    found = m.paired_test(first, second)
    assert (found.gained, found.lost, found.p_value) == (3, 1, 2 * (1 + 4) / 16)
    assert found.difference_percent == pytest.approx(100 * 2 / 6)
    assert found.standard_error_percent == pytest.approx(100 * math.sqrt(4 - 2 * 2 / 6) / 6)
    assert found.standard_error_percent == pytest.approx(100 * np.std([0, 1, 1, -1, 0, 1]) / math.sqrt(6))
    back = m.paired_test(second, first)
    assert back.difference_percent == -found.difference_percent and back.p_value == found.p_value
    assert m.paired_test(first, first) == (0, 0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (5, 0, 2 / 32),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (7, 7, 1.0),
        (1000, 0, 2.0**-999),
        (4, 1000, 2.0**-1003 * sum(math.comb(1004, k) for k in range(5))),
        (9000, 0, 0.0),  # less than any number
    ],
)
def test_mcnemars_p_is_twice_the_binomial_tail(gained: int, lost: int, p: float) -> None:
    assert m.mcnemar_p(gained, lost) == m.mcnemar_p(lost, gained) == pytest.approx(p, rel=1e-14)


def test_mcnemars_p_of_thousands_of_images_approaches_the_normal_distributions() -> None:
    z = (5_200 - 4_800 - 1) / math.sqrt(10_000)  # with Yates's correction
    assert m.mcnemar_p(4_800, 5_200) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def test_risk_at_each_coverage_of_a_small_case_worked_out_by_hand() -> None:
    """By confidence: images 3 (right), 2 (wrong), 0 (right), 1 and 4 (wrong)."""
    found = m.risk_coverage(LOGITS, LABELS)
    assert found.coverage_percent.tolist() == [20, 40, 60, 80, 100]
    risks = [0, 50, 100 / 3, 50, 60]
    assert found.risk_percent == pytest.approx(risks)
    assert found.area_percent == pytest.approx(sum(risks) / 5)


def test_fitted_temperature_makes_the_confidence_the_accuracy() -> None:
    """Logits (6, 0) for four images, three of the first class: exp(6 / T) is 3 at the minimum."""
    logits, labels = np.tile(np.float32([6, 0]), (4, 1)), np.array([0, 0, 1, 0])
    assert m.fit_temperature(logits, labels) == pytest.approx(6 / math.log(3), rel=1e-9)
    assert m.fit_temperature(1e4 * logits, np.ones(4, dtype=int)) == pytest.approx(m.MAX_TEMPERATURE)
    assert m.fit_temperature(logits, np.zeros(4, dtype=int)) == pytest.approx(m.MIN_TEMPERATURE)
    assert m.fit_temperature(logits[:0], labels[:0]) == 1


def test_no_image_has_a_part_in_its_own_temperature() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (400, 5)).astype(np.float32), rng.integers(0, 5, 400)
    labels[:200] = logits[:200].argmax(axis=1)
    scaled, temperatures = m.cross_fit_temperature(logits, labels)
    used = (logits / scaled).mean(axis=1)
    first = np.isclose(used, temperatures[0])
    assert first.sum() == 200 and np.allclose(used[~first], temperatures[1])
    assert temperatures[0] == m.fit_temperature(logits[~first], labels[~first])
    assert temperatures[1] == m.fit_temperature(logits[first], labels[first])
    changed = np.where(first, logits.argmax(axis=1), labels)
    _, others = m.cross_fit_temperature(logits, changed)
    assert others[0] == temperatures[0] and others[1] < temperatures[1]
    assert m.cross_fit_temperature(logits[:1], labels[:1])[0].shape == (1, 5)
