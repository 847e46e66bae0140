"""ResNet-56 for 32x32 images and its relatives, written from scratch, and a table of them by name.

With 100 classes; MACs are multiply-adds of convolutions and linear layers for a 32x32 image:

| name             | parameters |          MACs | what it is                                       |
|------------------|------------|---------------|--------------------------------------------------|
| resnet20         |    278,324 |    40,818,944 | He et al. 2015, section 4.2, with 1x1            |
| resnet32         |    472,756 |    69,130,496 | convolution + BatchNorm on the shortcut where    |
| resnet44         |    667,188 |    97,442,048 | the shape changes (the paper's option B; its     |
| resnet56         |    861,620 |   125,753,600 | own CIFAR networks pad with zeros, option A,     |
| resnet110        |  1,736,564 |   253,155,584 | so they have 2,752 parameters fewer)             |
| se_resnet20      |    280,697 |    40,820,960 | the same with squeeze-and-excitation,            |
| se_resnet32      |    476,711 |    69,133,856 | reduction 16 (Hu et al. 2018)                    |
| se_resnet44      |    672,725 |    97,446,752 |                                                  |
| se_resnet56      |    868,739 |   125,759,648 |                                                  |
| se_resnet110     |  1,750,802 |   253,167,680 |                                                  |
| preact_resnet110 |  1,736,372 |   253,155,584 | BN and ReLU before each convolution (He 2016)    |
| wrn_16_4         |  2,772,020 |   392,635,392 | pre-activation, 4 and 10 times as wide           |
| wrn_28_10        | 36,536,884 | 5,243,386,368 | (Zagoruyko & Komodakis 2016)                     |

Every network takes normalised float images `[N, 3, H, W]`, H and W from 16 to 64, and returns
logits `[N, num_classes]`. State-dict names follow torchvision's ResNet (layer1.0.conv1.weight).
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Smallest and largest image side, pixels. At 16 the last stage still sees 4x4. Other sizes would run too,
# but are more likely a mistake in the data.
MIN_SIZE, MAX_SIZE = 16, 64


def drop_path(residual: Tensor, rate: float) -> Tensor:
    """`residual` [N, C, H, W] with each image zeroed with probability `rate`, and otherwise scaled by
    1 / (1 - rate), which keeps the mean: stochastic depth (Huang et al. 2016, arXiv 1603.09382).

    Draws N numbers from torch's global generator (of the device).
    """
    keep = 1.0 - rate
    return residual * residual.new_empty((residual.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


# In the blocks, ReLU and the sum work in place on the output of a BatchNorm or a convolution, which
# the backward pass does not read: 12 % faster per step on a CPU core, and less memory. The price:
# torch refuses a full backward hook on those inner layers, and a tensor that a forward hook keeps of
# them is overwritten. Hooks on whole blocks are unaffected.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, ReLU after the sum (He et al. 2015, 1512.03385).

    [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride], rounded up. `drop_path` is
    the probability that an image skips the two convolutions in training.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = self.se = None
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.se is not None:
            out = self.se(out)
        if self.drop_path > 0 and self.training:
            out = drop_path(out, self.drop_path)
        # assigned, since torch.fx drops a call whose result is not used
        out = out.add_(x if self.downsample is None else self.downsample(x))
        return F.relu(out, inplace=True)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from all channel means (arXiv 1709.01507).

    [N, C, H, W] -> the same shape.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x.mean((2, 3))), inplace=True)
        return x * torch.sigmoid(self.fc2(hidden))[:, :, None, None]


class SEBasicBlock(BasicBlock):
    """BasicBlock with squeeze-and-excitation at the end of the residual branch."""

    def __init__(self, in_channels: int, out_channels: int, *args: float) -> None:
        super().__init__(in_channels, out_channels, *args)
        self.se = SqueezeExcitation(out_channels)


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, beside a shortcut that nothing follows (arXiv 1603.05027).

    Shapes as BasicBlock. Where the shape changes, the shortcut is a bare 1x1 convolution of the
    activated input; elsewhere it is the raw input. `dropout` is the rate between the convolutions
    (Zagoruyko & Komodakis 2016, arXiv 1605.07146).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, drop_path: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.dropout = float(dropout)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        out = F.relu(self.bn2(self.conv1(active)), inplace=True)
        if self.dropout > 0 and self.training:
            out = F.dropout(out, self.dropout)
        out = self.conv2(out)
        if self.drop_path > 0 and self.training:
            out = drop_path(out, self.drop_path)
        return out.add_(x if self.downsample is None else self.downsample(active))


class ResNet(nn.Module):
    """A 16-channel stem, three stages of blocks at 1, 1/2 and 1/4 of the image size, pool, linear.

    Normalised float images [N, 3, H, W] -> logits [N, num_classes]. The stages are 16, 32 and 64
    channels wide, times `widen`. Block i of L drops its branch at rate `drop_path * i / L` (linear
    in depth, as Huang et al. advise). Convolutions start from Kaiming normal (fan_out, relu),
    BatchNorm from 1 and 0, the last layer from normal(0, 0.01) and bias 0, so that the first loss is near
    ln(num_classes), and the linear layers of squeeze-and-excitation from torch's Kaiming uniform and bias 0.

    Raises:
        ValueError: (forward) images of another rank, channel count or size.
    """

    name = "this network"  # build_model puts its name in MODELS here

    def __init__(
        self,
        block: type[BasicBlock] | type[PreActBlock],
        blocks_per_stage: int,
        *,
        widen: int = 1,
        num_classes: int = 100,
        zero_init_residual: bool = False,
        drop_path: float = 0.0,
        **block_options: float,
    ) -> None:
        super().__init__()
        self.pre_activation = block is PreActBlock
        self.conv1 = _conv3x3(3, 16)
        # Pre-activation blocks normalise their own input: the one BatchNorm outside comes last.
        self.bn1 = nn.BatchNorm2d(64 * widen if self.pre_activation else 16)
        channels, blocks, n = 16, [], blocks_per_stage
        for stage, index in itertools.product(range(3), range(n)):
            width, stride = 16 * widen * 2**stage, 2 if stage > 0 and index == 0 else 1
            rate = drop_path * (stage + (index + 1) / n) / 3
            blocks.append(block(channels, width, stride, rate, **block_options))
            channels = width
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*blocks[i : i + n]) for i in (0, n, 2 * n))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc.weight, std=0.01)
        if zero_init_residual:  # each block starts as its shortcut alone (Goyal et al. 2017, 1706.02677)
            for module in blocks:
                nn.init.zeros_(module.conv2.weight if self.pre_activation else module.bn2.weight)

    def forward(self, images: Tensor) -> Tensor:
        # Recorded graphs go without the check: torch.fx passes a Proxy, whose shape is unknown, and
        # torch.jit.trace would keep the answer for its example. TorchScript does not compile the branch.
        if not torch.jit.is_scripting() and not torch.jit.is_tracing() and isinstance(images, Tensor):
            self._check_shape(images.shape)
        x = self.conv1(images)
        if not self.pre_activation:
            x = F.relu(self.bn1(x), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))  # [N, 64 * widen, H / 4, W / 4], rounded up
        if self.pre_activation:
            x = F.relu(self.bn1(x), inplace=True)
        return self.fc(self.avgpool(x).flatten(1))

    def _check_shape(self, shape: torch.Size) -> None:
        if len(shape) != 4 or shape[1] != 3 or not all(MIN_SIZE <= side <= MAX_SIZE for side in shape[2:]):
            raise ValueError(
                f"{self.name} takes images [N, 3, H, W] with H, W from {MIN_SIZE} to {MAX_SIZE}; "
                f"got {list(shape)}"
            )


# A depth of 6n + 2 counts the stem, three stages of n blocks of two convolutions, and the linear layer; the
# wide networks' 6n + 4 counts the three 1x1 shortcuts too.
DEPTHS = (20, 32, 44, 56, 110)
MODELS: dict[str, partial[ResNet]] = {
    **{f"resnet{depth}": partial(ResNet, BasicBlock, (depth - 2) // 6) for depth in DEPTHS},
    **{f"se_resnet{depth}": partial(ResNet, SEBasicBlock, (depth - 2) // 6) for depth in DEPTHS},
    "preact_resnet110": partial(ResNet, PreActBlock, (110 - 2) // 6),
    "wrn_16_4": partial(ResNet, PreActBlock, (16 - 4) // 6, widen=4),
    "wrn_28_10": partial(ResNet, PreActBlock, (28 - 4) // 6, widen=10),
}


def model_options(name: str) -> tuple[str, ...]:
    """The options that `build_model(name, ...)` takes beside num_classes.

    Raises:
        ValueError: no network has this name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(MODELS)}")
    return ("zero_init_residual", "drop_path") + ("dropout",) * name.startswith("wrn")


