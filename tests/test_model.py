"""The networks: shapes, sizes against the papers, options, first weights, blocks, recorded graphs."""

import contextlib
import copy
import io
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torchsummary
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from model import (
    MODELS,
    BasicBlock,
    PreActBlock,
    ResNet,
    SEBasicBlock,
    SqueezeExcitation,
    build_model,
    count_macs,
    count_parameters,
    drop_path,
    model_options,
)
from model import __doc__ as model_doc

pytestmark = pytest.mark.usefixtures("fixed_seed")
SUMMARY = Path(__file__).parent / "expected" / "torchsummary_resnet56.txt"
ONE_OF_EACH_FAMILY = pytest.mark.parametrize(
    "name", ["resnet20", "se_resnet20", "preact_resnet110", "wrn_16_4"]
)


def on_meta(name, num_classes=100, **options):
    """The network without memory or arithmetic."""
    with torch.device("meta"):
        return build_model(name, num_classes, **options)


def seeded(name, **options):
    torch.manual_seed(0)
    return build_model(name, **options)


def blocks_of(model):
    return [*model.layer1, *model.layer2, *model.layer3]


def shortcut_alone(block, x):
    """The block's output if its residual branch is zero."""
    if isinstance(block, PreActBlock):
        return x if block.downsample is None else block.downsample(torch.relu(block.bn1(x)))
    return torch.relu(x if block.downsample is None else block.downsample(x))


# --------------------------------------------------------------------------------------- shapes


@ONE_OF_EACH_FAMILY
@pytest.mark.parametrize("height, width", [(16, 16), (17, 33), (28, 64), (64, 64)])
def test_sizes_from_16_to_64_work(name, height, width):
    assert on_meta(name)(torch.empty(2, 3, height, width, device="meta")).shape == (2, 100)


@ONE_OF_EACH_FAMILY
@pytest.mark.parametrize("bf16", [False, True])
def test_logits_and_all_gradients_are_finite_and_channels_last_is_kept(name, bf16):
    model, kept = build_model(name, drop_path=0.2).to(memory_format=torch.channels_last), []
    model.layer3.register_forward_hook(lambda _m, _i, output: kept.append(output.detach()))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
        nn.functional.cross_entropy(logits, torch.tensor([3, 97])).backward()
    assert logits.shape == (2, 100) and logits.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.conv1.weight.grad.abs().max() > 0 and model.fc.weight.grad.abs().max() > 0
    assert kept[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 32, 3), (2, 3, 15, 32), (2, 3, 32, 65)])
def test_other_shapes_are_refused_in_one_line(shape):
    with pytest.raises(ValueError) as caught:
        build_model("resnet20")(torch.zeros(shape))
    message = f"resnet20 takes images [N, 3, H, W] with H, W from 16 to 64; got {list(shape)}"
    assert str(caught.value) == message


# ---------------------------------------------------------------- parameters and multiply-adds

# (parameters, multiply-adds) with 100 classes at 32x32, from the table at the top of model.py. Parameters of
# resnet56: the reference summary table; of se_resnet20, 56 and 110, preact_resnet110 and wrn_28_10: the
# asserts in osmr/imgclsmob (pytorchcv/models/*_cifar.py). The rest follows from the papers' descriptions.
COUNTS = {
    name: tuple(int(count.replace(",", "")) for count in counts)
    for name, *counts in re.findall(r"\| (\w+) +\| +([\d,]+) \| +([\d,]+) \|", model_doc)
}

