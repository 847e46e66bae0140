"""Schedules and optimizer choices beyond the reference by value; the default step untouched."""

import math

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


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Plain()


def batches(count: int, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random uint8 [size, 32, 32, 3] and int64 [size]."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (count, size), generator=generator)
    return list(zip(images, labels, strict=True))


def make_step(model: nn.Module, recipe: Recipe, techniques: Techniques | None = None) -> TrainStep:
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, 4)
    return TrainStep(model, recipe.build_criterion(), optimizer, scheduler, techniques=techniques)


def rates(recipe: Recipe, batches_per_epoch: int) -> list[float]:
    """The learning rate of every batch, by really stepping."""
    optimizer = recipe.build_optimizer(nn.Linear(1, 1))
    scheduler = recipe.build_scheduler(optimizer, batches_per_epoch)
    seen = []
    for _ in range(recipe.epochs * batches_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_default_step_is_the_plain_one_bit_for_bit() -> None:
    """Against a loop of torch's own parts."""
    torch.manual_seed(3)
    model, twin = build_model("resnet20"), build_model("resnet20")
    twin.load_state_dict(model.state_dict())
    step = make_step(model, Recipe())
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


def test_cosine_rises_to_its_peak_and_falls_to_nothing() -> None:
    seen = rates(Recipe(epochs=10, scheduler="cosine", warmup_epochs=2, lr=0.4), 5)
    assert seen[:10] == pytest.approx([0.04 * step for step in range(1, 11)])
    assert seen[10] == pytest.approx(0.4)
    assert seen[30] == pytest.approx(0.2)  # half-way through the 40 batches of the fall
    assert seen[49] == pytest.approx(0.4 * (1 + math.cos(math.pi * 39 / 40)) / 2)
    assert min(seen) > 0


def test_cosine_without_warm_up_is_torchs() -> None:
    seen = rates(Recipe(epochs=6, scheduler="cosine"), 3)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=18)
    for rate in seen:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_cosine_goes_on_exactly_from_plain_numbers() -> None:
    recipe = Recipe(epochs=4, scheduler="cosine", warmup_epochs=1)
    optimizer = recipe.build_optimizer(nn.Linear(1, 1))
    scheduler = recipe.build_scheduler(optimizer, 3)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    again = recipe.build_optimizer(nn.Linear(1, 1))
    resumed = recipe.build_scheduler(again, 3)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert again.param_groups[0]["lr"] == rates(recipe, 3)[5]
    again.step()
    resumed.step()
    assert again.param_groups[0]["lr"] == rates(recipe, 3)[6]


def test_weight_decay_can_leave_out_vectors() -> None:
    model = build_model("resnet20")
    optimizer = Recipe(decay_bn=False).build_optimizer(model)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    assert all(value.ndim > 1 for value in decayed["params"])
    names = {name for name, value in model.named_parameters() if any(value is p for p in spared["params"])}
    assert "fc.bias" in names and "bn1.weight" in names and "layer1.0.bn2.bias" in names
    assert not any("conv" in name for name in names)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_label_smoothing_is_cross_entropy_with_soft_targets() -> None:
    logits, labels = torch.randn(5, 100), torch.arange(5)
    soft = F.one_hot(labels, 100) * 0.9 + 0.1 / 100
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert Recipe(label_smoothing=0.1).build_criterion()(logits, labels).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_clipping_bounds_the_norm_and_leaves_short_gradients_alone() -> None:
    for limit, expected in ((0.5, 0.5), (10.0, 5.0)):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        Clip(layer, limit)(lambda: None)
        assert layer.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)
        assert (layer.weight.grad[0, 1] / layer.weight.grad[0, 0]).item() == pytest.approx(4 / 3)


@pytest.mark.parametrize(("pieces", "size"), [(2, 12), (3, 10), (5, 3)])
def test_pieces_of_a_batch_give_its_gradients(pieces: int, size: int) -> None:
    """Without BatchNorm, which sees the pieces; ragged pieces and fewer images than pieces too."""
    results = []
    for accumulate in (1, pieces):
        model = plain()
        step = make_step(model, Recipe(), Techniques(accumulate=accumulate))
        sums = [step(images, labels) for images, labels in batches(2, size)]
        results.append((sums, torch.cat([value.flatten() for value in model.parameters()])))
    (whole_sums, whole), (pieces_sums, parts) = results
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for (loss, hits), (loss_of_parts, hits_of_parts) in zip(whole_sums, pieces_sums, strict=True):
        assert loss_of_parts.item() == pytest.approx(loss.item(), rel=1e-5) and hits == hits_of_parts
