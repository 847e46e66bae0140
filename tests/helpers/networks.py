"""Networks for the tests of model.py, and what they have in common."""

import torch

from model import build_model

SMALL_OF_EACH_FAMILY = ["resnet20", "se_resnet20", "preact_resnet110", "wrn_16_4"]


def on_meta(name, num_classes=100, **options):
    """The network without memory or arithmetic."""
    with torch.device("meta"):
        return build_model(name, num_classes, **options)


def blocks_of(model):
    return [*model.layer1, *model.layer2, *model.layer3]


def seeded(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_model(name, **options)


def shortcut_alone(block, x):
    """What the block gives when its residual branch is zero."""
    if block.pre_activation:
        active = torch.relu(block.bn1(x))
        return x if block.downsample is None else block.downsample(active)
    return torch.relu(x if block.downsample is None else block.downsample(x))
