"""A convolution that trains fast in bf16 on a CPU that is also doing something else."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.machine import cpu_flags

# Some of oneDNN's bf16 kernels for the weight gradient of a convolution make their threads wait for each
# other by spinning, image after image. Alone that costs nothing. Where another process keeps one of the cores
# busy, each wait lasts until the scheduler runs the other thread, about 4 ms (torch 2.14, two cores, batch of
# 128):
# - AVX-512 without AMX, strided 3x3: 403 ms for [128, 16, 32, 32] -> 32 channels, against 2.4 ms alone; in
#   fp32 7.6 and 2.3 ms.
# - AMX, 64 or more channels: 920 ms for the backward pass of a 3x3 convolution of [128, 64, 8, 8] to 64
#   channels, against 4.6 ms alone. ResNet-56 then trained at 8 images/s; with these gradients in fp32 at 105,
#   and alone as fast as before. The fp32 kernel is slower for the larger images of WideResNet: alone WRN-16-4
#   trains at 200 images/s instead of 280, beside a busy core at 98 instead of 11.
# To see whether a newer version still does it, profile a training step beside `python -c "while True: pass"`.
AMX_CHANNELS = 64


class Fp32WeightGradConv2d(nn.Conv2d):
    """nn.Conv2d without bias, whose weight gradient is computed in fp32 even under bf16 autocast.

    Output and input gradients stay the same bit for bit.
    """

    def forward(self, images: Tensor) -> Tensor:
        """As nn.Conv2d: [N, C, H, W] -> [N, out_channels, H / stride, W / stride], rounded up."""
        if not torch.is_grad_enabled():
            return super().forward(images)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(images, self.weight, *geometry)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
        return F.conv2d(images, weight, None, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        images, weight, *ctx.geometry = inputs
        ctx.save_for_backward(images, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        *sizes, groups = ctx.geometry

        # not in torch.nn.grad.conv2d_input's layout, which is up to ten times slower
        def backward(dtype: torch.dtype, *mask: bool) -> tuple[Tensor, Tensor, Tensor]:
            tensors = (value.to(dtype) for value in (gradient, images, weight))
            options = (*sizes, False, (0, 0), groups, (*mask, False))
            return torch.ops.aten.convolution_backward(*tensors, None, *options)

        images_gradient, _, _ = backward(gradient.dtype, True, False)
        _, weight_gradient, _ = backward(torch.float32, False, True)
        return images_gradient.to(images.dtype), weight_gradient, None, None, None, None


def use_fp32_weight_gradients(model: nn.Module, precision: str) -> None:
    """Make Fp32WeightGradConv2d of the convolutions of `model` whose bf16 weight gradients wait by spinning.

    In place: strided ones larger than 1x1, and with AMX those of 64 or more channels.

    Does nothing unless `precision` is "bf16" and the model is on a CPU. Convolutions with a bias or padding
    other than a number of zeros stay as they are.
    """
    if precision != "bf16" or next(model.parameters()).device.type != "cpu":
        return
    amx = "amx_bf16" in cpu_flags()
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.bias is not None:
            continue
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            continue
        strided = module.stride != (1, 1) and module.kernel_size != (1, 1)
        if strided or (amx and min(module.in_channels, module.out_channels) >= AMX_CHANNELS):
            module.__class__ = Fp32WeightGradConv2d  # weights, names and state_dict stay as they are
