"""A strided convolution that trains fast in bf16 on a CPU that is also doing something else."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN's bf16 kernel for the weight gradient of a strided 3x3 convolution makes its threads wait for each
# other by spinning (torch 2.14, oneDNN 3.x, AVX-512). Beside another training process, on two cores, it took
# 403 ms for [128, 16, 32, 32] -> 32 channels, against 2.4 ms alone; in fp32 it takes 7.6 and 2.3 ms. Strided
# 1x1 convolutions are not affected. To see whether a newer version still does it, time it beside a second
# process that trains:
#     torch.ops.aten.convolution_backward(gradient, images, weight, None, [2, 2], [1, 1], [1, 1], False,
#                                         [0, 0], 1, [False, True, False])


class StridedConv2d(nn.Conv2d):
    """nn.Conv2d, except that under bf16 autocast the gradient of its weights is computed in fp32.

    Output and input gradients stay the same bit for bit.
    """

    def forward(self, images: Tensor) -> Tensor:
        """As nn.Conv2d: [N, C, H, W] -> [N, out_channels, H / stride, W / stride], rounded up."""
        if not torch.is_grad_enabled():
            return super().forward(images)
        return _StridedConvolution.apply(images, self.weight, self.stride, self.padding)


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv2d(images, weight, None, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        images, weight, *ctx.geometry = inputs
        ctx.save_for_backward(images, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        images, weight = ctx.saved_tensors
        # not in torch.nn.grad.conv2d_input's layout, which is up to ten times slower

        def backward(dtype: torch.dtype, *mask: bool) -> tuple[Tensor, Tensor, Tensor]:
            tensors = (value.to(dtype) for value in (gradient, images, weight))
            options = (*ctx.geometry, (1, 1), False, (0, 0), 1, (*mask, False))
            return torch.ops.aten.convolution_backward(*tensors, None, *options)

        images_gradient, _, _ = backward(gradient.dtype, True, False)
        _, weight_gradient, _ = backward(torch.float32, False, True)
        return images_gradient.to(images.dtype), weight_gradient, None, None


def use_fp32_weight_gradients(model: nn.Module, precision: str) -> None:
    """Turn the strided convolutions of `model` that are larger than 1x1 into StridedConv2d, in place.

    Does nothing unless `precision` is "bf16" and the model is on a CPU.
    """
    if precision != "bf16" or next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and module.stride != (1, 1) and module.kernel_size != (1, 1):
            module.__class__ = StridedConv2d  # weights, names and state_dict stay as they are
