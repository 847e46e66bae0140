"""A stand-in network and stand-in images for tests of train.py: a run of it takes no time."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from cifar import dataset
from cifar.dataset import ImageData, Split
from core.cli import LOG
from model import MODELS, BasicBlock

# Nothing asked, nothing measured: 3 batches an epoch, whatever the processor.
QUICK = ["--yes", "--no-lr-finder", "--model", "resnet20", "--batch-size", "100", "--precision", "fp32"]
EPOCH_LINE = re.compile(
    r"Epoch \[(\d+)/(\d+)\] - Train Loss: (\d+\.\d{4}), Train Acc: (\d+\.\d{2})% - "
    r"(Test|Val) Loss: (\d+\.\d{4}), (?:Test|Val) Acc: (\d+\.\d{2})%"
    r"( \[target [\d.]+% reached\])?( \[best\])?( \(synthetic data\))?"
)


def stand_in_network(block: type, *, num_classes: int = 100, **_: object) -> nn.Module:
    """A network that trains in a millisecond, in the place of ResNet-20."""
    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, num_classes))


def stand_in_images() -> ImageData:
    """Noise with a tint for each class, 3 training and 2 test images a class: learnt in part."""
    draws = np.random.default_rng(0)
    tints = draws.integers(0, 200, (100, 1, 1, 3))

    def split(per_class: int) -> Split:
        labels = np.tile(np.arange(100), per_class)
        noise = draws.integers(0, 56, (len(labels), 32, 32, 3))
        return Split((tints[labels] + noise).astype(np.uint8), labels)

    names = tuple(f"class{label}" for label in range(100)), tuple(f"group{group}" for group in range(20))
    return ImageData("cifar100", split(3), split(2), *names, np.arange(100) // 5)


def stand_in(patch: pytest.MonkeyPatch, *, plots: bool = True) -> None:
    """Let train.py run on stand-ins."""
    data = stand_in_images()
    patch.setitem(MODELS, "resnet20", functools.partial(stand_in_network, BasicBlock))
    patch.setattr(train, "load_dataset", lambda name, *_, **__: replace(data, name=name))
    if not plots:
        patch.setattr(train, "plot_history", lambda rows, path, **_: path)


def without_data(patch: pytest.MonkeyPatch) -> None:
    """After `stand_in`, let CIFAR-100 be unavailable: not here, and its sources a port nobody listens at."""
    stand_in_set = train.load_dataset

    def load_dataset(name: str, *rest: object, **options: object) -> ImageData:
        return stand_in_set(name) if name == "synthetic" else dataset.load_dataset(name, *rest, **options)

    patch.setattr(train, "load_dataset", load_dataset)
    patch.setattr(dataset, "SOURCES", tuple(f"http://127.0.0.1:9/{name}.tar.gz" for name in "ab"))
    patch.delenv("CIFAR100_URL", raising=False)


def forget_log() -> None:
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


def epoch_lines(output: str) -> list[re.Match]:
    """The lines of the epochs, each matched by EPOCH_LINE."""
    matches = [EPOCH_LINE.fullmatch(line) for line in output.splitlines() if line.startswith("Epoch [")]
    assert matches and all(matches), output
    return matches


def columns(path: str | Path) -> dict[str, list[float]]:
    """The columns of a history CSV as numbers."""
    table = np.genfromtxt(path, delimiter=",", names=True)
    return {name: np.atleast_1d(table[name]).tolist() for name in table.dtype.names}


def load(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)
