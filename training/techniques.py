"""The optional techniques of a training step, each off by default, and what builds them from a recipe.

All that is random follows from (seed, step, rank), so that a resumed run draws what the unbroken one would
have drawn, and no two steps or ranks draw the same.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.transforms import v2

from cifar.dataset import Split
from core import distributed
from core.machine import autocast
from training.checkpoint import load_weights
from training.recipe import Recipe
from utils import make_test_batches

# Random streams, as the loader has its own (spawn keys 0 and 1).
MIX_STREAM, NETWORK_STREAM = 17, 18
# The radii that the papers found best for CIFAR-100.
SAM_RHO = {"sam": 0.1, "asam": 1.0}
# ASAM scales the perturbation of a weight by |w| plus this.
ASAM_ETA = 0.01
# Training images on which SWA's BatchNorm statistics are computed after each epoch.
BN_UPDATE_IMAGES = 5000


@dataclass(frozen=True, eq=False)
class Techniques:
    """What a recipe adds to the plain training step, in the order in which `TrainStep` applies it."""

    network_seed: "StepSeed | None" = None  # for networks with dropout or stochastic depth
    progressive_size: "ProgressiveSize | None" = None
    mixing: "Mixing | None" = None
    accumulate: int = 1  # micro-batches per batch
    distillation: "Distillation | None" = None
    sam: "SharpnessAware | None" = None
    clip_norm: float = 0.0  # maximum norm of the whole gradient; 0: no clipping
    averaging: "Averaging | None" = None


def build_techniques(
    recipe: Recipe,
    model: nn.Module,
    *,
    classes: int,
    batches_per_epoch: int,
    teachers: Sequence[nn.Module] = (),
    bn_batches: Sequence[tuple[Tensor, Tensor]] = (),
) -> Techniques:
    """The techniques of `recipe`.

    Args:
        model: the network on its device, before it is wrapped or compiled.
        teachers: the networks of `recipe.teacher`, on the same device.
        bn_batches: see `bn_update_batches`.
    """
    rank = distributed.rank()
    network_seed = progressive_size = mixing = distillation = sam = averaging = None
    if recipe.drop_path or recipe.dropout:
        network_seed = StepSeed(recipe.seed, NETWORK_STREAM, rank)
    if recipe.image_sizes is not None:
        progressive_size = ProgressiveSize(recipe.image_sizes, recipe.epochs, batches_per_epoch)
    if recipe.mix != "none":
        mixing = Mixing(
            recipe.mix,
            StepSeed(recipe.seed, MIX_STREAM, rank),
            classes=classes,
            probability=recipe.mix_probability,
            mixup_alpha=recipe.mixup_alpha,
            cutmix_alpha=recipe.cutmix_alpha,
        )
    if teachers:
        distillation = Distillation(
            teachers,
            alpha=recipe.distill_alpha,
            weight=recipe.distill_weight,
            temperature=recipe.distill_temperature,
            standardize=recipe.distill_standardize,
            precision=recipe.precision,
        )
    if recipe.sam != "none":
        rho = recipe.sam_rho or SAM_RHO[recipe.sam]
        first_step = ((recipe.sam_start or 1) - 1) * batches_per_epoch
        sam = SharpnessAware(model, rho, adaptive=recipe.sam == "asam", first_step=first_step)
    if recipe.uses_averaging:
        averaging = Averaging(
            model,
            ema_decay=recipe.ema_decay,
            swa_start=recipe.swa_start or 1,
            batches_per_epoch=batches_per_epoch,
            bn_batches=bn_batches,
        )
    return Techniques(
        network_seed=network_seed,
        progressive_size=progressive_size,
        mixing=mixing,
        accumulate=recipe.accumulate,
        distillation=distillation,
        sam=sam,
        clip_norm=recipe.clip_norm,
        averaging=averaging,
    )


@dataclass(frozen=True)
class StepSeed:
    """A random stream of a run that is seeded anew for each training step.

    Attributes:
        stream: the number of the stream, which keeps it apart from the others of the same run.
    """

    seed: int
    stream: int
    rank: int = 0

    def __call__(self, step: int) -> int:
        """The 64-bit seed of `step`, mixed so that neighbouring steps, ranks and seeds are unrelated."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.stream, step, self.rank))
        high, low = sequence.generate_state(2, np.uint32)
        return int(high) << 32 | int(low)