def build_model(name: str = "resnet56", num_classes: int = 100, **options: float) -> nn.Module:
    """A freshly initialised network in training mode, on torch's default device.

    Options: zero_init_residual (bool), drop_path (rate in [0, 1) of the last block), and for the
    wrn networks dropout (rate in [0, 1)). Weights are drawn from torch's global generator.

    Raises:
        ValueError: unknown name or option, a rate outside [0, 1), fewer than one class.
    """
    takes = model_options(name)
    for key, value in options.items():
        if key not in takes:
            raise ValueError(f"{name} does not take the option {key}; it takes {', '.join(takes)}")
        if key != "zero_init_residual" and not 0.0 <= value < 1.0:
            raise ValueError(f"{key} must be at least 0 and below 1; got {value}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    model = MODELS[name](num_classes=num_classes, **options)
    model.name = name
    return model


def count_parameters(model: nn.Module) -> int:
    """The number of trainable values in `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module) -> int:
    """Multiply-adds of all convolutions and linear layers for one image [3, 32, 32].

    The pass runs on the meta device through stand-ins for the weights: it computes and draws
    nothing, and leaves weights, BatchNorm statistics, training flags and hooks as they were.
    """
    state = {name: torch.empty_like(value, device="meta") for name, value in model.state_dict().items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, state, (torch.empty(1, 3, 32, 32, device="meta"),))
    return counter.get_total_flops() // 2  # a multiply-add is two operations
