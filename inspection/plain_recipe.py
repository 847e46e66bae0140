"""The plain way to train on CIFAR, which benchmark.py compares with: fp32, NCHW, eager, sample by sample.

It follows public training scripts: an `A.Compose` that ends in Normalize and ToTensorV2, called for each
sample; the default collate function; `loss.item()` and the hits read after every step; evaluation through a
DataLoader that runs the test pipeline on every image in every epoch.

benchmark.py starts this file by its path, as a process of its own. It imports nothing of the project but the
network, so that the project's settings (torch's switches, memory) make it neither faster nor slower.
"""

import io
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# Read at import: without it albumentations asks PyPI for its newest version, in every worker.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np
import torch
import torch.nn.functional as F
from albumentations.pytorch import ToTensorV2
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

Images = tuple[np.ndarray, np.ndarray]  # uint8 [N, 32, 32, 3] and labels int64 [N]

NORMALIZE = A.Normalize(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
TEST_TRANSFORM = A.Compose([NORMALIZE, ToTensorV2()])
HOLE = {"num_holes_range": (1, 1), "hole_height_range": (16, 16), "hole_width_range": (16, 16)}
# The project's default augmentation with its numbers, from the library's own classes.
TRAIN_TRANSFORM = A.Compose(
    [
        A.HorizontalFlip(p=0.5),
        A.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5),
        A.CoarseDropout(**HOLE, fill=0, p=0.5),
        A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, p=0.5),
        NORMALIZE,
        ToTensorV2(),
    ]
)


class PlainDataset(Dataset):
    """(float32 [3, 32, 32], label) for each sample, through `transform`."""

    def __init__(self, data: Images, transform: A.Compose) -> None:
        self.images, self.labels = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(image=self.images[index])["image"], int(self.labels[index])


class PlainRecipe:
    """The work to be measured: each method does it once and returns its number of images.

    Args:
        steps: training steps of one call of `step`.
        workers: processes of each loader.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        train: Images,
        test: Images,
        batch_size: int,
        steps: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self.model, self.device, self.steps = model.to(device), device, steps
        self.optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
        # lasting workers favour this side: most scripts start them anew each epoch
        options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda")
        dataset = PlainDataset(train, TRAIN_TRANSFORM)
        self.train_loader = DataLoader(dataset, batch_size, shuffle=True, **options)
        self.test_loader = DataLoader(PlainDataset(test, TEST_TRANSFORM), batch_size=1000, **options)
        images, labels = next(iter(DataLoader(dataset, batch_size)))
        self.batch = images.to(device), labels.to(device)

    def loader(self) -> int:
        """Take all batches of an epoch from the training loader."""
        return sum(len(labels) for _, labels in self.train_loader)

    def step(self) -> int:
        """Train `steps` times on the same batch, which is on the device already."""
        return self._run([self.batch] * self.steps, train=True)

    def evaluation(self) -> int:
        """Loss and accuracy over the test images."""
        return self._run(self.test_loader, train=False)

    def epoch(self) -> int:
        """Train on all images, then evaluate; returns the number of training images."""
        images = self._run(self.train_loader, train=True)
        self.evaluation()
        return images

    def _run(self, batches: Iterable[tuple[Tensor, Tensor]], *, train: bool) -> int:
        self.model.train(train)
        seen, loss_sum, hits = 0, 0.0, 0
        for images, labels in batches:
            images, labels = images.to(self.device), labels.to(self.device)
            with torch.set_grad_enabled(train):
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels)
            if train:
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            loss_sum += loss.item() * len(labels)
            hits += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
        return seen


def images_per_s(work: Callable[[], int], device: torch.device) -> float:
    """Do `work` once; the images that it returns per second, until the device has finished them."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    images = work()
    synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    """Measure what benchmark.py asks for on standard input, until the pipe is closed.

    The first object there holds the arguments of `PlainRecipe`, network and device by name; each further one
    is a method's name, answered on standard output by the rate in images/s, or an error as text.
    """
    answers = io.FileIO(sys.stdout.fileno(), "w")
    sys.stdout = sys.stderr  # what a library prints is no answer
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from model import build_model  # the same network on both sides; it needs torch alone

    try:
        options = pickle.load(sys.stdin.buffer)
        device, model = torch.device(options.pop("device")), build_model(options.pop("model"))
        recipe = PlainRecipe(model, device=device, **options)
        while True:
            work = getattr(recipe, pickle.load(sys.stdin.buffer))
            pickle.dump(images_per_s(work, device), answers)
    except (EOFError, BrokenPipeError):  # benchmark.py has ended
        return
    except Exception as error:  # no traceback from a second process: benchmark.py reports it in one line
        pickle.dump(f"{type(error).__name__}: {error}"[:300], answers)


if __name__ == "__main__":
    main()
