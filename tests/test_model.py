"""The networks: shapes, names and options, what they refuse; compiled, exported, traced."""

import warnings

import pytest
import torch
from torch import nn

from core.errors import UsageError
from helpers.networks import SMALL_OF_EACH_FAMILY, on_meta
from model import MODELS, BasicBlock, ResNet, SEBasicBlock, WideBlock, build_model, model_options

pytestmark = pytest.mark.usefixtures("fixed_seed")


# --------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_has_its_shape(name):
    model, seen = on_meta(name, 7), {}
    for part in ("conv1", "layer1", "layer2", "layer3", "avgpool", "fc"):
        getattr(model, part).register_forward_hook(
            lambda _m, _i, output, part=part: seen.update({part: tuple(output.shape)})
        )
    model(torch.empty(2, 3, 32, 32, device="meta"))
    k = {"wrn_16_4": 4, "wrn_28_10": 10}.get(name, 1)
    assert seen == {
        "conv1": (2, 16, 32, 32),
        "layer1": (2, 16 * k, 32, 32),
        "layer2": (2, 32 * k, 16, 16),
        "layer3": (2, 64 * k, 8, 8),
        "avgpool": (2, 64 * k, 1, 1),
        "fc": (2, 7),
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_network_gives_logits_and_finite_gradients_to_every_parameter(name):
    model = build_model(name)
    size = 16 if name == "wrn_28_10" else 32  # a quarter of 31 billion multiply-adds
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 100) and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.tensor([3, 97])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.conv1.weight.grad.abs().max() > 0 and model.fc.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", SMALL_OF_EACH_FAMILY)
@pytest.mark.parametrize("height, width", [(16, 16), (17, 33), (28, 28), (28, 64), (64, 64)])
def test_sizes_in_the_range_work(name, height, width):
    model = on_meta(name)
    assert model(torch.empty(2, 3, height, width, device="meta")).shape == (2, 100)


def test_every_size_from_16_to_64_computes():
    model = build_model("resnet20").eval()
    with torch.inference_mode():
        for size in range(16, 65):
            assert model(torch.randn(1, 3, size, size)).isfinite().all()


@pytest.mark.parametrize(
    "shape",
    [
        (3, 32, 32),
        (2, 3, 32),
        (1, 2, 3, 32, 32),
        (2, 1, 32, 32),
        (2, 4, 32, 32),
        (2, 32, 32, 3),
        (2, 3, 15, 32),
        (2, 3, 32, 15),
        (2, 3, 65, 32),
        (2, 3, 32, 65),
        (2, 3, 224, 224),
    ],
)
def test_other_shapes_are_refused_in_one_line(shape):
    with pytest.raises(UsageError) as caught:
        build_model("resnet20")(torch.zeros(shape))
    assert str(caught.value) == (
        f"resnet20 takes images [N, 3, H, W] with H, W from 16 to 64; got {list(shape)}"
    )


def test_an_image_alone_gets_the_logits_it_gets_in_a_batch():
    model = build_model("se_resnet20").eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL_OF_EACH_FAMILY)
def test_channels_last_survives_to_the_last_stage(name):
    model = build_model(name, drop_path=0.5).to(memory_format=torch.channels_last)
    kept = []
    model.layer3.register_forward_hook(lambda _m, _i, output: kept.append(output))
    model(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
    assert kept[0].is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------ names and options


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError) as caught:
        build_model("resnet57")
    assert str(caught.value) == f"unknown network 'resnet57'; known: {', '.join(MODELS)}"


def test_the_default_is_resnet56_for_100_classes_and_the_network_knows_its_name():
    assert build_model().name == "resnet56"
    assert build_model().fc.out_features == 100
    assert build_model("resnet20", 10).fc.out_features == 10


@pytest.mark.parametrize("name", MODELS)
def test_only_wide_networks_take_dropout(name):
    shared = ("zero_init_residual", "drop_path")
    if name.startswith("wrn"):
        assert model_options(name) == (*shared, "dropout")
        return
    assert model_options(name) == shared
    with pytest.raises(UsageError) as caught:
        build_model(name, dropout=0.3)
    assert str(caught.value) == (
        f"{name} does not take the option dropout; it takes zero_init_residual, drop_path"
    )


@pytest.mark.parametrize("option", ["widen", "block", "blocks_per_stage", "droppath"])
def test_what_defines_the_network_is_no_option(option):
    with pytest.raises(UsageError, match=f"wrn_16_4 does not take the option {option};"):
        build_model("wrn_16_4", **{option: 1})


@pytest.mark.parametrize("option", ["drop_path", "dropout"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, 5.0, float("nan")])
def test_rates_outside_0_1_are_refused(option, rate):
    with pytest.raises(UsageError, match=f"{option} must be at least 0 and below 1; got {rate}"):
        build_model("wrn_16_4", **{option: rate})


@pytest.mark.parametrize("classes", [0, -3])
def test_a_network_without_classes_is_refused(classes):
    with pytest.raises(UsageError, match=f"num_classes must be at least 1; got {classes}"):
        build_model("resnet20", classes)


# ---------------------------------------------------------------------- compile, export, trace


def shallow(block, **options):
    """One block a stage: every kind of layer of its family, and quick to trace."""
    return ResNet(block, 1, **options).eval()


FAMILIES = pytest.mark.parametrize("block", [BasicBlock, SEBasicBlock, WideBlock])


@FAMILIES
def test_trace_takes_any_batch_size_and_the_shape_check_does_not_warn(block):
    model = shallow(block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.trace itself is deprecated
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(2, 3, 32, 32))
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


@FAMILIES
def test_export_takes_a_dynamic_batch(block):
    model = shallow(block)
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes)
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-4, atol=1e-5)


@FAMILIES
def test_compile_takes_the_whole_graph_at_any_batch_and_image_size(block):
    torch._dynamo.reset()
    model = shallow(block, drop_path=0.2)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for shape in ((2, 3, 32, 32), (3, 3, 32, 32), (7, 3, 24, 24)):
        images = torch.randn(shape)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    assert compiled.train()(torch.randn(2, 3, 16, 16)).isfinite().all()
    torch._dynamo.reset()


def test_autocast_to_bfloat16_gives_finite_gradients():
    model = build_model("se_resnet20", drop_path=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
