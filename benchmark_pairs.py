"""The project's side of benchmark.py: the very functions that train.py calls."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmark_setting import EPOCH_IMAGES, SEED, Setting
from cifar.dataset import Split
from measuring import repeated
from model import build_model
from plain_side import drain, same_images
from training.engine import RunningTotals, TrainStep, evaluate, train_one_epoch
from utils import make_test_batches, make_train_loader


def make_step(setting: Setting, batch_size: int | None = None) -> TrainStep:
    """A network and its training step, as train.py makes them (`batch_size`: the recipe's by default)."""
    recipe = setting.recipe
    model: nn.Module = build_model(recipe.model).to(setting.device, memory_format=torch.channels_last)
    optimizer = recipe.build_optimizer(model)
    return TrainStep(
        model,
        recipe.build_criterion(),
        optimizer,
        recipe.build_scheduler(optimizer, EPOCH_IMAGES // recipe.batch_size + 1),
        precision=recipe.precision,
        compile_batch_size=(batch_size or recipe.batch_size) if setting.compile else None,
    )


def project_works(
    setting: Setting, data: tuple[Split, Split], step: TrainStep
) -> dict[str, Callable[[], int]]:
    """What is measured, by name; each call does it once this project's way and counts its images.

    The test images are normalised before, as train.py does it once a run.
    """
    recipe, device = setting.recipe, setting.device
    train = {
        workers: make_train_loader(
            data[0],
            batch_size=recipe.batch_size,
            seed=SEED,
            augment=recipe.augment,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        for workers in setting.loader_workers
    }
    test = make_test_batches(data[1], recipe.test_batch_size, device)

    def one_step(step: TrainStep, images: Tensor, labels: Tensor) -> int:
        step.model.train()
        step(images, labels)
        return len(labels)

    def one_test() -> int:
        return evaluate(step.model, test, precision=recipe.precision).images

    def epoch() -> int:
        loader = train[setting.workers]
        metrics = train_one_epoch(step, loader, RunningTotals(device), batches=len(loader))
        one_test()
        return metrics.images

    works: dict[str, Callable[[], int]] = {}
    for workers, loader in train.items():
        works[f"loader {workers}"] = functools.partial(drain, loader)
    for size in setting.step_sizes:
        # a step compiles for one size only
        own = make_step(setting, size) if setting.compile and size != recipe.batch_size else step
        work = functools.partial(one_step, own, *same_images(data[0], size, device))
        works[f"step {size}"] = repeated(work, setting.step_times(size))
    return works | {"evaluation": one_test, "epoch": epoch}
