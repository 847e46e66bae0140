"""The plain recipe's side of benchmark.py, in a process of its own.

Apart, so that nothing this project sets up for itself (torch's switches, how memory is kept) makes the plain
recipe faster or slower than it is in a script of its own. The two sides still run in turn, never at once.
"""

import functools
import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

import plain_recipe
from benchmark_setting import SEED, Setting
from cifar.dataset import Split
from core.errors import RunError
from measuring import Sample, repeated, timed
from model import build_model
from utils import normalize

LEAVE_S = 5.0  # how long the process may take to end


def plain_works(setting: Setting, data: tuple[Split, Split]) -> dict[str, Callable[[], int]]:
    """What is measured, by name; each call does it once the plain way and counts its images."""
    recipe, device = setting.recipe, setting.device
    torch.manual_seed(SEED)
    model = build_model(recipe.model).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    train = {
        workers: plain_recipe.make_loader(
            data[0], recipe.batch_size, train=True, workers=workers, pin_memory=device.type == "cuda"
        )
        for workers in setting.loader_workers
    }
    test_size = min(1000, len(data[1].labels))
    test = plain_recipe.make_loader(data[1], test_size, train=False, workers=setting.workers)

    def step(images: Tensor, labels: Tensor) -> int:
        model.train()
        plain_recipe.train_step(model, optimizer, images, labels)
        return len(labels)

    def epoch() -> int:
        seen = plain_recipe.train_epoch(model, optimizer, train[setting.workers], device)
        plain_recipe.evaluate(model, test, device)
        return seen

    works: dict[str, Callable[[], int]] = {}
    for workers, loader in train.items():
        works[f"loader {workers}"] = functools.partial(drain, loader)
    for size in setting.step_sizes:
        images, labels = same_images(data[0], size, device)
        batch = normalize(images).contiguous()
        works[f"step {size}"] = repeated(functools.partial(step, batch, labels), setting.step_times(size))
    works["evaluation"] = lambda: plain_recipe.evaluate(model, test, device)
    works["epoch"] = epoch
    return works


def drain(loader: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Take all batches of an epoch from `loader`, with no training; counts the images."""
    return sum(len(labels) for _, labels in loader)


def same_images(split: Split, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`size` images (uint8 [size, 32, 32, 3]) and labels of `split` on the device, repeated where too few."""
    chosen = np.resize(np.arange(len(split.labels)), size)
    images, labels = torch.from_numpy(split.images[chosen]), torch.from_numpy(split.labels[chosen])
    return images.to(device), labels.to(device)


class PlainSide:
    """The process; use it in a `with` statement, which ends it."""

    def __init__(self, setting: Setting, data: tuple[Split, Split]) -> None:
        context = multiprocessing.get_context("spawn")  # fork would hand this process's settings on
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setting, data))
        self._process.start()
        theirs.close()

    def __enter__(self) -> "PlainSide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(LEAVE_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def measure(self, name: str) -> Sample:
        """Do the work called `name` there once, and measure it.

        Raises:
            RunError: it failed, or the process ended.
        """
        try:
            self._pipe.send(name)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(LEAVE_S)
            raise RunError(
                f"the plain recipe's process ended with exit code {self._process.exitcode}"
            ) from None
        if not isinstance(answer, Sample):
            raise RunError(f"the plain recipe failed: {answer}")
        return answer


def _serve(pipe: Connection, setting: Setting, data: tuple[Split, Split]) -> None:
    """Measure what is asked for by name, until the other end closes."""
    try:
        works = plain_works(setting, data)
        while True:
            pipe.send(timed(works[pipe.recv()], setting.device))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except Exception as error:  # no traceback from a second process: the first one says it in a line
        pipe.send(f"{type(error).__name__}: {error}"[:300])
