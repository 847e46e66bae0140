"""Fixtures that several test files share."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: tests run side by side, and waiting threads would only slow the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background inherits an ignored SIGINT, and so would every process that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest

from helpers import REPOSITORY
from helpers.tiny_cifar import TinyCifar, install_tiny_cifar, tiny_contents

if TYPE_CHECKING:
    import torch

    from helpers.driver import Driver
    from helpers.small_run import Evaluated


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """A folder that holds the real CIFAR-100 (unpacked), from $CIFAR_DATA or data/; else skips."""
    for folder in (os.environ.get("CIFAR_DATA"), REPOSITORY / "data"):
        if folder and (Path(folder) / "cifar-100-python" / "train").is_file():
            return Path(folder)
    pytest.skip("the real CIFAR-100 is neither in $CIFAR_DATA nor in data/")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Driver"]:
    """Runs train.py on a small data set, as often as you like, at the price of one import."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    from helpers.driver import Driver

    made = Driver(tmp_path_factory.mktemp("driver"))
    yield made
    made.close()


@pytest.fixture
def tiny_cifar(monkeypatch: pytest.MonkeyPatch) -> TinyCifar:
    """A look-alike of CIFAR-100 whose checksums `dataset` takes for the official ones."""
    return install_tiny_cifar(monkeypatch, tiny_contents())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """train.main() on stand-ins, without plots, in an empty folder; standard input is at its end."""
    from helpers.stand_ins import forget_log, stand_in

    stand_in(monkeypatch, plots=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    yield monkeypatch
    forget_log()


@pytest.fixture
def finder(quick: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the LR finder and suggests 0.02; the list says whether it ran."""
    import train
    from utils import LRFinderResult

    ran: list[str] = []

    def find_lr(*_: object, **__: object) -> LRFinderResult:
        ran.append("ran")
        rates, losses = np.logspace(-4, 0, 30).tolist(), np.linspace(5, 4, 30).tolist()
        return LRFinderResult(rates, losses, losses, 0.02, "steepest descent of the smoothed loss")

    quick.setattr(train, "find_lr", find_lr)
    quick.setattr(train, "plot_lr_finder", lambda *arguments, **_: arguments[3])
    return ran


@pytest.fixture
def fixed_seed() -> None:
    """The test's draws from torch's global generator are the same each time."""
    import torch

    torch.manual_seed(1234)


@pytest.fixture(scope="module")
def bright_images() -> np.ndarray:
    """uint8 [300, 32, 32, 3]: smooth random images, in which no pixel is black."""
    import cv2

    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 256, (300, 6, 6, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_LINEAR) for image in coarse])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Evaluated"]:
    """A small run, and its evaluation."""
    from helpers.small_run import evaluate_small_run

    folder, data_dir = tmp_path_factory.mktemp("output"), tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        yield evaluate_small_run(patch, folder, data_dir)


@pytest.fixture
def tf32_gpu(monkeypatch: pytest.MonkeyPatch) -> "torch.device":
    """A GPU with TF32, as far as its name and capability go."""
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    return torch.device("cuda", 0)


@pytest.fixture
def few_images() -> np.ndarray:
    """Smooth random images, uint8 [20, 32, 32, 3]."""
    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(image).resize((32, 32))) for image in small])
