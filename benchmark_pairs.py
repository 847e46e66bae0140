"""What benchmark.py measures: each thing the plain way and through the very functions that train.py calls."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import plain_recipe
from dataset import Split
from engine import Sums, TrainStep, evaluate, train_one_epoch
from measuring import Pair, repeated
from model import build_model
from recipe import Recipe
from utils import make_test_batches, make_train_loader, normalize

# An epoch of CIFAR-100 trains on 50,000 images and tests on 10,000; a measured one keeps the proportion.
EPOCH_IMAGES, TRAIN_PER_TEST = 50_000, 5
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What is measured, and how long."""

    recipe: Recipe
    device: torch.device
    compile: bool
    workers: int
    rounds: int
    images: int  # of one measured epoch
    step_images: int  # of one measurement of the training step, at least
    peak_s: float  # seconds spent on each of the machine's peaks

    @property
    def test_images(self) -> int:
        """Test images of one measured epoch."""
        return max(1, self.images // TRAIN_PER_TEST)


class Trainer:
    """A network and its step, plain or the project's, that is trained on whatever it is given."""

    def __init__(self, setting: Setting, plain: bool) -> None:
        recipe, self.device = setting.recipe, setting.device
        self.model: nn.Module = build_model(recipe.model).to(self.device)
        if plain:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(),
                lr=recipe.lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=True,
            )
        else:
            self.model = self.model.to(memory_format=torch.channels_last)
            optimizer = recipe.build_optimizer(self.model)
            self.step = TrainStep(
                self.model,
                recipe.build_criterion(),
                optimizer,
                recipe.build_scheduler(optimizer, EPOCH_IMAGES // recipe.batch_size + 1),
                precision=recipe.precision,
                compile_model=setting.compile,
            )


def make_loaders(setting: Setting, split: Split, workers: int) -> tuple[DataLoader, DataLoader]:
    """The plain training loader and the project's."""
    batch_size, pin_memory = setting.recipe.batch_size, setting.device.type == "cuda"
    plain = plain_recipe.make_loader(split, batch_size, train=True, workers=workers, pin_memory=pin_memory)
    own = make_train_loader(
        split,
        batch_size=batch_size,
        seed=SEED,
        augment=setting.recipe.augment,
        workers=workers,
        pin_memory=pin_memory,
    )
    return plain, own


def loader_pair(setting: Setting, split: Split, workers: int) -> Pair:
    """All augmented training batches of one epoch, with no training."""

    def drain(loader: Iterable[tuple[Tensor, Tensor]]) -> int:
        return sum(len(labels) for _, labels in loader)

    plain, own = make_loaders(setting, split, workers)
    return Pair(f"loader {workers}", functools.partial(drain, plain), functools.partial(drain, own))


def step_pair(setting: Setting, trainers: tuple[Trainer, Trainer], split: Split, size: int) -> Pair:
    """Training steps on one batch of `size` images that is on the device already."""
    plain, own = trainers
    if size != setting.recipe.batch_size and setting.compile:
        own = Trainer(setting, plain=False)  # a step compiles for the first size that it sees
    chosen = np.resize(np.arange(len(split.labels)), size)
    images = torch.from_numpy(split.images[chosen]).to(setting.device)
    labels = torch.from_numpy(split.labels[chosen]).to(setting.device)
    batch = normalize(images).contiguous()

    def plain_step() -> int:
        plain.model.train()
        plain_recipe.train_step(plain.model, plain.optimizer, batch, labels)
        return size

    def own_step() -> int:
        own.model.train()
        own.step(images, labels)
        return size

    times = max(1, setting.step_images // size)
    return Pair(f"step {size}", repeated(plain_step, times), repeated(own_step, times))


def evaluation_pair(setting: Setting, trainers: tuple[Trainer, Trainer], split: Split) -> Pair:
    """Testing once; the project's side has normalised the test images before, as train.py does once a run."""
    plain, own = trainers
    loader = plain_recipe.make_loader(
        split, min(1000, len(split.labels)), train=False, workers=setting.workers
    )
    batches = make_test_batches(split, setting.recipe.test_batch_size, setting.device)
    precision = setting.recipe.precision
    return Pair(
        "evaluation",
        lambda: plain_recipe.evaluate(plain.model, loader, setting.device),
        lambda: evaluate(own.model, batches, precision=precision).images,
    )


def epoch_pair(setting: Setting, trainers: tuple[Trainer, Trainer], data: tuple[Split, Split]) -> Pair:
    """Loading, training and testing together: an epoch of `setting.images` images. Counts training images."""
    plain, own = trainers
    loaders = make_loaders(setting, data[0], setting.workers)
    test = evaluation_pair(setting, trainers, data[1])

    def plain_epoch() -> int:
        seen = plain_recipe.train_epoch(plain.model, plain.optimizer, loaders[0], setting.device)
        test.plain()
        return seen

    def own_epoch() -> int:
        sums = Sums(setting.device)
        metrics = train_one_epoch(own.step, loaders[1], sums, batches=len(loaders[1]))
        test.project()
        return metrics.images

    return Pair("epoch", plain_epoch, own_epoch)
