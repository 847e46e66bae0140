"""What blocks may hold beside convolutions: drop path, dropout, squeeze and excitation."""

import math

import pytest
import torch
from torch import nn

from helpers.networks import SMALL_OF_EACH_FAMILY, blocks_of, on_meta, seeded, shortcut_alone
from model import MODELS, SqueezeExcitation, build_model, drop_path

pytestmark = pytest.mark.usefixtures("fixed_seed")


# -------------------------------------------------------------------------- drop path and dropout


def test_drop_path_zeroes_whole_images_at_its_rate_and_keeps_the_mean():
    rate, count = 0.3, 20_000
    out = drop_path(torch.ones(count, 2, 3, 1), rate).flatten(1)
    dropped = (out == 0).all(1)
    kept = torch.isclose(out, torch.tensor(1 / (1 - rate))).all(1)
    assert (dropped | kept).all()
    five_errors = 5 * math.sqrt(rate * (1 - rate) / count)
    assert abs(dropped.float().mean().item() - rate) < five_errors
    assert abs(out.mean().item() - 1) < five_errors / (1 - rate)


def test_drop_path_follows_the_global_seed():
    x = torch.ones(64, 1, 1, 1)
    torch.manual_seed(5)
    first, second = drop_path(x, 0.5), drop_path(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(drop_path(x, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_drop_path_rates_rise_linearly_to_the_last_block(name):
    rates = [block.drop_path for block in blocks_of(on_meta(name, drop_path=0.2))]
    assert rates == pytest.approx([0.2 * (i + 1) / len(rates) for i in range(len(rates))])


@pytest.mark.parametrize("name", SMALL_OF_EACH_FAMILY)
def test_drop_path_changes_training_and_nothing_else(name):
    plain, dropping = seeded(name), seeded(name, drop_path=0.5)
    images = torch.randn(4, 3, 16, 16)
    before = torch.get_rng_state()
    in_training = plain(images)
    assert torch.equal(torch.get_rng_state(), before)  # without drop path nothing is drawn
    assert not torch.allclose(dropping(images), in_training)
    assert not torch.equal(torch.get_rng_state(), before)
    plain.load_state_dict(dropping.state_dict())
    assert torch.equal(dropping.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("name", SMALL_OF_EACH_FAMILY)
def test_a_dropped_block_is_its_shortcut(name):
    for block in blocks_of(build_model(name))[:5]:  # with and without a change of shape
        block.drop_path = 1 - 1e-12
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        torch.testing.assert_close(block(x), shortcut_alone(block, x))


def test_dropout_sits_between_the_convolutions_of_wide_blocks():
    rate, seen = 0.4, []
    model = seeded("wrn_16_4", dropout=rate)
    assert all(block.dropout == rate for block in blocks_of(model))
    block = model.layer1[0]
    block.conv2.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
    x = torch.randn(4, 16, 16, 16)
    block(x)
    block.dropout = 0.0
    block(x)
    dropped, plain = seen
    share = (dropped == 0)[plain > 0].float().mean().item()
    assert share == pytest.approx(rate, abs=0.02)
    survivors = dropped != 0
    torch.testing.assert_close(dropped[survivors], plain[survivors] / (1 - rate))


def test_dropout_is_off_in_eval():
    plain, dropping = seeded("wrn_16_4"), seeded("wrn_16_4", dropout=0.5)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain.eval()(images), dropping.eval()(images))
    assert not torch.allclose(plain.train()(images), dropping.train()(images))


# ----------------------------------------------------------------------- squeeze and excitation


def test_the_gate_has_one_value_in_0_1_for_each_image_and_channel():
    se = SqueezeExcitation(64)
    x = torch.randn(5, 64, 8, 8)
    gate = se.gate(x)
    assert gate.shape == (5, 64, 1, 1)
    assert gate.min() > 0 and gate.max() < 1 and gate.std() > 0
    assert torch.equal(se(x), x * gate)
    assert (se.fc1.out_features, se.fc2.in_features, se.fc2.out_features) == (4, 4, 64)
    # Only the channel means matter: spreading the pixels about them leaves the gate.
    means = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(se.gate(means + 3 * (x - means)), gate)


def test_the_gate_acts_on_the_residual_branch_and_not_on_the_shortcut():
    block = build_model("se_resnet20").layer1[0]
    nn.init.zeros_(block.se.fc2.weight)
    nn.init.constant_(block.se.fc2.bias, -100.0)  # sigmoid(-100) is 0: the branch is shut
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x), torch.relu(x))


def test_every_se_block_has_reduction_16():
    hidden = [block.se.fc1.out_features for block in blocks_of(on_meta("se_resnet56"))]
    assert hidden == [1] * 9 + [2] * 9 + [4] * 9
