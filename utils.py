"""Albumentations data loaders with reproducible batches, normalisation, and the learning-rate finder.

Images are loaded as uint8 [B, 32, 32, 3] and become normalised float32 on the device. Everything random in a
training batch follows from (seed, epoch, batch number, rank), so it does not depend on the number of workers
or their start method, nothing repeats over epochs or ranks, and an epoch can be resumed at any batch.
"""

import contextlib
import copy
import functools
import io
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from cifar.augment import train_transform
from cifar.dataset import CIFAR100_MEAN, CIFAR100_STD, Split
from core.cli import LOG, progress_bar
from core.convolution import use_fp32_weight_gradients
from core.errors import RunError, UsageError
from core.machine import autocast, report_out_of_memory

# The random streams of a run: entries of SeedSequence's spawn key, as are epoch, batch and rank. Sums of seed
# and epoch would collide (1 + 2 and 2 + 1), and so would tuples of different length ((1,) and (1, 0)).
SHUFFLE, AUGMENT = 0, 1

# The suggestion is the default unless the smoothed loss fell by this fraction and the rate lies within these
# bounds: below them the loss of an untrained network falls steeply too, as its last layer unlearns its random
# initialisation, but training would be slow.
MIN_FALL = 0.02
# The slope is that of the loss smoothed over three times as many points as the curve that is shown: one that
# falls from 4.6 to 4.4, as an untrained ResNet-56's does, is else steepest where the batches' noise has it.
SLOPE_WIDTH = 3 / 40
LR_BOUNDS = (0.01, 0.3)
# Batch noise decides where in a flat valley the minimum lies. So the valley is taken to extend as far as the
# smoothed loss stays within this fraction of its fall, and the rule uses the valley's far end.
VALLEY = 0.05
DEFAULT_LR = 0.1
MAX_PREFETCH = 4  # batches that each worker prepares ahead
BYTES_PER_IMAGE = 32 * 32 * 3 + 8  # with its label, as workers pass them


class BatchRequest(NamedTuple):
    """What determines one rank's part of one training batch."""

    epoch: int
    batch: int  # number in the epoch, from 0
    indices: np.ndarray  # int64 [B]