# With 10 classes: millions of parameters as the papers print them (He et al. 2015, whose CIFAR shortcuts pad
# with zeros, option A, and lack the two 1x1 convolutions and their BatchNorms; He et al. 2016; Zagoruyko &
# Komodakis 2016), and millions of multiply-adds as D-X-Y/AutoDL-Projects, docs/BASELINE.md does.
OPTION_A = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
PUBLISHED = {
    "resnet20": ("0.27", "40.81"), "resnet32": ("0.46", "69.12"), "resnet44": ("0.66", None),
    "resnet56": ("0.85", "125.75"), "resnet110": ("1.7", "253.15"), "preact_resnet110": ("1.7", None),
    "wrn_16_4": ("2.7", None), "wrn_28_10": ("36.5", "5243.33"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_multiply_adds_are_exact(name):
    model = on_meta(name)
    assert (count_parameters(model), count_macs(model)) == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_round_to_the_published_ones(name):
    model, (parameters, macs) = on_meta(name, 10), PUBLISHED[name]
    count = count_parameters(model) - (OPTION_A if name.startswith("resnet") else 0)
    assert f"{count / 1e6:.{len(parameters.split('.')[1])}f}" == parameters
    assert macs in (None, f"{count_macs(model) / 1e6:.2f}")


def test_count_macs_leaves_the_network_as_it_was():
    model = seeded("wrn_16_4", drop_path=0.5, dropout=0.5)
    model.layer2.eval()  # as when a part is frozen
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    assert count_macs(model) == COUNTS["wrn_16_4"][1]
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_summary_of_resnet56_is_the_reference_table():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        torchsummary.summary(build_model("resnet56"), (3, 32, 32), device="cpu")
    assert printed.getvalue().splitlines() == SUMMARY.read_text("utf-8").splitlines()


# ------------------------------------------------------------------------------ names and options


def test_the_default_is_resnet56_for_100_classes():
    assert (build_model().name, build_model().fc.out_features) == ("resnet56", 100)


@pytest.mark.parametrize("name", MODELS)
def test_only_wide_networks_take_dropout(name):
    shared = ("zero_init_residual", "drop_path")
    assert model_options(name) == ((*shared, "dropout") if name.startswith("wrn") else shared)


WIDE_TAKES = "zero_init_residual, drop_path, dropout"
REFUSED = [
    ("resnet57", {}, f"unknown network 'resnet57'; known: {', '.join(MODELS)}"),
    ("resnet20", {"num_classes": 0}, "num_classes must be at least 1; got 0"),
    ("wrn_16_4", {"widen": 1}, f"wrn_16_4 does not take the option widen; it takes {WIDE_TAKES}"),
    ("wrn_16_4", {"drop_path": 1.0}, "drop_path must be at least 0 and below 1; got 1.0"),
    ("wrn_16_4", {"dropout": -0.1}, "dropout must be at least 0 and below 1; got -0.1"),
    ("wrn_16_4", {"dropout": float("nan")}, "dropout must be at least 0 and below 1; got nan"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_wrong_names_and_options_are_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError) as caught:
        build_model(name, **options)
    assert str(caught.value) == message


# ---------------------------------------------------------------------------------- first weights


@pytest.mark.parametrize("name", ["resnet56", "se_resnet20", "wrn_16_4"])
def test_the_first_weights(name):
    """Convolutions: Kaiming normal, fan out; BatchNorm: 1 and 0; the last layer: normal(0, 0.01), bias 0."""
    model, standardised = seeded(name), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            z = module.weight.detach().flatten() / math.sqrt(2 / fan_out)
            assert abs(z.std().item() - 1) < 5 / math.sqrt(2 * len(z))  # five standard errors
            assert module.bias is None
            standardised.append(z)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Linear) and module is not model.fc:  # of squeeze-and-excitation
            bound = 1 / math.sqrt(module.in_features)
            assert (module.bias == 0).all()
            assert 0.5 * bound < module.weight.abs().max() <= bound
    z = model.fc.weight.detach().flatten() / 0.01
    assert abs(z.std().item() - 1) < 5 / math.sqrt(2 * len(z)) and (model.fc.bias == 0).all()
    standardised.append(z)
    z = torch.cat(standardised)
    assert abs(z.mean().item()) < 5 / math.sqrt(len(z))
    # Normal, not uniform or truncated: P(|z| > 2) = 0.0455, P(|z| > 3) = 0.0027.
    assert (z.abs() > 2).float().mean().item() == pytest.approx(0.0455, rel=0.05)
    assert (z.abs() > 3).float().mean().item() == pytest.approx(0.0027, rel=0.2)


@ONE_OF_EACH_FAMILY
def test_zero_init_makes_every_block_its_shortcut_with_a_gradient_to_grow_from(name):
    model = build_model(name, zero_init_residual=True)
    for block in blocks_of(model):
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        torch.testing.assert_close(block(x), shortcut_alone(block, x))
    nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for block in blocks_of(model):
        assert max(block.bn2.weight.grad.abs().max(), block.conv2.weight.grad.abs().max()) > 0
    block = build_model(name).layer1[0]
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    assert not torch.allclose(block(x), shortcut_alone(block, x), atol=0.1)


# ------------------------------------------------------- drop path, dropout, squeeze and excitation


def test_drop_path_zeroes_whole_images_at_its_rate_and_keeps_the_mean():
    rate, count = 0.3, 20_000
    out = drop_path(torch.ones(count, 2, 3, 1), rate).flatten(1)
    dropped = (out == 0).all(1)
    kept = torch.isclose(out, torch.tensor(1 / (1 - rate))).all(1)
    assert (dropped | kept).all()
    five_errors = 5 * math.sqrt(rate * (1 - rate) / count)
    assert abs(dropped.float().mean().item() - rate) < five_errors
    assert abs(out.mean().item() - 1) < five_errors / (1 - rate)


@pytest.mark.parametrize("name", MODELS)
def test_drop_path_rates_rise_linearly_to_the_last_block(name):
    rates = [block.drop_path for block in blocks_of(on_meta(name, drop_path=0.2))]
    assert rates == pytest.approx([0.2 * (i + 1) / len(rates) for i in range(len(rates))])


@ONE_OF_EACH_FAMILY
def test_drop_path_draws_from_the_global_generator_in_training_alone(name):
    plain, dropping = seeded(name), seeded(name, drop_path=0.5)
    images = torch.randn(4, 3, 16, 16)
    before = torch.get_rng_state()
    in_training = plain(images)
    assert torch.equal(torch.get_rng_state(), before)  # without drop path nothing is drawn
    first = dropping(images)
    assert not torch.allclose(first, in_training)
    torch.set_rng_state(before)
    assert torch.equal(dropping(images), first)
    plain.load_state_dict(dropping.state_dict())
    assert torch.equal(dropping.eval()(images), plain.eval()(images))


@ONE_OF_EACH_FAMILY
def test_a_dropped_block_is_its_shortcut(name):
    for block in blocks_of(build_model(name))[:5]:  # with and without a change of shape
        block.drop_path = 1 - 1e-12
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        torch.testing.assert_close(block(x), shortcut_alone(block, x))


def test_dropout_is_between_the_convolutions_of_wide_blocks_and_off_in_eval():
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
    assert (dropped == 0)[plain > 0].float().mean().item() == pytest.approx(rate, abs=0.02)
    survivors = dropped != 0
    torch.testing.assert_close(dropped[survivors], plain[survivors] / (1 - rate))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(images), model(images))


def test_the_gate_has_one_value_in_0_1_for_each_image_and_channel():
    se = SqueezeExcitation(64)
    x = torch.randn(5, 64, 8, 8)
    gates = se(x) / x
    gate = gates.mean((2, 3), keepdim=True)
    torch.testing.assert_close(gates, gate.expand_as(x))
    assert gate.min() > 0 and gate.max() < 1 and gate.std() > 0
    # Only the channel means matter: spreading the pixels about them leaves the gate.
    means = x.mean((2, 3), keepdim=True)
    spread = means + 3 * (x - means)
    torch.testing.assert_close(se(spread), spread * gate)


def test_the_gate_acts_on_the_residual_branch_and_not_on_the_shortcut():
    block = build_model("se_resnet20").layer1[0]
    nn.init.zeros_(block.se.fc2.weight)
    nn.init.constant_(block.se.fc2.bias, -100.0)  # sigmoid(-100) is 0: the branch is shut
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x), torch.relu(x))


