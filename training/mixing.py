"""What is done to a training batch on the device: images of pairs mixed, sizes by epoch, seeded draws.

Each is called with the normalised images [N, 3, H, W], the targets and the number of the step from the run's
first (from 0), and returns images and targets. All that is random follows from (seed, step, rank), so that a
resumed run draws what the unbroken one would have, and no two steps or ranks draw the same.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

# Streams of draws: the loader has its own (its first spawn keys are 0 and 1).
MIX, DRAWS = 17, 18


def key(seed: int, stream: int, step: int, rank: int) -> int:
    """A 64-bit seed from all four, mixed so that neighbours have nothing in common."""
    words = np.random.SeedSequence(seed, spawn_key=(stream, step, rank)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


class Mixing:
    """MixUp (Zhang et al. 2018, arXiv:1710.09412), CutMix (Yun et al. 2019, arXiv:1905.04899), or either.

    Each image is mixed with the one before it in the batch, which the loader has shuffled; one share, drawn
    from Beta(alpha, alpha), holds for the whole batch. The targets become float32 [N, classes] that sum to 1;
    a batch that chance leaves unmixed keeps its labels int64 [N].

    Args:
        kind: "mixup", "cutmix", or "both": one of the two for each batch, with equal chances.
        probability: that a batch is mixed at all.
    """

    def __init__(
        self,
        kind: str,
        *,
        probability: float,
        mixup_alpha: float,
        cutmix_alpha: float,
        classes: int,
        seed: int,
        rank: int = 0,
    ) -> None:
        known = {
            "mixup": v2.MixUp(alpha=mixup_alpha, num_classes=classes),
            "cutmix": v2.CutMix(alpha=cutmix_alpha, num_classes=classes),
        }
        self.transforms = list(known.values()) if kind == "both" else [known[kind]]
        self.probability, self.seed, self.rank = probability, seed, rank

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
            torch.default_generator.manual_seed(key(self.seed, MIX, step, self.rank))
            mixed, which = torch.rand(2).tolist()
            if mixed >= self.probability:
                return images, labels
            transform = self.transforms[int(which * len(self.transforms))]
            images, targets = transform(images, labels)
        return images.contiguous(memory_format=torch.channels_last), targets


def soft_hits(predicted: Tensor, targets: Tensor) -> Tensor:
    """How many of the classes `predicted` (int64 [N]) are right, a scalar on the device.

    For labels int64 [N] it is a count. For shares float [N, classes] each image counts as the share that the
    predicted class has of it, as in MixUp's own code: a perfect network then scores less than 100 %.
    """
    if targets.ndim == 1:
        return (predicted == targets).sum()
    return targets.gather(1, predicted[:, None]).sum()


class ProgressiveSize:
    """Small images first: `sizes` (pixels), each for an equal part of the epochs.

    Images are scaled on the device, bilinearly with antialiasing, from the 32x32 that augmentation made:
    that is a percent of the step, and a loader that works ahead need not know about it.
    """

    def __init__(self, sizes: tuple[int, ...], *, epochs: int, batches_per_epoch: int) -> None:
        self.sizes, self.epochs, self.batches_per_epoch = sizes, epochs, batches_per_epoch

    def size(self, epoch: int) -> int:
        """The side in pixels in `epoch`, which counts from 0."""
        return self.sizes[min(epoch, self.epochs - 1) * len(self.sizes) // self.epochs]

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        side = self.size(step // self.batches_per_epoch)
        if images.shape[2:] == (side, side):
            return images, targets
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last), targets


class SeededDraws:
    """Seed what the network draws in this step (dropout, stochastic depth); the batch stays as it is."""

    def __init__(self, *, seed: int, rank: int = 0) -> None:
        self.seed, self.rank = seed, rank

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(key(self.seed, DRAWS, step, self.rank))
        return images, targets
