"""SAM and ASAM: equal to two steps by hand on a quadratic; BatchNorm sees the first pass alone."""

import copy
import math

import pytest
import torch
from torch import nn

from training.recipe import Recipe
from training.sam import SAM_RHO, SharpnessAware, frozen_statistics
from training.techniques import build_techniques

CURVATURE = torch.tensor([[1.0, 10.0]])


class Quadratic(nn.Module):
    """loss = (a w0^2 + b w1^2) / 2 + bias^2 / 2, so its gradient is CURVATURE x weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, -2.0]]))
        self.bias = nn.Parameter(torch.tensor([0.5]))

    def gradients(self) -> None:
        self.zero_grad(set_to_none=True)
        ((CURVATURE * self.weight**2).sum() / 2 + (self.bias**2).sum() / 2).backward()


def climbed(rho: float, adaptive: bool) -> tuple[Quadratic, torch.Tensor, torch.Tensor]:
    model = Quadratic()
    before = copy.deepcopy(model.state_dict())
    model.gradients()
    SharpnessAware(model, rho, adaptive=adaptive)(model.gradients)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return model, model.weight.grad, model.bias.grad


def test_sam_takes_the_gradient_a_step_uphill() -> None:
    _, weight, bias = climbed(0.3, adaptive=False)
    w, b = torch.tensor([3.0, -2.0]), 0.5
    g, gb = w * CURVATURE[0], 0.5
    norm = math.sqrt(float((g**2).sum()) + gb**2)
    torch.testing.assert_close(weight[0], CURVATURE[0] * (w + 0.3 * g / norm))
    assert bias.item() == pytest.approx(b + 0.3 * gb / norm)


def test_asam_scales_each_weight_by_its_size() -> None:
    _, weight, bias = climbed(0.3, adaptive=True)
    w = torch.tensor([3.0, -2.0])
    g, t = w * CURVATURE[0], w.abs() + 0.01
    norm = math.sqrt(float(((t * g) ** 2).sum()) + 0.5**2)
    torch.testing.assert_close(weight[0], CURVATURE[0] * (w + 0.3 * t**2 * g / norm))
    assert bias.item() == pytest.approx(0.5 + 0.3 * 0.5 / norm)


def test_a_gradient_of_zero_moves_nothing() -> None:
    model = Quadratic()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    model.gradients()
    SharpnessAware(model, 0.1)(model.gradients)
    assert torch.equal(model.weight.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("adaptive", [False, True])
def test_batchnorms_statistics_are_the_first_passs(adaptive: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(6, 3, 5, 5)
    model(images)

    def gradients() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    gradients()
    after_first = copy.deepcopy(model[1].state_dict())
    first = model[0].weight.grad.clone()
    SharpnessAware(model, 0.5, adaptive=adaptive)(gradients)
    assert all(torch.equal(after_first[name], value) for name, value in model[1].state_dict().items())
    assert not torch.equal(first, model[0].weight.grad)
    gradients()
    assert model[1].num_batches_tracked == after_first["num_batches_tracked"] + 1


def test_frozen_statistics_normalise_by_the_batch_and_thaw_after_an_error() -> None:
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ZeroDivisionError), frozen_statistics(norm):
        out = norm(torch.randn(50, 3) * 7 + 5)
        assert out.mean().abs() < 1e-5 and torch.equal(norm.running_mean, torch.zeros(3))
        raise ZeroDivisionError
    norm(torch.randn(50, 3) + 5)
    assert norm.running_mean.mean() > 0.3


@pytest.mark.parametrize("kind", ["sam", "asam"])
def test_the_radius_is_the_papers_unless_it_is_given(kind: str) -> None:
    model = Quadratic()
    for rho, expected in ((None, SAM_RHO[kind]), (0.7, 0.7)):
        built = build_techniques(Recipe(sam=kind, sam_rho=rho), model, classes=100, batches_per_epoch=1)
        (sam,) = built.refinements
        assert (sam.rho, sam.adaptive) == (expected, kind == "asam")
