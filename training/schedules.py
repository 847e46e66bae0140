"""Learning-rate schedules that torch does not have as one piece."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_factor(step: int, warmup: int, total: int) -> float:
    """The learning rate of batch `step` (from 0) as a fraction of its peak.

    It rises linearly over the first `warmup` batches, the last of which has the peak, and falls along half a
    cosine over the rest (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts), so that the batch
    after the last one would have 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def cosine_with_warmup(optimizer: Optimizer, warmup: int, total: int) -> LambdaLR:
    """`cosine_factor` times each group's rate; a function of the batch alone, so that it resumes exactly."""
    return LambdaLR(optimizer, lambda step: cosine_factor(step, warmup, total))
