"""The convolution with fp32 weight gradients, against nn.Conv2d."""

import copy

import pytest
import torch
from torch import Tensor, nn

import core.convolution
from core.convolution import Fp32WeightGradConv2d, use_fp32_weight_gradients
from model import build_model
from training.engine import TrainStep
from training.recipe import Recipe


def output_and_gradients(model: nn.Module, images: Tensor, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of their log-sum-exp with respect to images and weights."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(images)
    logits.float().logsumexp(1).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return logits.detach(), {"images": images.grad, **gradients}


STRIDED = {f"layer{layer}.0.conv1.weight" for layer in (2, 3)}
WITH_AMX = {  # on a CPU with AMX: the strided ones, and those of 64 or more channels
    "resnet20": STRIDED
    | {"layer3.0.conv2.weight"}
    | {f"layer3.{block}.conv{number}.weight" for block in (1, 2) for number in (1, 2)},
    "wrn_16_4": STRIDED
    | {"layer1.0.conv2.weight", "layer2.0.conv2.weight", "layer3.0.conv2.weight"}
    | {"layer2.0.downsample.weight", "layer3.0.downsample.weight"}
    | {f"layer{layer}.1.conv{number}.weight" for layer in (1, 2, 3) for number in (1, 2)},
}


@pytest.fixture(params=[True, False], ids=["amx", "no amx"])
def amx(request, monkeypatch) -> bool:
    """Whether the processor appears to have AMX."""
    monkeypatch.setattr(core.convolution, "cpu_flags", lambda: {"amx_bf16"} if request.param else set())
    return request.param


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_4"])
@pytest.mark.parametrize("bf16", [True, False])
def test_only_the_weight_gradients_of_the_chosen_convolutions_differ(
    name: str, bf16: bool, amx: bool, fixed_seed
) -> None:
    plain = build_model(name).to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    use_fp32_weight_gradients(model, "bf16")
    assert model.state_dict().keys() == plain.state_dict().keys()
    chosen = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Fp32WeightGradConv2d)
    }
    assert chosen == (WITH_AMX[name] if amx else STRIDED)
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    logits, gradients = output_and_gradients(model, images, bf16)
    expected_logits, expected = output_and_gradients(plain, images, bf16)
    assert torch.equal(logits, expected_logits)
    different = {key for key in expected if not torch.equal(gradients[key], expected[key])}
    assert different == (chosen if bf16 else set())
    for key in chosen:
        assert gradients[key].dtype == torch.float32
        torch.testing.assert_close(
            gradients[key], expected[key], rtol=0.05, atol=0.01 * expected[key].abs().max()
        )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        assert torch.equal(model.eval()(images), plain.eval()(images))


def test_convolutions_of_a_network_of_your_own(fixed_seed) -> None:
    kinds = {
        "groups": nn.Conv2d(8, 8, 3, 2, padding=1, groups=2, bias=False),
        "dilation": nn.Conv2d(8, 8, 3, 2, padding=2, dilation=2, bias=False),
        "bias": nn.Conv2d(8, 8, 3, 2, padding=1),
        "padding by name": nn.Conv2d(8, 8, (1, 3), (1, 2), padding="valid", bias=False),
        "reflected padding": nn.Conv2d(8, 8, 3, 2, padding=1, padding_mode="reflect", bias=False),
    }
    images = torch.randn(2, 8, 9, 9)
    for kind, plain in kinds.items():
        model = nn.Sequential(copy.deepcopy(plain), nn.Flatten())
        use_fp32_weight_gradients(model, "bf16")
        assert isinstance(model[0], Fp32WeightGradConv2d) == (kind in ("groups", "dilation"))
        logits, gradients = output_and_gradients(model, images, bf16=False)
        expected_logits, expected = output_and_gradients(
            nn.Sequential(plain, nn.Flatten()), images, bf16=False
        )
        assert torch.equal(logits, expected_logits)
        for key, value in expected.items():
            torch.testing.assert_close(gradients[key], value)


@pytest.mark.parametrize(("precision", "count"), [("bf16", 2), ("fp32", 0)])
def test_the_training_step_uses_it_in_bf16(precision: str, count: int, monkeypatch) -> None:
    monkeypatch.setattr(core.convolution, "cpu_flags", set)
    recipe, model = Recipe(model="resnet20"), build_model("resnet20")
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, 1)
    TrainStep(model, recipe.build_criterion(), optimizer, scheduler, precision=precision)
    assert sum(isinstance(module, Fp32WeightGradConv2d) for module in model.modules()) == count
