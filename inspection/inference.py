"""Logits of a whole split, by the engine's own test loop; averages over views; accuracy on shifted images."""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cifar.dataset import Split, balanced_subset
from training.engine import Metrics, evaluate
from utils import make_test_batches

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
View = tuple[int, int, bool]  # pixels down and right, mirrored
# The image as it is, moved by a pixel in four directions, and the mirror images of these five. The set is
# closed under mirroring: an image and its mirror image get the same mean.
SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
VIEWS: tuple[View, ...] = tuple((down, right, flip) for flip in (False, True) for down, right in SHIFTS)

# Every other pixel on a fifth of the images: the 25 passes of `shift_accuracy` cost five over all images.
SHIFTS_PX = (-4, -2, 0, 2, 4)
SHIFT_SHARE = 5


class ShiftAccuracy(NamedTuple):
    """Top-1 of shifted images: float64 [5, 5], moved down (rows) and right (columns) by SHIFTS_PX.

    `images` is the number of images, which are the same ones for every shift.
    """

    top1_percent: np.ndarray
    images: int


def logits_of(
    model: nn.Module, batches: Batches, *, precision: str = "fp32", title: str = "test"
) -> tuple[Metrics, torch.Tensor]:
    """`engine.evaluate`'s metrics, and the logits they come from: float32 [N, K] on the CPU.

    A hook collects the logits within the loop, so that nothing can differ from a test during training.
    """
    kept: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _model, _inputs, logits: kept.append(logits.float()))
    try:
        metrics = evaluate(model, batches, precision=precision, title=title)
    finally:
        hook.remove()
    return metrics, torch.cat(kept).cpu()


def timed_logits(
    model: nn.Module, batches: Batches, *, precision: str = "fp32"
) -> tuple[Metrics, torch.Tensor, float]:
    """`logits_of`, and its images/s: from images on the device to metrics on the host, without loading.

    A GPU first runs one batch untimed, in which it chooses its kernels.
    """
    if batches[0][0].device.type != "cpu":
        evaluate(model, batches[:1], precision=precision)
    start = time.perf_counter()
    metrics, logits = logits_of(model, batches, precision=precision)
    return metrics, logits, metrics.images / (time.perf_counter() - start)


def shifted(images: torch.Tensor, down: int, right: int, mirrored: bool = False) -> torch.Tensor:
    """[N, C, H, W] moved by at most a pixel each way, the edge filled by reflection; mirrored if asked."""
    height, width = images.shape[2:]
    top, left = 1 - down, 1 - right
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = padded[:, :, top : top + height, left : left + width]
    moved = moved.contiguous(memory_format=torch.channels_last)
    return moved.flip(3) if mirrored else moved


def averaged_log_probabilities(
    model: nn.Module, batches: Batches, *, precision: str = "fp32", views: Sequence[View] = VIEWS
) -> torch.Tensor:
    """The logarithm of the probabilities averaged over `views` of each image: float64 [N, K] on the CPU.

    Probabilities are averaged, not logits: a view that the network is unsure about then weighs less.
    """

    def view_logits(number: int, view: View) -> torch.Tensor:
        seen = [(shifted(images, *view), labels) for images, labels in batches]
        return logits_of(model, seen, precision=precision, title=f"view {number}/{len(views)}")[1]

    return mean_probabilities(view_logits(*numbered) for numbered in enumerate(views, start=1)).log()


def mean_probabilities(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """The probabilities averaged over views, float64 [N, K], from the logits [N, K] of each view."""
    probabilities = [view_logits.double().softmax(dim=1) for view_logits in logits]
    return torch.stack(probabilities).mean(dim=0)


def shift_accuracy(
    model: nn.Module, split: Split, *, batch_size: int, precision: str = "fp32"
) -> ShiftAccuracy:
    """Top-1 on a class-balanced fifth of the split, shifted by whole pixels.

    The strip that a shift uncovers is black, as after the affine transform and the crop of the training
    augmentations.
    """
    subset = balanced_subset(split, -(-len(split) // SHIFT_SHARE), seed=0)
    device = next(model.parameters()).device
    height, width = subset.images.shape[1:3]
    edge = max(SHIFTS_PX)
    padded = np.pad(subset.images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    accuracy = np.empty((len(SHIFTS_PX), len(SHIFTS_PX)))
    for row, column in np.ndindex(accuracy.shape):
        top, left = edge - SHIFTS_PX[row], edge - SHIFTS_PX[column]
        moved = Split(padded[:, top : top + height, left : left + width], subset.labels)
        batches = make_test_batches(moved, batch_size, device)
        title = f"shift {row * len(SHIFTS_PX) + column + 1}/{accuracy.size}"
        accuracy[row, column] = evaluate(model, batches, precision=precision, title=title).accuracy_percent
    return ShiftAccuracy(accuracy, len(subset))
