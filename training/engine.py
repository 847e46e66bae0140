"""The two batch loops, training and testing, and the training step that the first one calls.

Sums of loss and hits stay on the device; the host reads them when the progress bar refreshes and at the end,
because each read waits for the device. Means are over images, not over batches.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from core import distributed
from core.cli import LOG, progress_bar
from core.errors import RunError
from core.machine import autocast
from training.mixing import soft_hits
from training.techniques import Techniques
from utils import normalize

# On a CPU, testing runs fastest in pieces that stay in its caches: ResNet-56 tested 1.9 times as many
# images/s in pieces of 250 as in batches of 5000, with the same logits bit for bit.
CPU_TEST_PIECE = 250
# Fits 80 columns: the rate stands in the postfix, in images.
BAR_FORMAT = "{desc}:{percentage:3.0f}%|{bar}|{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
# On a GPU, read the sums every so many batches; on a CPU a read costs nothing.
SYNC_EVERY = 50


@dataclass(frozen=True)
class Metrics:
    """Means over the images of one pass: loss in nats an image, accuracy in percent."""

    loss: float
    accuracy_percent: float
    images: int


class Sums:
    """Running sums of one pass: loss (float64 where the device has it), hits, images; and bad batches.

    `values` is [loss sum, hits, images], on the device; `bad_batch` is the number of the first batch whose
    loss was not finite, or a huge number.
    """

    NONE = 2**31 - 1

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.values = torch.zeros(3, dtype=dtype, device=device)
        self.bad_batch = torch.tensor(self.NONE, device=device)

    def add(self, loss_sum: torch.Tensor, hits: torch.Tensor, images: int, batch: int) -> None:
        """Add one batch: its summed loss and its hits (scalars on the device)."""
        self.values[0] += loss_sum
        self.values[1] += hits
        self.values[2] += images
        number = torch.where(torch.isfinite(loss_sum), self.NONE, batch)
        self.bad_batch = torch.minimum(self.bad_batch, number)

    def metrics(self) -> Metrics:
        """The means so far on this process; waits for the device."""
        return _means(self.values)

    def metrics_over_ranks(self) -> Metrics:
        """The means over the images of all processes; waits for the device."""
        return _means(distributed.sum_over_ranks(self.values))

    def state(self) -> list[float]:
        """The sums as plain numbers (float64 is kept exactly), for a checkpoint."""
        return self.values.tolist()

    def restore(self, state: Sequence[float]) -> None:
        """Go on from what `state` returned."""
        self.values.copy_(torch.tensor(state, dtype=self.values.dtype))


def _means(values: torch.Tensor) -> Metrics:
    loss, hits, images = values.tolist()
    if not images:
        return Metrics(math.nan, math.nan, 0)
    return Metrics(loss / images, 100 * hits / images, int(images))


class TrainStep:
    """One optimizer step on a batch: forward, loss, backward, SGD, schedule.

    Args:
        model: the network; its weights are trained in place. In channels_last memory format.
        criterion: (logits [N, classes], labels int64 [N]) -> mean loss, a scalar in nats.
        optimizer, scheduler: the scheduler is stepped once a batch.
        precision: "fp32", or "bf16" for autocast of the forward pass.
        compile_model: run full batches through torch.compile; a batch of another size than the first
            runs eagerly, since compiling for one short batch an epoch costs more than it saves.
        sync_bn: with several processes, BatchNorm over the global batch.
        techniques: what the recipe adds; nothing by default.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        precision: str = "fp32",
        compile_model: bool = False,
        sync_bn: bool = False,
        techniques: Techniques | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        self.model = distributed.wrap(model, self.device, sync_bn=sync_bn)
        self.criterion = criterion
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.precision = precision
        self.techniques = techniques or Techniques()
        self.compiled = compiled(self.model, self.device) if compile_model else None
        self.compiled_size: int | None = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on `images` (uint8 [N, 32, 32, 3]) and `labels` (int64 [N]), both on the device.

        Returns:
            The summed loss of the batch in nats and the number of hits (`soft_hits` where images are
            mixed), scalars on the device.
        """
        batch, targets = normalize(images), labels
        for view in self.techniques.views:
            batch, targets = view(batch, targets, self.steps_done)
        loss_sum, hits = self._gradients(batch, targets)
        for refine in self.techniques.refinements:
            refine(lambda: self._gradients(batch, targets))
        self.optimizer.step()
        self.scheduler.step()
        if self.techniques.averaging is not None:
            self.techniques.averaging(self.steps_done)
        return loss_sum, hits

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the run's first; the scheduler counts them, and a checkpoint keeps that."""
        return self.scheduler.last_epoch

    def _gradients(self, batch: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the batch's gradients in the weights; return its summed loss and hits."""
        self.optimizer.zero_grad(set_to_none=True)
        images = len(targets)
        share = self._share(images)
        pieces = self.techniques.accumulate
        if pieces > 1:
            # as many on every rank, each with an image at least: images / share is the ranks' mean
            pieces = min(pieces, int(images / share + 1e-3))
        sums = []
        parts = zip(batch.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
        for number, (part, part_targets) in enumerate(parts, start=1):
            waits = number == pieces or distributed.world_size() == 1
            with contextlib.nullcontext() if waits else self.model.no_sync():
                loss, logits = self._piece(part, part_targets, share * (len(part) / images))
            # read before the next pass: CUDA graphs reuse the memory of `logits`
            sums.append((loss * len(part), soft_hits(logits.argmax(1), part_targets)))
        loss_sums, hits = zip(*sums, strict=True)
        return sum(loss_sums[1:], loss_sums[0]), sum(hits[1:], hits[0])

    def _share(self, images: int) -> torch.Tensor | float:
        """What this process's mean loss counts in the mean over processes: 1, but for uneven last batches."""
        if distributed.world_size() == 1:
            return 1.0
        total = distributed.sum_over_ranks(torch.tensor(float(images), device=self.device))
        return images * distributed.world_size() / total

    def _piece(
        self, batch: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradients of `weight` x the mean loss; return the mean loss and the logits, detached.

        The first compiled pass may fail, in backward too, which torch compiles only when it gets there; the
        batch is then done again eagerly, from the BatchNorm statistics before it.
        """
        if self.compiled is None or self.compiled_size not in (None, len(batch)):
            return self._pass(self.model, batch, targets, weight)
        if self.compiled_size is not None:
            return self._pass(self.compiled, batch, targets, weight)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            result = self._pass(self.compiled, batch, targets, weight)
        except Exception as error:  # no C compiler, an unsupported processor: torch raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            LOG.warning(f"torch.compile failed, training eagerly: {reason}")
            self.compiled = None
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            return self._pass(self.model, batch, targets, weight)
        self.compiled_size = len(batch)
        return result

    def _pass(
        self,
        network: Callable[..., torch.Tensor],
        batch: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor | float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(self.device, self.precision):
            logits = network(batch).float()
        loss = self.criterion(logits, targets)
        if self.techniques.distillation is not None:
            loss = self.techniques.distillation(loss, logits, batch)
        (loss * weight).backward()
        return loss.detach(), logits.detach()


def compiled(model: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
    """`model` through torch.compile for one batch size; on CUDA with CUDA graphs, since a step of this
    network is bound by kernel launches on a large GPU."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(model, mode=mode, dynamic=False)


def train_one_epoch(
    step: TrainStep,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    sums: Sums,
    *,
    first_batch: int = 0,
    batches: int,
    title: str = "train",
    after_batch: Callable[[int], None] = lambda batch: None,
) -> Metrics:
    """Train on the batches of `loader`, from `first_batch` (counted from 0) to the epoch's end.

    Args:
        loader: yields (uint8 [N, 32, 32, 3], int64 [N]) on the host.
        sums: the epoch's running sums; filled already where an interrupted epoch goes on.
        batches: the batches of the whole epoch, for the bar.
        after_batch: called after each batch with the number of batches that are done; what it raises
            ends the epoch (an interrupt).

    Raises:
        RunError: the loss is not finite: the learning rate is too high, or the data or weights are bad.
    """
    step.model.train()
    device = step.device
    sync_every = 1 if device.type == "cpu" else SYNC_EVERY
    with progress_bar(
        total=batches, initial=first_batch, desc=title, unit="batch", bar_format=BAR_FORMAT
    ) as bar:
        for number, (images, labels) in enumerate(loader, start=first_batch + 1):
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            learning_rate = step.optimizer.param_groups[0]["lr"]
            loss_sum, hits = step(images, labels)
            sums.add(loss_sum, hits, len(labels), number)
            if number % sync_every == 0 or number == batches:
                check_finite(sums, f"{title} at learning rate {learning_rate:.3g}")  # the sync point
                _show(bar, sums, number, learning_rate)
            after_batch(number)
    distributed.share_buffers(step.model)
    return sums.metrics_over_ranks()


def check_finite(sums: Sums, where: str) -> None:
    """Stop on a NaN or infinite loss, before that state can reach a checkpoint.

    Raises:
        RunError: naming `where` and the batch, and what to try.
    """
    bad = int(sums.bad_batch.item())
    if bad != Sums.NONE:
        raise RunError(
            f"the loss became NaN or infinite in batch {bad} of {where}: try a lower --lr, or "
            "--precision fp32; the checkpoints on disk are from before"
        )


def _show(bar: Any, sums: Sums, number: int, learning_rate: float) -> None:
    if bar.disable:
        return
    metrics = sums.metrics()
    done = (number - bar.initial) * metrics.images / number  # images since this process began
    rate = done / max(bar.format_dict["elapsed"], 1e-9)
    bar.set_postfix_str(
        f"loss {metrics.loss:.3f}, acc {metrics.accuracy_percent:.1f}%, {rate:,.0f} images/s, "
        f"lr {learning_rate:.3g}",
        refresh=False,
    )
    bar.update(number - bar.n)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    precision: str = "fp32",
    title: str = "test",
    after_batch: Callable[[int], None] = lambda batch: None,
) -> Metrics:
    """Loss and top-1 accuracy of `model` over `batches`; with several processes, each takes its share.

    The network is left in evaluation mode. It runs eagerly: it is used once an epoch, at sizes that
    training does not use.

    Args:
        batches: (normalised float [N, 3, 32, 32], int64 [N]) pairs, all on the model's device.
        title: what the progress bar says.
        after_batch: called after each batch with the number of batches that are done.

    Raises:
        RunError: the loss is not finite, so the weights are spoilt.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = Sums(device)
    pieces = [piece for images, labels in batches for piece in _pieces(images, labels, device)]
    with progress_bar(total=len(pieces), desc=title, unit="batch") as bar:
        for number, (images, labels) in enumerate(pieces, start=1):
            with autocast(device, precision):
                logits = model(images).float()
            loss_sum = F.cross_entropy(logits, labels, reduction="sum")
            sums.add(loss_sum, (logits.argmax(1) == labels).sum(), len(labels), number)
            bar.update()
            after_batch(number)
    check_finite(sums, f"the {title}")
    return sums.metrics_over_ranks()


def _pieces(
    images: torch.Tensor, labels: torch.Tensor, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A test batch as it is, or, on a CPU, in views of CPU_TEST_PIECE images."""
    size = CPU_TEST_PIECE if device.type == "cpu" else max(1, len(images))
    return list(zip(images.split(size), labels.split(size), strict=True))
