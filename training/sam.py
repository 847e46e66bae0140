"""What is done to gradients between the backward pass and the optimizer's step: SAM, clipping.

Each is called with a function that computes the batch's gradients once more, from the weights as they are.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# The radius that the papers found best for CIFAR-100.
SAM_RHO = {"sam": 0.1, "asam": 1.0}
# ASAM's scale of a weight is |w| plus this.
ASAM_ETA = 0.01


class SharpnessAware:
    """SAM (Foret et al. 2021, arXiv:2010.01412) and ASAM (Kwon et al. 2021, arXiv:2102.11600).

    The gradients are replaced by those at the point w + e, a step of length `rho` uphill:
    e = rho g / |g|, or, adaptive, e = rho T^2 g / |T g| with T = |w| + 0.01 for weights and 1 for biases, as
    in the authors' code. The weights are then put back bit for bit. BatchNorm's running statistics are those
    of the first pass alone. With several processes g is the mean over all of them, so that e is one and the
    same; the papers let each process climb its own way.
    """

    def __init__(self, model: nn.Module, rho: float, *, adaptive: bool = False) -> None:
        self.model, self.rho, self.adaptive = model, rho, adaptive

    @torch.no_grad()
    def __call__(self, again: Callable[[], object]) -> None:
        named = [(name, value) for name, value in self.model.named_parameters() if value.grad is not None]
        weights = [value for _, value in named]
        uphill = [value.grad.clone() for value in weights]
        if self.adaptive:
            scales = [v.abs() + ASAM_ETA if n.endswith("weight") else torch.ones_like(v) for n, v in named]
            torch._foreach_mul_(uphill, scales)
        norm = torch.stack(torch._foreach_norm(uphill)).norm()
        if self.adaptive:
            torch._foreach_mul_(uphill, scales)
        torch._foreach_mul_(uphill, self.rho / (norm + 1e-12))
        before = [value.clone() for value in weights]
        torch._foreach_add_(weights, uphill)
        with torch.enable_grad(), frozen_statistics(self.model):
            again()
        torch._foreach_copy_(weights, before)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm normalises by the batch, as in training, but its running statistics stay."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True


class Clip:
    """Scale the whole gradient down to the norm `limit` where it is longer."""

    def __init__(self, model: nn.Module, limit: float) -> None:
        self.model, self.limit = model, limit

    def __call__(self, again: Callable[[], object]) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
