"""The networks' first weights."""

import math

import pytest
import torch
from torch import nn

from helpers.networks import SMALL_OF_EACH_FAMILY, blocks_of, seeded, shortcut_alone
from model import build_model

pytestmark = pytest.mark.usefixtures("fixed_seed")


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("name", ["resnet56", "se_resnet20", "wrn_16_4"])
def test_convolutions_start_as_kaiming_normal_fan_out(name):
    standardised = []
    for conv in convolutions(seeded(name)):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        z = conv.weight.detach().flatten() / math.sqrt(2 / fan_out)
        assert abs(z.std().item() - 1) < 5 / math.sqrt(2 * len(z))  # five standard errors
        assert conv.bias is None
        standardised.append(z)
    z = torch.cat(standardised)
    assert abs(z.mean().item()) < 5 / math.sqrt(len(z))
    assert abs(z.std().item() - 1) < 5 / math.sqrt(2 * len(z))
    # Normal, not uniform or truncated: P(|z| > 2) = 0.0455, P(|z| > 3) = 0.0027.
    assert (z.abs() > 2).float().mean().item() == pytest.approx(0.0455, rel=0.05)
    assert (z.abs() > 3).float().mean().item() == pytest.approx(0.0027, rel=0.2)


@pytest.mark.parametrize("name", ["resnet56", "se_resnet20", "wrn_16_4"])
def test_batchnorm_and_linear_start(name):
    model = seeded(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            assert (module.bias == 0).all()
            assert 0.5 * bound < module.weight.abs().max() <= bound
    assert model.training


def test_the_first_loss_is_near_that_of_guessing():
    model = seeded("resnet56")
    loss = nn.functional.cross_entropy(model(torch.randn(32, 3, 32, 32)), torch.arange(32))
    assert math.log(100) - 0.5 < loss.item() < math.log(100) + 1.5


def test_the_seed_alone_decides_the_weights():
    def weights(seed):
        return seeded("se_resnet20", seed).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("name", SMALL_OF_EACH_FAMILY)
def test_zero_init_makes_every_block_its_shortcut(name):
    for block in blocks_of(build_model(name, zero_init_residual=True)):
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        torch.testing.assert_close(block(x), shortcut_alone(block, x))
    block = build_model(name).layer1[0]
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    assert not torch.allclose(block(x), shortcut_alone(block, x), atol=0.1)


@pytest.mark.parametrize("name", SMALL_OF_EACH_FAMILY)
def test_zero_init_leaves_every_branch_a_gradient_to_grow_from(name):
    model = build_model(name, zero_init_residual=True)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for block in blocks_of(model):
        assert max(block.bn2.weight.grad.abs().max(), block.conv2.weight.grad.abs().max()) > 0
