"""The strided convolution with fp32 weight gradients, against nn.Conv2d."""

import copy

import pytest
import torch
from torch import Tensor, nn

from core.convolution import StridedConv2d, use_fp32_weight_gradients
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


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_4"])
@pytest.mark.parametrize("bf16", [True, False])
def test_only_the_weight_gradients_of_strided_convolutions_differ(name: str, bf16: bool, fixed_seed) -> None:
    plain = build_model(name).to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    use_fp32_weight_gradients(model, "bf16")
    assert model.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    logits, gradients = output_and_gradients(model, images, bf16)
    expected_logits, expected = output_and_gradients(plain, images, bf16)
    assert torch.equal(logits, expected_logits)
    different = {key for key in expected if not torch.equal(gradients[key], expected[key])}
    strided = {"layer2.0.conv1.weight", "layer3.0.conv1.weight"}
    assert different == (strided if bf16 else set())
    for key in strided:
        assert gradients[key].dtype == torch.float32
        torch.testing.assert_close(
            gradients[key], expected[key], rtol=0.05, atol=0.01 * expected[key].abs().max()
        )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        assert torch.equal(model.eval()(images), plain.eval()(images))


@pytest.mark.parametrize(("precision", "count"), [("bf16", 2), ("fp32", 0)])
def test_the_training_step_uses_it_in_bf16(precision: str, count: int) -> None:
    recipe, model = Recipe(model="resnet20"), build_model("resnet20")
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, 1)
    TrainStep(model, recipe.build_criterion(), optimizer, scheduler, precision=precision)
    assert sum(isinstance(module, StridedConv2d) for module in model.modules()) == count
