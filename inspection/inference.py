"""A network's logits for a whole split, through the engine's own test loop; and their mean over views."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from core.machine import autocast
from training.engine import Metrics, evaluate

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
View = Callable[[torch.Tensor], torch.Tensor]


def logits_of(
    model: nn.Module, batches: Batches, *, precision: str = "fp32", title: str = "test"
) -> tuple[Metrics, torch.Tensor]:
    """`engine.evaluate`'s figures, and the logits that they come from: float32 [N, K] on the CPU.

    The logits are taken where the loop makes them, so that nothing can differ from a test during training.

    Args:
        batches: as of `utils.make_test_batches`.
        title: what the progress bar says.
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
    """`logits_of`, and its images/s: from images on the device to figures on the host, without loading.

    A GPU first runs one batch untimed, since it chooses its kernels then.
    """
    device = batches[0][0].device
    if device.type != "cpu":
        with torch.inference_mode(), autocast(device, precision):
            model.eval()(batches[0][0])[0, 0].item()  # waits for the device
    start = time.perf_counter()
    metrics, logits = logits_of(model, batches, precision=precision)
    return metrics, logits, metrics.images / (time.perf_counter() - start)


def shifted(images: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """[N, C, H, W] moved by whole pixels, fewer than its size; reflection fills the uncovered edge."""
    height, width = images.shape[2:]
    padding = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    padded = F.pad(images, padding, mode="reflect")
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)


def _view(down: int, right: int, mirrored: bool) -> View:
    def view(images: torch.Tensor) -> torch.Tensor:
        moved = shifted(images, down, right)
        return moved.flip(3) if mirrored else moved

    return view


# The image as it is, moved by a pixel in four directions, and the mirror images of these five. The set is
# closed under mirroring: an image and its mirror image get the same mean.
VIEWS: tuple[View, ...] = tuple(
    _view(down, right, mirrored)
    for mirrored in (False, True)
    for down, right in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
)


def averaged_log_probabilities(
    model: nn.Module, batches: Batches, *, precision: str = "fp32", views: Sequence[View] = VIEWS
) -> torch.Tensor:
    """Logarithms of the probabilities averaged over `views` of each image: float64 [N, K] on the CPU.

    Probabilities are averaged, not logits: a view that the network is unsure about then weighs less.
    """
    total: torch.Tensor | float = 0.0
    for number, view in enumerate(views, start=1):
        seen = [(view(images), labels) for images, labels in batches]
        title = f"view {number}/{len(views)}"
        _, logits = logits_of(model, seen, precision=precision, title=title)
        total = total + logits.double().softmax(dim=1)
    return (total / len(views)).log()
