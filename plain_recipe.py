"""The plain way to train on CIFAR, for benchmark.py to compare with: fp32, NCHW, eager, a sample at a time.

It follows what public training scripts do: a plain `A.Compose` that ends in Normalize and ToTensorV2, called
for each sample; the default collate function; `loss.item()` and the hits read after every step; and testing
through a DataLoader, with the test pipeline run anew for every image of every epoch.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from cifar.dataset import CIFAR100_MEAN, CIFAR100_STD, Split
from cifar.fast_transforms import A

# isort: split
from albumentations.pytorch import ToTensorV2  # after fast_transforms, which silences its look for updates


class PlainDataset(Dataset):
    """(float32 [3, 32, 32], label) a sample, through `transform`."""

    def __init__(self, split: Split, transform: A.Compose) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.transform(image=self.split.images[index])["image"]
        return image, int(self.split.labels[index])


def train_pipeline() -> A.Compose:
    """The reference's augmentation with its numbers, from the library's own classes."""
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5),
            A.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=(16, 16), hole_width_range=(16, 16), fill=0, p=0.5
            ),
            A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, p=0.5),
            A.Normalize(mean=CIFAR100_MEAN, std=CIFAR100_STD),
            ToTensorV2(),
        ]
    )


def test_pipeline() -> A.Compose:
    """Normalisation alone."""
    return A.Compose([A.Normalize(mean=CIFAR100_MEAN, std=CIFAR100_STD), ToTensorV2()])


def make_loader(
    split: Split, batch_size: int, *, train: bool, workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Batches of (float32 [B, 3, 32, 32], int64 [B]): augmented and shuffled for training, in order else.

    The workers stay over the epochs, which favours this side: scripts mostly start them anew.
    """
    return DataLoader(
        PlainDataset(split, train_pipeline() if train else test_pipeline()),
        batch_size=batch_size,
        shuffle=train,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def train_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """One step on a batch (float32 [N, 3, 32, 32], int64 [N]): its summed loss in nats and its hits."""
    optimizer.zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    hits = (logits.argmax(1) == labels).sum().item()
    return loss.item() * len(labels), hits


def train_epoch(
    model: nn.Module, optimizer: Optimizer, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> int:
    """Train on the batches of `loader`; returns how many images there were."""
    model.train()
    seen, loss_sum, hits = 0, 0.0, 0
    for images, labels in loader:
        loss, right = train_step(model, optimizer, images.to(device), labels.to(device))
        loss_sum, hits, seen = loss_sum + loss, hits + right, seen + len(labels)
    return seen


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> int:
    """Test on the batches of `loader`; returns how many images there were."""
    model.eval()
    seen, loss_sum, hits = 0, 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss_sum += F.cross_entropy(logits, labels).item() * len(labels)
        hits += (logits.argmax(1) == labels).sum().item()
        seen += len(labels)
    return seen
