"""The training step: plain by default bit for bit, clipped gradients, micro-batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import build_model
from training.engine import TrainStep
from training.recipe import Recipe
from training.sam import Clip
from training.techniques import Techniques
from utils import normalize


class Plain(nn.Module):
    """A network without BatchNorm: [N, 3, H, W] -> [N, 100]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 100)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(images).relu().mean((2, 3)))


def batches(count: int, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random uint8 [size, 32, 32, 3] and int64 [size]."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (count, size), generator=generator)
    return list(zip(images, labels, strict=True))


def make_step(model: nn.Module, techniques: Techniques | None = None) -> TrainStep:
    optimizer = Recipe().build_optimizer(model)
    scheduler = Recipe().build_scheduler(optimizer, 4)
    return TrainStep(model, Recipe().build_criterion(), optimizer, scheduler, techniques=techniques)


def test_the_default_step_is_the_plain_one_bit_for_bit() -> None:
    """Against a loop of torch's own parts."""
    torch.manual_seed(3)
    model, twin = build_model("resnet20"), build_model("resnet20")
    twin.load_state_dict(model.state_dict())
    step = make_step(model)
    optimizer = torch.optim.SGD(
        twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    model.train()
    for images, labels in batches(3):
        loss_sum, hits = step(images, labels)
        logits = twin(normalize(images))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(loss_sum, loss.detach() * len(labels))
        assert hits == (logits.argmax(1) == labels).sum()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in twin.state_dict().items())


def test_clipping_bounds_the_norm_and_leaves_short_gradients_alone() -> None:
    for limit, expected in ((0.5, 0.5), (10.0, 5.0)):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        Clip(layer, limit)(lambda: None)
        assert layer.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)
        assert (layer.weight.grad[0, 1] / layer.weight.grad[0, 0]).item() == pytest.approx(4 / 3)


@pytest.mark.parametrize(("count", "size"), [(2, 12), (3, 10), (5, 3)])
def test_micro_batches_give_the_gradients_of_the_batch(count: int, size: int) -> None:
    """Without BatchNorm, which sees each one alone; ragged ones, and fewer images than micro-batches too."""
    results = []
    for accumulate in (1, count):
        torch.manual_seed(0)
        model = Plain()
        step = make_step(model, Techniques(accumulate=accumulate))
        sums = [step(images, labels) for images, labels in batches(2, size)]
        results.append((sums, torch.cat([value.flatten() for value in model.parameters()])))
    (whole_sums, whole), (micro_sums, micro) = results
    torch.testing.assert_close(micro, whole, rtol=1e-5, atol=1e-6)
    for (loss, hits), (micro_loss, micro_hits) in zip(whole_sums, micro_sums, strict=True):
        assert micro_loss.item() == pytest.approx(loss.item(), rel=1e-5) and hits == micro_hits
