"""A stand-in network and stand-in images for tests of train.py: a run of it takes no time."""

import csv
import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from cifar.dataset import ImageData, Split
from core.cli import LOG
from model import MODELS, BasicBlock

TRAIN_IMAGES, TEST_IMAGES = 300, 200
# Nothing asked, nothing measured: 3 batches an epoch, whatever the processor.
QUICK = ["--yes", "--no-lr-finder", "--model", "resnet20", "--batch-size", "100", "--precision", "fp32"]
EPOCH_LINE = re.compile(
    r"Epoch \[(\d+)/(\d+)\] - Train Loss: (\d+\.\d{4}), Train Acc: (\d+\.\d{2})% - "
    r"(Test|Val) Loss: (\d+\.\d{4}), (?:Test|Val) Acc: (\d+\.\d{2})%"
    r"( \[target [\d.]+% reached\])?( \[best\])?( \(synthetic data\))?"
)

# The questions as they are asked; the suggested rate is that of the fixture `finder`.
FINDER = "Do you want to run LR Finder? (y/n, default: y): "
SUGGESTED = "Use suggested LR 2.00e-02? (y/n, default: y): "
RATE = "Enter learning rate (default 1.00e-01): "
EPOCHS = "Select number of epochs for training (default 20): "


def stand_in_network(block: type, *, num_classes: int = 100, **_: object) -> nn.Module:
    """A network that trains in a millisecond, in the place of ResNet-20."""
    layers = [
        nn.Conv2d(3, 8, 3, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(32, num_classes))


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
    """Let train.py run on stand-ins: in the fixture `quick`, or the whole program under a terminal."""
    data = stand_in_images()
    patch.setitem(MODELS, "resnet20", functools.partial(stand_in_network, BasicBlock))
    patch.setattr(train, "load_dataset", lambda name, *_, **__: replace(data, name=name))
    if not plots:
        patch.setattr(train, "plot_history", lambda rows, path, **_: path)


def forget_log() -> None:
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


def columns(path: str | Path) -> dict[str, list[float]]:
    """The columns of a history CSV as numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def load(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)


def taken(name: str = "CNN_Model") -> Path:
    """A finished run of that name, as far as its files go."""
    path = Path("output") / f"{name}_best.pth"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"precious")
    return path