class TrainBatchSampler(Sampler[BatchRequest]):
    """The batches of one epoch, in an order determined by (seed, epoch).

    A global batch holds the same images for any number of ranks; rank r takes its r-th contiguous part. The
    parts are equal except in the last, ragged batch: there some ranks may get one image more than others, so
    that no image is left out, and if it has fewer images than there are ranks, it is dropped on all of them.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        ragged = count % batch_size
        self.batches = count // batch_size + (ragged >= world_size)
        self.set_epoch(1)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch that the next iterations yield, and the batch at which they start.

        This holds until the next call: without one, an epoch is repeated exactly.

        Raises:
            UsageError: the epoch is negative or the start lies outside the epoch.
        """
        if epoch < 0 or not 0 <= start_batch <= self.batches:
            raise UsageError(f"epoch {epoch} has batches 0 to {self.batches - 1}, not {start_batch}")
        self.epoch, self.start_batch = epoch, start_batch

    @contextlib.contextmanager
    def for_lr_finder(self) -> Iterator[None]:
        """Within the block, rank 0 gets epoch 0 as one process would: global batches, all of them full.

        A ragged batch counts only where it is the epoch's sole one. Afterwards epoch 1 begins.
        """
        training = self.world_size, self.batches
        self.world_size, self.batches = 1, max(1, self.count // self.batch_size)
        self.set_epoch(0)
        try:
            yield
        finally:
            self.world_size, self.batches = training
            self.set_epoch(1)

    def __len__(self) -> int:
        return self.batches - self.start_batch

    def global_size(self, batch: int) -> int:
        """The images of a batch (counted from 0) over all ranks: fewer than `batch_size` in a ragged one."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def __iter__(self) -> Iterator[BatchRequest]:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(SHUFFLE, self.epoch))
        order = np.random.default_rng(sequence).permutation(self.count)
        epoch = self.epoch  # that of a later `set_epoch` is for the next iteration
        for number in range(self.start_batch, self.batches):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            first, last = (rank * len(batch) // self.world_size for rank in (self.rank, self.rank + 1))
            yield BatchRequest(epoch, number, batch[first:last])


class TrainDataset(Dataset):
    """Augmented training images, fetched a whole batch at a time by `BatchRequest`."""

    def __init__(self, split: Split, augment: str, seed: int, rank: int) -> None:
        self.images, self.labels = split.images, split.labels
        self.transform = train_transform(augment)
        self.seed, self.rank = seed, rank

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, request: BatchRequest) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, 32, 32, 3] and int64 [B] of one request.

        The transform is seeded for each batch: Albumentations copies a pipeline's generator into every
        worker, so that without this all workers draw the same stream, and the same again in every epoch.
        """
        key = (AUGMENT, request.epoch, request.batch, self.rank)
        words = np.random.SeedSequence(self.seed, spawn_key=key).generate_state(4)
        self.transform.set_random_seed(int.from_bytes(words.tobytes(), "little"))
        images = self.images[request.indices]
        for image in images:
            image[...] = self.transform.augment(image)
        batch = torch.from_numpy(images), torch.from_numpy(self.labels[request.indices])
        if get_worker_info() is not None:
            # here, where a failure reaches the main process: in the queue's own thread it would be lost
            for tensor in batch:
                tensor.share_memory_()
        return batch


def make_train_loader(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    augment: str = "reference",
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> DataLoader:
    """A loader of augmented training batches: uint8 [B, 32, 32, 3] and int64 [B].

    Args:
        batch_size: images of one step over all ranks; each rank gets its part (see `TrainBatchSampler`).
        multiprocessing_context: the workers' start method (fork, spawn, forkserver); None: Python's default.

    `loader.batch_sampler.set_epoch(epoch, start_batch)` sets what the next iteration yields. Iterating does
    not change the global random states of torch, numpy and Python.

    Raises:
        UsageError: a number is out of range, the batch size is not a multiple of the number of ranks, or the
            split has fewer images than there are ranks.
    """
    if batch_size < 1 or workers < 0 or seed < 0:
        raise UsageError("the batch size must be at least 1, workers and seed at least 0")
    if batch_size % world_size:
        raise UsageError(f"a batch of {batch_size} does not divide by {world_size} processes")
    sampler = TrainBatchSampler(len(split), batch_size, seed, rank, world_size)
    if len(sampler) == 0:
        raise UsageError(f"{len(split)} training images are too few for {world_size} processes")
    cv2.setNumThreads(0)  # threads only cost time on 32x32 images
    prefetch = choose_prefetch(workers, BYTES_PER_IMAGE * batch_size) if workers else 0
    workers = workers if prefetch else 0
    return DataLoader(
        TrainDataset(split, augment, seed, rank),
        batch_sampler=sampler,
        collate_fn=tuple,  # unchanged: `TrainDataset` returns whole batches
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch or None,
        worker_init_fn=_start_worker,
        multiprocessing_context=multiprocessing_context if workers else None,
        generator=torch.Generator().manual_seed(0),  # for torch's own worker seeds, which nothing here uses
    )


def choose_prefetch(workers: int, batch_bytes: int) -> int:
    """How many batches each worker prepares ahead: MAX_PREFETCH, or fewer where shared memory is short.

    Args:
        batch_bytes: of a batch over all ranks.

    Returns:
        0 where /dev/shm, through which workers pass batches on Linux, has no room for one batch each.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return MAX_PREFETCH
    room = int(0.8 * free / batch_bytes) - 2  # beside the batch in training and the one before it
    prefetch = max(0, min(MAX_PREFETCH, room // workers))
    if prefetch < MAX_PREFETCH:
        instead = (
            f"each worker prepares {prefetch} batches ahead"
            if prefetch
            else "the training process makes batches"
        )
        LOG.info(
            f"/dev/shm has {free >> 20} MiB left for batches: {instead} (docker run --shm-size=1g helps)"
        )
    return prefetch


def _start_worker(_number: int) -> None:
    """Leave signals to the main process; limit OpenCV to one thread.

    A SIGTERM to the whole process group must not end workers before the main process has saved its state:
    it ends them ten seconds later, if the main process has not done so by then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))
    cv2.setNumThreads(0)


