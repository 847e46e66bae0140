"""Knowledge distillation: its gradient by formula, the scale of T, a teacher that stays as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.distill import Distillation, softened_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_hintons(temperature: float) -> None:
    """d/dz of the mean over images: T (softmax(z / T) - softmax(v / T)) / N."""
    torch.manual_seed(0)
    logits, answers = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7) * 3
    softened_loss(logits, answers, temperature).backward()
    difference = (logits / temperature).softmax(1) - (answers / temperature).softmax(1)
    torch.testing.assert_close(logits.grad, temperature * difference.detach() / 5)


def test_at_high_temperature_it_tends_to_matching_logits() -> None:
    """T^2 keeps the size: the gradient tends to (z - v) / (N C) for logits of mean zero (section 2.1)."""
    torch.manual_seed(0)
    logits, answers = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    logits -= logits.mean(1, keepdim=True)
    answers -= answers.mean(1, keepdim=True)
    logits.requires_grad_()
    softened_loss(logits, answers, 1e4).backward()
    torch.testing.assert_close(logits.grad, (logits - answers).detach() / 24, rtol=1e-3, atol=1e-6)


def test_it_is_zero_for_a_student_that_equals_its_teacher() -> None:
    logits = torch.randn(3, 9)
    assert softened_loss(logits, logits + 5, 3.0).abs() < 1e-5


def teacher() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.LazyLinear(6))


def test_alpha_weighs_teacher_against_labels() -> None:
    network, images, labels = teacher(), torch.randn(4, 3, 8, 8), torch.arange(4)
    network(images)
    logits = torch.randn(4, 6)
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():
        soft = softened_loss(logits, copy.deepcopy(network).eval()(images), 4.0)
    for alpha in (0.0, 0.3, 1.0):
        mixed = Distillation(network, alpha=alpha, temperature=4.0)(loss, logits, images)
        torch.testing.assert_close(mixed, (1 - alpha) * loss + alpha * soft)


def test_the_teacher_stays_as_it_was() -> None:
    network, images = teacher(), torch.randn(4, 3, 8, 8)
    network(images)
    before = copy.deepcopy(network.state_dict())
    logits = torch.randn(4, 6, requires_grad=True)
    distillation = Distillation(network, alpha=0.9, temperature=4.0, precision="bf16")
    for _ in range(2):
        distillation(F.cross_entropy(logits, torch.arange(4)), logits, images).backward()
    assert not network.training and all(value.grad is None for value in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
