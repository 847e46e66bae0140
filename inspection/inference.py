"""A network's logits for a whole split, by the engine's own test loop, and test-time augmentation."""

import time
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from training.engine import Metrics, evaluate

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
View = tuple[int, int, bool]  # pixels down and right, mirrored
# The image as it is, moved by a pixel in four directions, and the mirror images of these five. The set is
# closed under mirroring: an image and its mirror image get the same mean.
SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
VIEWS: tuple[View, ...] = tuple((down, right, flip) for flip in (False, True) for down, right in SHIFTS)


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