def worker_error(error: RuntimeError) -> RunError | None:
    """What to tell the user where `error` means that a DataLoader worker failed; None for other errors."""
    if not any(sign in str(error) for sign in ("DataLoader worker", "shared memory")):
        return None
    return RunError(
        "a data loader worker failed: if /dev/shm is full (docker run --shm-size=1g gives more) or memory is "
        "short, pass fewer --workers, or --workers 0"
    )


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, H, W] in channels_last memory, on the same device.

    (level / 255 - mean) / std per channel, as one multiplication and one addition. The constants are repeated
    for a whole row of pixels: broadcast over 3 channels, the innermost loop would have 3 steps, and a CPU
    would take 6 times as long.
    """
    count, height, width, channels = images.shape
    scale, shift = _row_constants(width, images.device)
    rows = images.reshape(count, height, width * channels).to(torch.float32)
    return torch.addcmul(shift, rows, scale).view(images.shape).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _row_constants(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of `normalize` for one row: float32 [width * 3] each, cached on the device."""
    mean = torch.tensor(CIFAR100_MEAN, dtype=torch.float64)
    std = torch.tensor(CIFAR100_STD, dtype=torch.float64)
    scale, shift = (1 / (255 * std)).repeat(width).float(), (-mean / std).repeat(width).float()
    return scale.to(device), shift.to(device)


