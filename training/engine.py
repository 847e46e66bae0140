"""The two batch loops, training and testing, and the training step that the first one calls.

Sums of loss and hits stay on the device; the host reads them when the progress bar refreshes and at the end,
because each read waits for the device. Means are over images, not over batches.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from core import distributed
from core.cli import LOG, progress_bar
from core.convolution import use_fp32_weight_gradients
from core.errors import RunError
from core.machine import autocast, is_out_of_memory, report_out_of_memory
from training.techniques import Techniques, soft_hits
from utils import normalize

# On a CPU, testing is fastest in batches that stay in its caches: ResNet-56 tested 1.9 times as many images/s
# in batches of 250 as in batches of 5000, with the same logits bit for bit.
CPU_TEST_BATCH_SIZE = 250
# Fits 80 columns: the rate is in the postfix, in images.
BAR_FORMAT = "{desc}:{percentage:3.0f}%|{bar}|{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
# A compiled network must agree with the eager one in so many passes: CUDA graphs are recorded in the second
# and replayed from the third on. The relative tolerances are those of loss and gradient norm: bf16 rounds the
# two differently, and dropout draws other numbers.
TRIALS = 3
TRIAL_TOLERANCES = (0.05, 0.25)
# On a GPU, read the totals every so many batches; on a CPU a read costs nothing.
SYNC_EVERY = 50


@dataclass(frozen=True)
class Metrics:
    """Means over the images of one pass: loss in nats per image, accuracy in percent."""

    loss: float
    accuracy_percent: float
    images: int


class RunningTotals:
    """Totals of one pass: loss (float64 where the device has it), hits, images; and the first bad batch.

    `values` is [loss sum, hits, images], on the device; `bad_batch` is the number of the first batch whose
    loss was not finite, or NO_BAD_BATCH.
    """

    NO_BAD_BATCH = 2**31 - 1

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.values = torch.zeros(3, dtype=dtype, device=device)
        self.bad_batch = torch.tensor(self.NO_BAD_BATCH, device=device)

    def add(self, loss_sum: torch.Tensor, hits: torch.Tensor, images: int, batch: int) -> None:
        """Add one batch: its summed loss and its hits (scalars on the device)."""
        self.values[0] += loss_sum
        self.values[1] += hits
        self.values[2] += images
        number = torch.where(torch.isfinite(loss_sum), self.NO_BAD_BATCH, batch)
        self.bad_batch = torch.minimum(self.bad_batch, number)

    def metrics(self) -> Metrics:
        """The means so far on this process; waits for the device."""
        return _means(self.values)

    def metrics_over_ranks(self) -> Metrics:
        """The means over the images of all processes; waits for the device."""
        return _means(distributed.sum_over_ranks(self.values))

    def restore(self, values: Sequence[float]) -> None:
        """Restore the totals of a checkpoint: plain numbers, float64 exactly."""
        self.values.copy_(torch.tensor(values, dtype=self.values.dtype))


def _means(values: torch.Tensor) -> Metrics:
    loss, hits, images = values.tolist()
    if not images:
        return Metrics(math.nan, math.nan, 0)
    return Metrics(loss / images, 100 * hits / images, int(images))


class TrainStep:
    """One optimizer step on a batch: forward, loss, backward, SGD, schedule, and what the recipe adds.

    Args:
        model: the network; its weights are trained in place. In channels_last memory format.
        criterion: (logits [N, classes], labels int64 [N]) -> mean loss, a scalar in nats.
        optimizer, scheduler: the scheduler is stepped once a batch.
        precision: "fp32", or "bf16" or "fp16" for autocast of the forward pass. With fp16 the loss is scaled
            (torch.amp.GradScaler); a step whose gradients overflow then is skipped, and the schedule waits.
        compile_batch_size: batches of this many images over all ranks go through torch.compile; others run
            eagerly, since compiling for one short batch an epoch costs more than it saves.
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
        compile_batch_size: int | None = None,
        sync_bn: bool = False,
        techniques: Techniques | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        use_fp32_weight_gradients(model, precision)
        self.network = model
        self.model = distributed.wrap_ddp(model, self.device, sync_bn=sync_bn)
        self.sync_bn = sync_bn and distributed.world_size() > 1
        self.criterion = criterion
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.precision = precision
        self.techniques = techniques or Techniques()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.skipped_steps = 0
        self.compile_batch_size = compile_batch_size
        self.compiled: Callable[..., torch.Tensor] | None = None

    @property
    def steps_done(self) -> int:
        """Batches since the start of the run: the scheduler's steps, and those that were skipped."""
        return self.scheduler.last_epoch + self.skipped_steps

    @property
    def _uses_sam(self) -> bool:
        """Whether the next step takes SAM's second pass."""
        sam = self.techniques.sam
        return sam is not None and self.steps_done >= sam.first_step

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, global_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on `images` (uint8 [N, 32, 32, 3]) and `labels` (int64 [N]), both on the device.

        Args:
            global_size: the images of this batch over all ranks; by default N on each of them.

        Returns:
            The summed loss of the batch in nats and the number of hits (`soft_hits` where images are
            mixed), scalars on the device.

        Raises:
            RunError: out of memory.
        """
        use, step = self.techniques, self.steps_done
        if use.sam and step == use.sam.first_step and self.device.type == "cuda":
            self.compiled = None  # compiled anew without CUDA graphs
        if global_size is None:
            global_size = len(labels) * distributed.world_size()
        with report_out_of_memory("pass a smaller --batch-size, or --accumulate 2"):
            batch, targets = normalize(images), labels
            if use.network_seed:
                torch.manual_seed(use.network_seed(step))
            if use.progressive_size:
                batch = use.progressive_size(batch, step)
            if use.mixing:
                batch, targets = use.mixing(batch, labels, step)
            # once a batch, for both passes of SAM
            soft_targets = use.distillation.soft_targets(batch) if use.distillation else None
            loss_sum, hits = self.compute_gradients(batch, targets, soft_targets, global_size)
            if self._uses_sam:
                self.scaler.update()  # it unscales gradients once per update; an overflow recurs in this pass
                use.sam(closure=lambda: self.compute_gradients(batch, targets, soft_targets, global_size))
            if use.clip_norm:
                nn.utils.clip_grad_norm_(self.network.parameters(), use.clip_norm)
            self._update_weights()
            if use.averaging:
                use.averaging(self.steps_done)
        return loss_sum, hits

    def _update_weights(self) -> None:
        """Step optimizer and schedule; where fp16 gradients overflowed, lower the loss scale instead."""
        scale = self.scaler.get_scale()  # 1 without fp16, as with a scaler that is not enabled
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self.skipped_steps += 1
        else:
            self.scheduler.step()

    def compute_gradients(
        self, batch: torch.Tensor, targets: torch.Tensor, soft_targets: torch.Tensor | None, global_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the gradients of the batch, unscaled, in the weights; with --accumulate by micro-batches.

        Args:
            batch: normalised float32 [N, 3, H, W].
            targets: int64 [N], or float32 [N, classes] where images are mixed.
            soft_targets: the teachers', float32 [N, classes]; None without --teacher.

        Returns:
            The batch's summed loss in nats and its hits, scalars on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        # as many on every rank, each with at least one image
        count = min(self.techniques.accumulate, global_size // distributed.world_size())
        values = [value for value in (batch, targets, soft_targets) if value is not None]
        parts = list(zip(*(value.tensor_split(count) for value in values), strict=True))
        # compiled or eager is decided by the batch alone: alike on every rank, and in a resumed run
        if global_size == self.compile_batch_size and self.compiled is None:
            self._compile(*parts[0])
        is_full = global_size == self.compile_batch_size  # no longer where compilation failed
        sums = []
        for number, part in enumerate(parts, start=1):
            images, part_targets, *_ = part
            network = self.compiled if is_full and len(images) == len(parts[0][0]) else self.model
            synchronize = number == count or distributed.world_size() == 1
            with contextlib.nullcontext() if synchronize else self.model.no_sync():
                weight = _loss_weight(len(images), global_size)
                loss, logits = self._micro_batch(network, *part, weight=weight)
            # read before the next pass: CUDA graphs reuse the memory of `logits`
            sums.append((loss * len(images), soft_hits(logits.argmax(1), part_targets)))
        self.scaler.unscale_(self.optimizer)
        loss_sums, hits = zip(*sums, strict=True)
        return sum(loss_sums[1:], loss_sums[0]), sum(hits[1:], hits[0])

    def _compile(self, *part: torch.Tensor) -> None:
        """Compile the network if it works and agrees with the eager one on every rank; else train eagerly.

        A trial runs backward too, which torch compiles only when it gets there. A rank that fails takes part
        in no collective, so the trials have none: they go past DistributedDataParallel, and with sync_bn are
        in evaluation mode. Gradients are then cleared; buffers and random state are as before.
        """
        reason = ""
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        training, device = self.network.training, self.device
        self.network.train(training and not self.sync_bn)
        # CUDA graphs only in the plain step: with several backward passes before an optimizer step, torch
        # fails or silently computes wrong gradients (pytorch issues 96693 and 169545)
        several_passes = self.techniques.accumulate > 1 or self._uses_sam
        cuda_graphs = device.type == "cuda" and distributed.world_size() == 1 and not several_passes
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                network = compiled(self.network, device, cuda_graphs=cuda_graphs)
                for _ in range(TRIALS):
                    eager = self._loss_and_gradient_norm(self.network, *part)
                    found = self._loss_and_gradient_norm(network, *part)
                    reason = reason or _disagreement(found, eager)
            except Exception as error:  # no C compiler, an unsupported processor: torch raises many kinds
                if is_out_of_memory(error):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        self.network.train(training)
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.network.buffers(), buffers, strict=True):
            buffer.copy_(before)
        [failed] = distributed.any_rank(device, bool(reason))
        if failed:
            LOG.warning(f"torch.compile failed, training eagerly: {reason or 'on another process'}")
            self.compile_batch_size = None
        else:
            self.compiled = network if self.model is self.network else compiled(self.model, device)

    def _loss_and_gradient_norm(
        self, network: Callable[..., torch.Tensor], *part: torch.Tensor
    ) -> tuple[float, float]:
        """The mean loss of a micro-batch, and the norm of its scaled gradients, which replace all others."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self._micro_batch(network, *part, weight=1.0)
        gradients = [value.grad for value in self.network.parameters() if value.grad is not None]
        return loss.item(), nn.utils.get_total_norm(gradients).item()

    def _micro_batch(
        self,
        network: Callable[..., torch.Tensor],
        batch: torch.Tensor,
        targets: torch.Tensor,
        soft_targets: torch.Tensor | None = None,
        *,
        weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the scaled gradients of `weight` x the mean loss; return mean loss and logits, detached."""
        with autocast(self.device, self.precision):
            logits = network(batch).float()
        loss = self.criterion(logits, targets)
        if self.techniques.distillation:
            loss = self.techniques.distillation(loss, logits, soft_targets)
        self.scaler.scale(loss * weight).backward()
        return loss.detach(), logits.detach()


def _disagreement(found: tuple[float, float], expected: tuple[float, float]) -> str:
    """How the loss and gradient norm of a compiled network differ from the eager one's; "" if not."""
    names = "loss", "gradient norm"
    for name, value, eager, tolerance in zip(names, found, expected, TRIAL_TOLERANCES, strict=True):
        if not math.isclose(value, eager, rel_tol=tolerance):
            return f"the {name} is {value:.4g} instead of {eager:.4g}"
    return ""


def _loss_weight(images: int, global_size: int) -> float:
    """Weight of this rank's loss in the global mean: DistributedDataParallel averages over ranks, not images.

    Args:
        images: those that the loss is the mean of.
        global_size: the images of the batch over all ranks.
    """
    return images * distributed.world_size() / global_size


def compiled(
    model: nn.Module, device: torch.device, *, cuda_graphs: bool = False
) -> Callable[..., torch.Tensor]:
    """`model` through torch.compile for one batch size; with CUDA graphs, since a step of these networks is
    bound by kernel launches on a large GPU."""
    if device.type == "cpu":  # torch would warn that it finds no CUDA, which nobody asked for
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(model, mode="reduce-overhead" if cuda_graphs else None, dynamic=False)


def train_one_epoch(
    step: TrainStep,
    loader: DataLoader,
    totals: RunningTotals,
    *,
    title: str = "train",
    after_batch: Callable[[int], None] = lambda batch: None,
) -> Metrics:
    """Train on the rest of the epoch that the loader's sampler is set to.

    Args:
        loader: as `utils.make_train_loader` makes it: yields (uint8 [N, 32, 32, 3], int64 [N]) on the host.
        totals: of the epoch so far, which a resumed epoch has already; added to.
        title: what is trained, for the error where the loss is not finite.
        after_batch: called after each batch with the number of batches that are done; what it raises
            ends the epoch (an interrupt).

    Raises:
        RunError: the loss is not finite: the learning rate is too high, or the data or weights are bad.
    """
    step.model.train()
    device, sampler = step.device, loader.batch_sampler
    sync_every = 1 if device.type == "cpu" else SYNC_EVERY
    with progress_bar(
        total=sampler.batches, initial=sampler.start_batch, desc="train", unit="batch", bar_format=BAR_FORMAT
    ) as bar:
        for number, (images, labels) in enumerate(loader, start=sampler.start_batch + 1):
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            learning_rate = step.optimizer.param_groups[0]["lr"]
            loss_sum, hits = step(images, labels, sampler.global_size(number - 1))
            totals.add(loss_sum, hits, len(labels), number)
            if number % sync_every == 0 or number == sampler.batches:
                check_finite(totals, f"{title} at learning rate {learning_rate:.3g}")  # the sync point
                _show(bar, totals, number, learning_rate)
            after_batch(number)
    distributed.broadcast_buffers(step.model)
    return totals.metrics_over_ranks()


def check_finite(totals: RunningTotals, where: str, over_ranks: Metrics | None = None) -> None:
    """Stop on a NaN or infinite loss, before that state can reach a checkpoint.

    Args:
        over_ranks: where they are known, the metrics of all processes: a loss that is not finite on one of
            them then stops them all.

    Raises:
        RunError: naming `where` and the batch, and what to try.
    """
    bad = int(totals.bad_batch.item())
    is_bad = bad != RunningTotals.NO_BAD_BATCH
    if is_bad or (over_ranks and over_ranks.images and not math.isfinite(over_ranks.loss)):
        batch = f"batch {bad}" if is_bad else "another process's part"
        raise RunError(
            f"the loss became NaN or infinite in {batch} of {where}: start a new run with a lower --lr, "
            "or resume with --precision fp32; the checkpoints on disk are from before"
        )


def _show(bar: Any, totals: RunningTotals, number: int, learning_rate: float) -> None:
    if bar.disable:
        return
    metrics = totals.metrics()
    done = (number - bar.initial) * metrics.images / number  # images since this process started
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
    """Loss and top-1 accuracy of `model` over `batches`; with several processes, over those of all of them.

    The network is left in evaluation mode. It runs eagerly: it is used once an epoch, at batch sizes that
    training does not use.

    Args:
        batches: (normalised float32 [N, 3, 32, 32], int64 [N]) pairs, all on the model's device.
        title: the description of the progress bar.
        after_batch: called after each batch with the number of batches that are done.

    Raises:
        RunError: the loss is not finite on some process, so the weights are bad; or out of memory.
    """
    model.eval()
    device = next(model.parameters()).device
    totals = RunningTotals(device)
    if device.type == "cpu":
        batches = [
            part
            for images, labels in batches
            for part in zip(images.split(CPU_TEST_BATCH_SIZE), labels.split(CPU_TEST_BATCH_SIZE), strict=True)
        ]
    lower = report_out_of_memory("pass a smaller --test-batch-size, or with evaluate.py --batch-size")
    with lower, progress_bar(total=len(batches), desc=title, unit="batch") as bar:
        for number, (images, labels) in enumerate(batches, start=1):
            with autocast(device, precision):
                logits = model(images).float()
            loss_sum = F.cross_entropy(logits, labels, reduction="sum")
            totals.add(loss_sum, (logits.argmax(1) == labels).sum(), len(labels), number)
            bar.update()
            after_batch(number)
    metrics = totals.metrics_over_ranks()  # before the check: every rank must take part
    check_finite(totals, f"the {title}", metrics)
    return metrics
