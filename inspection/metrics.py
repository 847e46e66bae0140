"""Classification metrics: accuracies, loss, calibration, confusions, confident mistakes, paired comparisons.

Pure functions on NumPy arrays: N images, K classes, labels from 0. Accuracies, precision, recall and F1 are
in percent; confidences, probabilities and the calibration error are fractions from 0 to 1.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CALIBRATION_BINS = 15  # as in Guo et al. 2017, so that results compare
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence against accuracy, in B bins of equal width.

    `edges` is [B + 1] from 0 to 1; `accuracy` and `confidence` [B] are means over the bin's images (NaN for
    an empty bin), `counts` [B] the number of its images. `ece`, the expected calibration error, is the mean
    absolute difference of the two, weighted by the counts.
    """

    edges: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    counts: np.ndarray
    ece: float


@dataclass(frozen=True, eq=False)
class Scores:
    """The metrics of one pass over N images; `loss` is in nats per image."""

    images: int
    top1_percent: float
    top5_percent: float
    superclass_percent: float
    loss: float
    calibration: Calibration


class ClassScores(NamedTuple):
    """Per class, float64 [K] each, in percent, NaN where undefined. `images` is int64 [K]."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    images: np.ndarray


class ConfusedPair(NamedTuple):
    """Two classes, and how many images of each were predicted as the other."""

    first: int
    second: int
    first_as_second: int
    second_as_first: int

    @property
    def total(self) -> int:
        """Images of either class predicted as the other."""
        return self.first_as_second + self.second_as_first


class PairedTest(NamedTuple):
    """Classifier A against classifier B on the same N images.

    `gained` images are classified correctly by A alone, `lost` ones by B alone. The difference is A's
    accuracy minus B's, in percentage points; its standard error is that of a mean of N paired differences.
    `p_value` is of McNemar's exact test.
    """

    gained: int
    lost: int
    difference_percent: float
    standard_error_percent: float
    p_value: float


class RiskCoverage(NamedTuple):
    """Selective prediction: only the most confident predictions are made, the other images are rejected.

    `coverage_percent`, float64 [N], is the percentage of images that is not rejected, `risk_percent` [N] the
    percentage of those that is misclassified. `area_percent` (AURC) is the mean risk over the N coverages.
    """

    coverage_percent: np.ndarray
    risk_percent: np.ndarray
    area_percent: float


def score(logits: np.ndarray, labels: np.ndarray, superclass_of: np.ndarray) -> Scores:
    """All metrics of float [N, K] logits (or log-probabilities) and int [N] labels.

    Args:
        superclass_of: int [K], from class to superclass.
    """
    predictions = logits.argmax(axis=1)
    log_probabilities = log_softmax(logits)
    confidence = np.exp(log_probabilities.max(axis=1))
    return Scores(
        images=len(labels),
        top1_percent=top_k_percent(logits, labels, 1),
        top5_percent=top_k_percent(logits, labels, 5),
        superclass_percent=percent(superclass_of[predictions] == superclass_of[labels]),
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        calibration=calibrate(confidence, predictions == labels),
    )


def percent(hits: np.ndarray) -> float:
    """The percentage of true values in bool [N]: 100 * hits / N, as everywhere in this project.

    NaN for N = 0.
    """
    return 100 * int(np.count_nonzero(hits)) / len(hits) if len(hits) else math.nan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis, float64 of the same shape; cannot overflow."""
    shifted = np.subtract(logits, logits.max(axis=-1, keepdims=True), dtype=np.float64)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top_k_percent(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The percentage of labels among the k largest logits; of equal logits the lower class comes first,
    so that k = 1 agrees with argmax."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    lower = np.arange(logits.shape[1]) < labels[:, None]
    before = (logits > own) | ((logits == own) & lower)
    return percent(before.sum(axis=1) < k)


def calibrate(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> Calibration:
    """Expected calibration error over `bins` bins of equal width (Guo et al. 2017, arXiv:1706.04599).

    A bin holds the confidences above its lower edge, up to and including its upper edge.

    Args:
        confidence: float [N], the probability of the predicted class.
        correct: bool [N].
    """
    edges = np.arange(bins + 1) / bins
    where = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(where, minlength=bins)
    hits = np.bincount(where, weights=correct, minlength=bins)
    sums = np.bincount(where, weights=confidence, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: an empty bin has no mean
        accuracy, mean_confidence = hits / counts, sums / counts
    ece = float(np.abs(hits - sums).sum() / len(confidence))
    return Calibration(edges, accuracy, mean_confidence, counts, ece)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """int64 [K, K]: images of each true class (row) by predicted class (column)."""
    cells = labels * classes + predictions
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def superclass_matrix(matrix: np.ndarray, superclass_of: np.ndarray, superclasses: int) -> np.ndarray:
    """The confusion matrix of superclasses [S, S] from that of classes [K, K]."""
    member = np.eye(superclasses, dtype=np.int64)[superclass_of]  # [K, S]
    return member.T @ matrix @ member


def superclass_order(superclass_of: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The classes grouped by superclass, and where in that order each superclass begins.

    Within a superclass they keep their order; a superclass without classes is left out.
    """
    order = np.argsort(superclass_of, kind="stable")
    return order, np.flatnonzero(np.diff(superclass_of[order], prepend=-1)).tolist()


def per_class(matrix: np.ndarray) -> ClassScores:
    """Precision, recall and F1 of each class of a confusion matrix.

    Precision is NaN for a class never predicted, recall for one without images, F1 for one with neither.
    """
    right, images, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        precision, recall = 100 * right / predicted, 100 * right / images
        f1 = 100 * 2 * right / (images + predicted)
    return ClassScores(precision, recall, f1, images)


def most_confused(matrix: np.ndarray, count: int) -> list[ConfusedPair]:
    """The pairs of classes confused most often, in either direction; at most `count`.

    Sorted by the sum of both directions, then by class. Within a pair, `first` is the class that is
    misclassified more often.
    """
    both = np.triu(matrix + matrix.T, k=1)
    rows, columns = np.nonzero(both)
    order = np.argsort(-both[rows, columns], kind="stable")[:count]
    pairs = []
    for a, b in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if matrix[b, a] > matrix[a, b]:
            a, b = b, a
        pairs.append(ConfusedPair(a, b, int(matrix[a, b]), int(matrix[b, a])))
    return pairs


def confidently_wrong(logits: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The indices of the most confident wrong predictions, most confident first: int64 [<= count]."""
    wrong = np.flatnonzero(logits.argmax(axis=1) != labels)
    confidence = log_softmax(logits[wrong]).max(axis=1, initial=-np.inf)
    return wrong[np.argsort(-confidence, kind="stable")[:count]]


def paired_test(correct_a: np.ndarray, correct_b: np.ndarray) -> PairedTest:
    """Compare two classifiers by bool [N] each, whether they classify an image correctly (N > 0)."""
    count = len(correct_a)
    gained = int(np.count_nonzero(correct_a & ~correct_b))
    lost = int(np.count_nonzero(correct_b & ~correct_a))
    # the standard deviation of N differences of 1, -1 or 0, over the root of N
    error = math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
    return PairedTest(gained, lost, 100 * (gained - lost) / count, 100 * error, mcnemar_p(gained, lost))


def mcnemar_p(gained: int, lost: int) -> float:
    """The two-sided p-value of McNemar's exact test, whose null hypothesis is that both are equally likely.

    Twice the smaller binomial tail with probability 1/2, at most 1. The tail is summed in whole numbers and
    divided at the end, so that neither many images nor a tiny p-value lose accuracy.
    """
    count = gained + lost
    tail, term = 0, 1  # term: `count` choose `k`
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (count - k) // (k + 1)
    return min(1.0, 2 * tail / 2**count)


def risk_coverage(logits: np.ndarray, labels: np.ndarray) -> RiskCoverage:
    """Risk against coverage by the confidence of the prediction; images of equal confidence stay in order.

    Geifman et al. 2019 (arXiv:1805.08206).
    """
    order = np.argsort(-log_softmax(logits).max(axis=1), kind="stable")
    kept = np.arange(1, len(labels) + 1)
    risk = 100 * np.cumsum((logits.argmax(axis=1) != labels)[order]) / kept
    return RiskCoverage(100 * kept / len(labels), risk, float(risk.mean()))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the cross-entropy of logits / T (Guo et al. 2017); 1 for no images.

    It is from MIN_TEMPERATURE to MAX_TEMPERATURE. The loss is convex in 1 / T, so that bisection finds where
    its derivative, the expected logit minus the label's, changes sign.
    """
    if not len(labels):
        return 1.0
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels].sum()
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(40):
        middle = (low + high) / 2
        probabilities = np.exp(log_softmax(logits / math.exp(middle)))
        too_sharp = (probabilities * logits).sum() > own
        low, high = (middle, high) if too_sharp else (low, middle)
    return math.exp(middle)


def cross_fit_temperature(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Temperature scaling by two-fold cross-fitting: scaled logits, float64 [N, K], and both temperatures.

    Each random half is divided by the temperature fitted on the other half, so that no image has a part in
    choosing its own temperature.
    """
    half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
    scaled = np.empty(logits.shape)
    temperatures = []
    for fold in (half, ~half):
        temperatures.append(fit_temperature(logits[~fold], labels[~fold]))
        scaled[fold] = logits[fold] / temperatures[-1]
    return scaled, tuple(temperatures)
