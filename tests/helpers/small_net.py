"""A small network, its batches and its training steps, for tests of the batch loops."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from cifar.dataset import CIFAR100_MEAN, CIFAR100_STD
from training.engine import Metrics, RunningTotals, TrainStep, train_one_epoch
from training.recipe import Recipe

CLASSES = 10
Batch = tuple[torch.Tensor, torch.Tensor]


def small_net(device: str = "cpu", *, norm: bool = True) -> nn.Module:
    """A stand-in for a ResNet: convolution, BatchNorm if `norm`, linear; its weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8) if norm else nn.Identity()]
        model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, CLASSES))
    return model.to(device, memory_format=torch.channels_last)


def batches_of(*sizes: int) -> list[Batch]:
    """Random training batches of these sizes: uint8 [B, 32, 32, 3] and int64 [B]."""
    draws = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=draws),
            torch.randint(0, CLASSES, (size,), generator=draws),
        )
        for size in sizes
    ]


def plainly_normalized(images: torch.Tensor) -> torch.Tensor:
    scaled = (images.double() / 255 - torch.tensor(CIFAR100_MEAN)) / torch.tensor(CIFAR100_STD)
    return scaled.permute(0, 3, 1, 2).float()


def make_step(model: nn.Module, recipe: Recipe | None = None, **options: object) -> TrainStep:
    """A step whose learning rate drops after its second batch: `Recipe.milestones` of one-batch epochs."""
    recipe = recipe or Recipe(lr=0.01, milestones=(2,))
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, 1)
    return TrainStep(model, recipe.build_criterion(), optimizer, scheduler, **options)


def same_weights(one: nn.Module | dict, two: nn.Module | dict) -> bool:
    """Whether two networks, or their state dicts, hold the same values bit for bit."""
    one, two = (state if isinstance(state, dict) else state.state_dict() for state in (one, two))
    return list(one) == list(two) and all(torch.equal(value, two[name]) for name, value in one.items())


class ListLoader(list):
    """Batches with the sampler that `train_one_epoch` asks: those of an epoch from `start_batch` on."""

    def __init__(
        self,
        batches: list[Batch],
        start_batch: int = 0,
        global_size: Callable[[int], int | None] = lambda batch: None,
    ) -> None:
        super().__init__(batches)
        self.batch_sampler = SimpleNamespace(
            start_batch=start_batch, batches=start_batch + len(batches), global_size=global_size
        )


def train(step: TrainStep, batches: list[Batch], **options: object) -> Metrics:
    loader = batches if isinstance(batches, ListLoader) else ListLoader(batches)
    return train_one_epoch(step, loader, RunningTotals(step.device), **options)
