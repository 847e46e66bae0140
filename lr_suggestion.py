"""What a learning-rate range test says: the smoothed loss, and the rate that it suggests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The suggestion is the default unless the smoothed loss fell by this share, and lies between these rates:
# below, a fresh network's loss falls steeply too, as its last layer unlearns its random start, but SGD
# would crawl.
MIN_FALL = 0.02
LR_BOUNDS = (0.01, 0.3)
# Batch noise decides where in a flat valley the lowest point lies; so the valley counts as low as far as the
# smoothed loss stays within this share of its fall, and the fallback starts from the valley's far end.
VALLEY = 0.05
DEFAULT_LR = 0.1


@dataclass(frozen=True)
class LRFinderResult:
    """A learning-rate range test: rates, losses in nats an image (raw and smoothed), what they suggest."""

    learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggested_lr: float
    method: str

    @property
    def summary(self) -> str:
        """One line: the suggestion, how it was found, and the range of losses."""
        curve = self.smoothed
        lowest = min(filter(math.isfinite, curve), default=math.nan)
        return (
            f"LR finder: suggested LR {self.suggested_lr:.2e} ({self.method}); loss {curve[0]:.2f} -> "
            f"{lowest:.2f} (lowest) -> {curve[-1]:.2f} (last), smoothed, over learning rates "
            f"{self.learning_rates[0]:.0e} to {self.learning_rates[-1]:.2g}"
        )


def smooth(losses: Sequence[float]) -> np.ndarray:
    """`losses` averaged over a centred Gaussian window of about a tenth of the points; float64."""
    values = np.asarray(losses, dtype=np.float64)
    sigma = max(1.0, len(values) / 40)
    offsets = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    window = np.exp(-0.5 * (offsets / sigma) ** 2)
    half = len(offsets) // 2

    def mean_at(index: int) -> float:
        first, last = max(0, index - half), min(len(values), index + half + 1)
        weights = window[first - index + half : last - index + half]
        return float(weights @ values[first:last] / weights.sum())

    return np.array([mean_at(index) for index in range(len(values))])


def suggest_lr(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """The learning rate that a range test suggests, and the method that found it.

    Steepest descent of the smoothed loss over the logarithm of the rate; where that lies outside
    LR_BOUNDS, a tenth of the highest rate at which the loss is as good as lowest (VALLEY); where that does
    too, or the loss is not finite or never fell by MIN_FALL, DEFAULT_LR, with the reason as the method.
    """
    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(np.argmin(finite))
    if count < 10:
        return DEFAULT_LR, "the default: the loss was NaN or infinite almost at once"
    curve = smooth(losses[:count])
    lowest = int(np.argmin(curve))
    if curve[0] - curve[lowest] < MIN_FALL * abs(curve[0]):
        return DEFAULT_LR, "the default: the loss never fell"
    low, high = LR_BOUNDS
    slope = np.gradient(curve[: lowest + 1], np.log10(rates[: lowest + 1]))
    steepest = float(rates[int(np.argmin(slope))])
    if low <= steepest <= high:
        return steepest, "steepest descent of the smoothed loss"
    deep = curve[lowest] + VALLEY * (curve[0] - curve[lowest])
    fallback = float(rates[int(np.flatnonzero(curve <= deep)[-1])]) / 10
    if low <= fallback <= high:
        return fallback, "fallback: highest rate at the lowest loss / 10"
    return DEFAULT_LR, f"the default: {steepest:.1e} and {fallback:.1e} lie outside {low:g} to {high:g}"