class ProgressiveSize:
    """Training on smaller images first: `sizes` (pixels a side), each for an equal part of the epochs.

    Images are resized on the device, bilinearly with antialiasing, from the 32x32 that augmentation made.
    That costs a percent of the step, and a loader that works ahead need not know about it.
    """

    def __init__(self, sizes: tuple[int, ...], epochs: int, batches_per_epoch: int) -> None:
        self.sizes, self.epochs, self.batches_per_epoch = sizes, epochs, batches_per_epoch

    def size(self, epoch: int) -> int:
        """The side in pixels in `epoch`, which counts from 0."""
        return self.sizes[min(epoch, self.epochs - 1) * len(self.sizes) // self.epochs]

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """`images` (float [N, 3, H, W]) at the size of the epoch that `step` (from 0) belongs to."""
        side = self.size(step // self.batches_per_epoch)
        if images.shape[2:] == (side, side):
            return images
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last)


class Mixing:
    """MixUp (Zhang et al. 2018, arXiv:1710.09412), CutMix (Yun et al. 2019, arXiv:1905.04899), or either.

    Each image is mixed with the one before it in the shuffled batch; one ratio, drawn from Beta(alpha,
    alpha), holds for the whole batch. The targets become float32 [N, classes] that sum to 1; a batch that is
    not mixed keeps its labels int64 [N].

    Args:
        kind: "mixup", "cutmix", or "both": one of the two for each batch, with equal probability.
        probability: that a batch is mixed.
    """

    def __init__(
        self,
        kind: str,
        step_seed: StepSeed,
        *,
        probability: float,
        mixup_alpha: float,
        cutmix_alpha: float,
        classes: int,
    ) -> None:
        known = {
            "mixup": v2.MixUp(alpha=mixup_alpha, num_classes=classes),
            "cutmix": v2.CutMix(alpha=cutmix_alpha, num_classes=classes),
        }
        self.transforms = list(known.values()) if kind == "both" else [known[kind]]
        self.probability, self.step_seed = probability, step_seed

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix `images` (float [N, 3, H, W]) and `labels` (int64 [N]); `step` counts from 0."""
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's global generator
            torch.default_generator.manual_seed(self.step_seed(step))
            draw, which = torch.rand(2).tolist()
            if draw >= self.probability:
                return images, labels
            transform = self.transforms[int(which * len(self.transforms))]
            images, targets = transform(images, labels)
        return images.contiguous(memory_format=torch.channels_last), targets


def soft_hits(predicted: Tensor, targets: Tensor) -> Tensor:
    """How many of the classes `predicted` (int64 [N]) are correct, a scalar on the device.

    For labels int64 [N] it is a count. For mixed targets float [N, classes] each image counts as the weight
    of its predicted class, as in MixUp's own code, so even a perfect network scores less than 100 %.
    """
    if targets.ndim == 1:
        return (predicted == targets).sum()
    return targets.gather(1, predicted[:, None]).sum()


class Distillation:
    """Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) from one or several trained networks.

    The loss becomes (1 - alpha) x the loss against the labels + weight x T^2 KL(teacher || student), with
    both distributions softened by the temperature T; T^2 keeps the gradients' scale independent of T. The
    teachers see the very images that the student sees, in evaluation mode; several teach their mean
    probabilities.

    Args:
        teachers: networks on the training device; put into evaluation mode and never trained.
        weight: alpha by default.
        standardize: subtract each image's mean logit and divide by their standard deviation before softening,
            of student and teachers alike, so that the student need not match the teachers' scale (Sun et al.
            2024, arXiv:2403.01427).
        precision: "fp32", or "bf16" or "fp16" for autocast of the teachers' forward passes.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        *,
        alpha: float,
        weight: float | None = None,
        temperature: float,
        standardize: bool = False,
        precision: str = "fp32",
    ) -> None:
        self.teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        self.alpha, self.weight = alpha, alpha if weight is None else weight
        self.temperature, self.standardize, self.precision = temperature, standardize, precision

    @torch.no_grad()
    def soft_targets(self, images: Tensor) -> Tensor:
        """The logarithm of the teachers' mean probabilities, softened: float32 [N, classes].

        Args:
            images: normalised float32 [N, 3, H, W].
        """
        with autocast(images.device, self.precision):
            logits = torch.stack([teacher(images).float() for teacher in self.teachers])
        return self._soften(logits).logsumexp(dim=0) - math.log(len(logits))

    def __call__(self, loss: Tensor, logits: Tensor, soft_targets: Tensor) -> Tensor:
        """The loss to train on, a scalar in nats.

        Args:
            loss: the mean loss against the labels, a scalar.
            logits: the student's, float32 [N, classes].
            soft_targets: those of the same images.
        """
        divergence = F.kl_div(self._soften(logits), soft_targets, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * loss + self.weight * (self.temperature**2 * divergence)

    def _soften(self, logits: Tensor) -> Tensor:
        """The logarithm of the softened probabilities, [..., classes] as `logits`."""
        if self.standardize:
            logits = standardized(logits)
        return F.log_softmax(logits / self.temperature, dim=-1)


def standardized(logits: Tensor) -> Tensor:
    """`logits` [..., classes] with mean 0 and standard deviation 1 for each image; equal ones become 0."""
    deviation, mean = torch.std_mean(logits, dim=-1, keepdim=True)
    return (logits - mean) / (deviation + 1e-7)


class SharpnessAware:
    """SAM (Foret et al. 2021, arXiv:2010.01412) and ASAM (Kwon et al. 2021, arXiv:2102.11600).

    The gradients are replaced by those at the weights w + e, a step of length `rho` uphill: e = rho g / |g|,
    or, for ASAM, e = rho T^2 g / |T g| with T = |w| + 0.01 for weights and 1 for biases, as in the authors'
    code. The weights are then restored bit for bit, and BatchNorm's running statistics are updated by the
    first pass only. With several processes g is the mean over all of them, so that e is the same on each;
    the papers let each process take a step of its own.

    It is used from step `first_step` (counted from 0) on: in the last epochs alone it gains nearly as much as
    in all (Zhou et al. 2025, arXiv:2410.10373).
    """

    def __init__(self, model: nn.Module, rho: float, *, adaptive: bool = False, first_step: int = 0) -> None:
        self.model, self.rho, self.adaptive, self.first_step = model, rho, adaptive, first_step

    @torch.no_grad()
    def __call__(self, closure: Callable[[], object]) -> None:
        """Replace the gradients; `closure` computes the batch's gradients at the weights as they are."""
        named = [(name, value) for name, value in self.model.named_parameters() if value.grad is not None]
        weights = [value for _, value in named]
        uphill = [value.grad.clone() for value in weights]
        if self.adaptive:
            scales = [v.abs() + ASAM_ETA if n.endswith("weight") else torch.ones_like(v) for n, v in named]
            torch._foreach_mul_(uphill, scales)
        norm = torch.stack(torch._foreach_norm(uphill)).norm()
        if self.adaptive:
            torch._foreach_mul_(uphill, scales)
        torch._foreach_mul_(uphill, self.rho / (norm + 1e-12))
        before = [value.clone() for value in weights]
        torch._foreach_add_(weights, uphill)
        with torch.enable_grad(), frozen_bn_statistics(self.model):
            closure()
        torch._foreach_copy_(weights, before)


@contextlib.contextmanager
def frozen_bn_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm normalises by the batch, as in training, but leaves its running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True


class Averaging:
    """An average of the weights of `model` over a run, as a network of its own: `network`.

    - With `ema_decay`, the exponential moving average (Tarvainen & Valpola 2017, arXiv:1703.01780), updated
      after each step: average <- d average + (1 - d) weights, starting from the weights after the first step.
      d is `ema_decay`, at first less (see `decay_after`). BatchNorm's running statistics are averaged too.
    - Without, stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407): the equal average of the
      weights at the ends of the epochs from `swa_start` (counted from 1). Averaged running statistics would
      not be those of the averaged weights, so `refresh` computes them on `bn_batches`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ema_decay: float = 0.0,
        swa_start: int = 1,
        batches_per_epoch: int = 1,
        bn_batches: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.source, self.bn_batches = model, bn_batches
        self.ema_decay, self.swa_start, self.batches_per_epoch = ema_decay, swa_start, batches_per_epoch
        update = self._update_ema if ema_decay else None
        self.average = AveragedModel(model, multi_avg_fn=update, use_buffers=bool(ema_decay))

    @property
    def network(self) -> nn.Module:
        """The network with averaged weights; the trained one itself as long as nothing is averaged."""
        return self.average.module if int(self.average.n_averaged) else self.source

    def __call__(self, steps_done: int) -> None:
        """Update the average; to be called after every optimizer step with the number of steps so far."""
        epochs_done, batch = divmod(steps_done, self.batches_per_epoch)
        if self.ema_decay or (batch == 0 and epochs_done >= self.swa_start):
            self.average.update_parameters(self.source)

    @torch.no_grad()
    def _update_ema(self, averages: list[Tensor], values: list[Tensor], _count: Tensor) -> None:
        """AveragedModel's update: average <- d average + (1 - d) value; integers are copied."""
        if averages[0].is_floating_point():
            # the module's own counter, not `_count`: it is on the CPU, where reading it waits for no device
            decay = decay_after(int(self.average.n_averaged), self.ema_decay)
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make `network` ready for testing: SWA's BatchNorm statistics, and rank 0's on every rank."""
        if not self.ema_decay and int(self.average.n_averaged):
            update_bn(self.bn_batches, self.average.module)
        # without --sync-bn each rank averages statistics of its own; rank 0's are those in the checkpoints
        distributed.broadcast_buffers(self.network)

    def state(self) -> dict[str, Any]:
        """The average and how many weights are in it, for a checkpoint."""
        return {"model": self.average.module.state_dict(), "count": int(self.average.n_averaged)}

    def restore(self, state: dict[str, Any], source: object) -> None:
        """Restore what `state` returned; `source` names its file in errors.

        Raises:
            RunError: the weights do not fit the network.
            KeyError, TypeError, ValueError: `state` is of another kind.
        """
        load_weights(self.average.module, state["model"], source)
        self.average.n_averaged.fill_(int(state["count"]))


def decay_after(count: int, decay: float) -> float:
    """The EMA's decay once `count` values are in it: (1 + count) / (10 + count), at most `decay`.

    With a constant decay of 0.999 the average would stay near the first weights for hundreds of steps. The
    formula is that of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    return min(decay, (1 + count) / (10 + count))


def bn_update_batches(split: Split, recipe: Recipe, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The batches for SWA's BatchNorm statistics: unaugmented, the same on every rank; none without SWA."""
    if recipe.swa_start is None:
        return []
    subset = Split(split.images[:BN_UPDATE_IMAGES], split.labels[:BN_UPDATE_IMAGES])
    return make_test_batches(subset, recipe.batch_size, device)