def make_test_batches(
    split: Split, batch_size: int, device: torch.device | str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The split in order, on the device, normalised once: float32 [B, 3, 32, 32] and int64 [B] each."""
    images, labels = (torch.tensor(array).split(batch_size) for array in (split.images, split.labels))
    return [(normalize(x.to(device)), y.to(device)) for x, y in zip(images, labels, strict=True)]


@dataclass(frozen=True)
class LRFinderResult:
    """A learning-rate range test: rates, losses in nats per image (raw and smoothed), the suggestion."""

    learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggested_lr: float
    method: str
    seconds_per_image: float = field(default=0.0, compare=False)  # measured

    @property
    def summary(self) -> str:
        """The suggestion and how it was found; on a second line the smoothed losses and the rates."""
        curve = self.smoothed
        lowest = min(filter(math.isfinite, curve), default=math.nan)
        return (
            f"LR finder: suggested LR {self.suggested_lr:.2e} ({self.method})\n"
            f"           loss {curve[0]:.2f} -> {lowest:.2f} (lowest) -> {curve[-1]:.2f} (last) "
            f"for rates {self.learning_rates[0]:.0e} to {self.learning_rates[-1]:.2g}"
        )


def smooth(losses: Sequence[float], width: float = 1 / 40) -> np.ndarray:
    """`losses` averaged over a centred Gaussian window whose deviation is `width` of all points; float64."""
    sigma = max(1.0, width * len(losses))
    half = math.ceil(3 * sigma)
    window = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    weights = np.convolve(np.ones(len(losses)), window)  # less than the whole window at the ends
    return (np.convolve(losses, window) / weights)[half:-half]


def suggest_lr(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """The learning rate that a range test suggests, and the method that found it.

    There are two rules of thumb: the steepest descent of the smoothed loss over the logarithm of the rate,
    and a tenth of the highest rate at which the loss is nearly minimal (VALLEY). Their geometric mean is
    suggested or, if one lies outside LR_BOUNDS, the other alone; if both do, or the loss is not finite or
    never fell by MIN_FALL, DEFAULT_LR, with the reason as the method.
    """
    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(np.argmin(finite))
    if count < 10:
        return DEFAULT_LR, "the default: the loss was NaN or infinite almost at once"
    curve = smooth(losses[:count])
    lowest = int(np.argmin(curve))
    if curve[0] - curve[lowest] < MIN_FALL * abs(curve[0]):
        return DEFAULT_LR, "the default: the loss never fell"
    wide = smooth(losses[:count], width=SLOPE_WIDTH)
    slope = np.gradient(wide[: lowest + 1], np.log10(rates[: lowest + 1]))
    deep = curve[lowest] + VALLEY * (curve[0] - curve[lowest])
    found = {
        "steepest descent": float(rates[int(np.argmin(slope))]),
        "minimum / 10": float(rates[int(np.flatnonzero(curve <= deep)[-1])]) / 10,
    }
    low, high = LR_BOUNDS
    within = {rule: rate for rule, rate in found.items() if low <= rate <= high}
    if not within:
        rates_text = " and ".join(f"{rate:.1e}" for rate in found.values())
        return DEFAULT_LR, f"the default: {rates_text} lie outside {low:g} to {high:g}"
    mean = math.exp(sum(map(math.log, within.values())) / len(within))
    return mean, "mean of " * (len(within) > 1) + " and ".join(within)


class _FromPixels(nn.Module):
    """A network that takes uint8 [N, 32, 32, 3], runs at the given precision, and returns float32 logits."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        batch = normalize(images)
        with autocast(images.device, self.precision):
            return self.model(batch).float()


def find_lr(
    model: nn.Module,
    criterion: nn.Module,
    build_optimizer: Callable[[nn.Module], Optimizer],
    loader: DataLoader,
    *,
    precision: str = "fp32",
    start_lr: float = 1e-4,
    end_lr: float = 1.0,
    iterations: int = 200,
) -> LRFinderResult:
    """Run torch-lr-finder's range test (Smith 2017, arXiv:1506.01186) and suggest a learning rate.

    It trains a copy of `model`, with an optimizer of its own, on epoch 0 of `loader`, which training (from
    epoch 1) does not use; so the network, the optimizer and every random state are afterwards as before.
    Its batches are the full global ones, for which the rate is: with several processes, call it on rank 0.

    Raises:
        RunError: out of memory.
    """
    # here, since it imports pyplot, which most scripts never need
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

    class Batches(TrainDataLoaderIter):
        """The loader's batches, counted by a bar like the project's others, with loss and rate."""

        def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
            times.append(time.monotonic())
            if rates := finder.history["lr"]:
                loss = finder.history["loss"][-1]
                bar.set_postfix_str(f"loss {loss:.3f}, lr {rates[-1]:.2g}", refresh=False)
            bar.update()
            return super().__next__()

    times: list[float] = []  # when each batch was asked for
    twin = _FromPixels(copy.deepcopy(model), precision)
    use_fp32_weight_gradients(twin, precision)
    device = next(twin.parameters()).device
    with loader.batch_sampler.for_lr_finder(), _kept_random_state(), contextlib.ExitStack() as quiet:
        bar = quiet.enter_context(progress_bar(total=iterations, desc="LR finder", unit="batch"))
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))  # its remarks; ours say more
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))  # its progress bar
        # the finder computes a batch at once, whatever --accumulate says
        quiet.enter_context(
            report_out_of_memory("pass a smaller --batch-size, or --lr to skip the LR finder")
        )
        scaling = {
            "amp_backend": "torch",
            "amp_config": {"device_type": device.type, "enabled": False},  # `twin` has its own autocast
            "grad_scaler": torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        }
        finder = LRFinder(twin, build_optimizer(twin), criterion, device=device, **scaling)
        # smoothed afterwards, without the lag of a running mean
        finder.range_test(Batches(loader), start_lr=start_lr, end_lr=end_lr, num_iter=iterations, smooth_f=0)
    rates = [float(rate) for rate in finder.history["lr"]]
    losses = [float(loss) for loss in finder.history["loss"]]
    suggested, method = suggest_lr(rates, losses)
    warm = times[len(times) // 4 :]  # the first steps load kernels, and on a GPU choose among them
    seconds = (warm[-1] - warm[0]) / max(1, len(warm) - 1) / loader.batch_sampler.global_size(0)
    return LRFinderResult(rates, losses, smooth(losses).tolist(), suggested, method, seconds)


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore every global random state at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
