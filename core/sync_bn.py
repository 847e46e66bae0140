"""BatchNorm over the images of all processes, for processors that torch's SyncBatchNorm refuses (it is CUDA
only). Parameters, buffers and state-dict names are those of BatchNorm2d.

Backward formulas: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3, with sums over all processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the global batch.

    Input and output: float [N, C, H, W]; N may differ between the processes. In evaluation, and where no
    process group is up, it is `nn.BatchNorm2d`.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(images)
        count, mean, variance = _global_moments(images.detach())
        if count < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {list(images.shape)}"
            )
        if self.track_running_stats:
            self._update_running(mean, variance * (count / (count - 1)))  # the unbiased one, as BatchNorm2d
        return _Normalise.apply(images, self.weight, self.bias, mean, variance, count, self.eps)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the cumulative average
            momentum = 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def _global_moments(images: Tensor) -> tuple[int, Tensor, Tensor]:
    """Values a channel over all processes, and their mean and biased variance: [C] each, at least float32.

    The sums cross processes as float64, so that E[x^2] - E[x]^2 cancels harmlessly.
    """
    local = images.numel() // images.shape[1]
    variance, mean = torch.var_mean(images.to(_statistics_dtype(images)), (0, 2, 3), correction=0)
    variance, mean = variance.double(), mean.double()
    sums = torch.cat([local * mean, local * (variance + mean * mean), mean.new_tensor([local])])
    dist.all_reduce(sums)
    count = int(sums[-1])
    mean, square = (sums[:-1] / count).chunk(2)
    variance = (square - mean * mean).clamp_(min=0)
    dtype = _statistics_dtype(images)
    return count, mean.to(dtype), variance.to(dtype)


def _statistics_dtype(images: Tensor) -> torch.dtype:
    """float32 for float32, and for the half precisions of autocast."""
    return torch.promote_types(images.dtype, torch.float32)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias; mean and variance depend on every process's x."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: int,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(images, weight, mean, variance)
        ctx.count, ctx.eps = count, eps
        return nn.functional.batch_norm(images, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, mean, variance = ctx.saved_tensors
        inverse = torch.rsqrt(variance + ctx.eps)
        # this process's sums over N, H, W of gradient * normalised input, and of gradient
        _, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, images, weight, mean, variance, mean, inverse, False, ctx.eps, [False, True, True]
        )
        sums = torch.cat([for_weight, for_bias])
        dist.all_reduce(sums)
        of_product, of_gradient = (sums / ctx.count).chunk(2)
        # weight * inverse * (gradient - of_gradient - normalised * of_product), as a * gradient + b * x + c
        a = weight * inverse
        b = -a * inverse * of_product
        c = -a * of_gradient - b * mean
        a, b, c = (values[:, None, None] for values in (a, b, c))
        for_images = torch.addcmul(c, gradient, a).addcmul_(images, b)
        return for_images.to(images.dtype), for_weight, for_bias, None, None, None, None


def convert(model: nn.Module) -> nn.Module:
    """`model` with each BatchNorm2d in it replaced by a SyncBatchNorm2d of the same tensors, in place."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            twin = SyncBatchNorm2d(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            for key, tensor in (child._parameters | child._buffers).items():
                setattr(twin, key, tensor)  # the very tensors: an optimizer may hold them
            setattr(model, name, twin.train(child.training))
        else:
            convert(child)
    return model