# ------------------------------------------------------------- scripted, traced, compiled, exported


def shallow(block):
    """One block per stage: every kind of layer of its family, and quick to trace."""
    return ResNet(block, 1, drop_path=0.2).eval()


def script(model):
    return torch.jit.script(model)


def trace(model):
    return torch.jit.trace(model, torch.randn(2, 3, 32, 32))


def export(model):
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    return torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes).module()


def logits_of_extractor(model):
    extractor = create_feature_extractor(model, {"layer3": "features", "fc": "logits"})
    assert extractor(torch.randn(2, 3, 32, 32))["features"].shape == (2, 64, 8, 8)
    return lambda images: extractor(images)["logits"]


FAMILIES = pytest.mark.parametrize("block", [BasicBlock, SEBasicBlock, PreActBlock])


@FAMILIES
@pytest.mark.parametrize("record", [script, trace, torch.fx.symbolic_trace, logits_of_extractor, export])
def test_recorded_graphs_take_any_batch_size(block, record):
    model = shallow(block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit itself is deprecated
        warnings.simplefilter("error", torch.jit.TracerWarning)  # of a shape that is fixed
        recorded = record(model)
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(recorded(images), model(images), rtol=1e-4, atol=1e-5)


@FAMILIES
def test_compile_takes_the_whole_graph_at_any_batch_and_image_size(block):
    torch._dynamo.reset()
    model = shallow(block)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for shape in ((2, 3, 32, 32), (3, 3, 32, 32), (7, 3, 24, 24)):
        images = torch.randn(shape)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    assert compiled.train()(torch.randn(2, 3, 16, 16)).isfinite().all()
    torch._dynamo.reset()
