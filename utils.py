"""Batches for training and testing: loaders, the order of images, seeding, normalisation.

Images travel as uint8 [B, 32, 32, 3] and become normalised float32 on the device. All that is random in
a training batch follows from (seed, epoch, batch number, rank), so it does not depend on the number of
workers or on how they start, nothing repeats over epochs or ranks, and an epoch can be resumed at any batch.
"""

import contextlib
import copy
import functools
import io
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from torch_lr_finder import LRFinder, TrainDataLoaderIter

from cifar.augment import train_transform
from cifar.dataset import CIFAR100_MEAN, CIFAR100_STD, Split
from core.errors import UsageError
from core.machine import autocast
from lr_suggestion import LRFinderResult, smooth, suggest_lr

__all__ = [
    "find_lr",
    "make_test_batches",
    "make_train_loader",
    "normalize",
    "train_transform",
]

# The random streams of a run, told apart in SeedSequence's spawn key, as are epoch, batch and rank: sums of
# seed and epoch meet (1 + 2 and 2 + 1), and so do plain tuples of different length ((1,) and (1, 0)).
SHUFFLE, AUGMENT = 0, 1


class BatchRequest(NamedTuple):
    """All that fixes one rank's part of one training batch."""

    epoch: int
    batch: int  # number in the epoch, from 0
    indices: np.ndarray  # int64 [B]


class TrainBatchSampler(Sampler[BatchRequest]):
    """The batches of one epoch, in the order that (seed, epoch) draws.

    A global batch holds the same images for every number of ranks; rank r takes its r-th contiguous part, all
    parts of one size but for the last, ragged batch: there some ranks may get one image more than others (so
    that no image is left out), and if it has fewer images than there are ranks, it is dropped on all of them.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        ragged = count % batch_size
        self.batches = count // batch_size + (ragged >= world_size)
        self.set_epoch(1)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch whose batches the next iterations give, and the batch that they start at.

        It holds until it is called again: without a call, an epoch is repeated exactly.

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
        epoch = self.epoch
        for number in range(self.start_batch, self.batches):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            first = self.rank * len(batch) // self.world_size
            last = (self.rank + 1) * len(batch) // self.world_size
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

        The transform is seeded for each batch: albumentations copies a pipeline's generator into every
        worker, so without this all workers draw the same stream, and the same again in every epoch.
        """
        key = (AUGMENT, request.epoch, request.batch, self.rank)
        words = np.random.SeedSequence(self.seed, spawn_key=key).generate_state(4)
        self.transform.set_random_seed(int.from_bytes(words.tobytes(), "little"))
        images = self.images[request.indices]
        for image in images:
            image[...] = self.transform.augment(image)
        return torch.from_numpy(images), torch.from_numpy(self.labels[request.indices])


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
        multiprocessing_context: how workers start (fork, spawn, forkserver); None: Python's default.

    `loader.batch_sampler.set_epoch(epoch, start_batch)` chooses what the next iteration gives. Iterating
    leaves the global random state of torch, numpy and Python as it was.

    Raises:
        UsageError: a number is out of range, the batch does not divide by the ranks, or the split has
            fewer images than there are ranks.
    """
    if batch_size < 1 or workers < 0 or seed < 0:
        raise UsageError("the batch size must be at least 1, workers and seed at least 0")
    if batch_size % world_size:
        raise UsageError(f"a batch of {batch_size} does not divide by {world_size} processes")
    sampler = TrainBatchSampler(len(split.labels), batch_size, seed, rank, world_size)
    if len(sampler) == 0:
        raise UsageError(f"{len(split.labels)} training images are too few for {world_size} processes")
    cv2.setNumThreads(0)  # threads only cost on 32x32 images
    return DataLoader(
        TrainDataset(split, augment, seed, rank),
        batch_sampler=sampler,
        collate_fn=_as_fetched,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context=multiprocessing_context if workers else None,
        generator=torch.Generator().manual_seed(0),  # for torch's own worker seeds, which nothing here uses
    )


def _as_fetched(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch as it is: it was fetched whole."""
    return batch


def _start_worker(_number: int) -> None:
    """Leave Ctrl-C to the main process, which ends the workers by SIGTERM; keep OpenCV to one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker inherits the main process's handler
    cv2.setNumThreads(0)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, H, W] in channels_last memory, on the same device.

    (level / 255 - mean) / std by channel, as one multiplication and one addition. The constants are laid
    out for a whole row of pixels: broadcast over 3 channels, the innermost loop would be 3 long, and on a
    CPU the whole 6 times slower.
    """
    count, height, width, channels = images.shape
    scale, shift = _row_constants(width, images.device)
    rows = images.reshape(count, height, width * channels).to(torch.float32)
    return torch.addcmul(shift, rows, scale).view(images.shape).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _row_constants(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of `normalize` for one row: float32 [width * 3] each, kept on the device."""
    mean = torch.tensor(CIFAR100_MEAN, dtype=torch.float64)
    std = torch.tensor(CIFAR100_STD, dtype=torch.float64)
    scale, shift = (1 / (255 * std)).repeat(width).float(), (-mean / std).repeat(width).float()
    return scale.to(device), shift.to(device)


def make_test_batches(
    split: Split, batch_size: int, device: torch.device | str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The split in order, on the device, normalised once: float32 [B, 3, 32, 32] and int64 [B] each."""
    batches = []
    for first in range(0, len(split.labels), batch_size):
        images = torch.tensor(split.images[first : first + batch_size])
        labels = torch.tensor(split.labels[first : first + batch_size])
        batches.append((normalize(images.to(device)), labels.to(device)))
    return batches


class _NormalizedBatches(TrainDataLoaderIter):
    """torch-lr-finder's iterator over a loader, with the batches normalised on the device."""

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        super().__init__(loader)
        self.device = device

    def inputs_labels_from_batch(self, batch: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = batch
        return normalize(images.to(self.device)), labels.to(self.device)


class _Autocast(nn.Module):
    """A network that runs at the run's precision and gives float32 logits."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, self.precision):
            logits = self.model(images)
        return logits.float()


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
    """
    twin = copy.deepcopy(model)
    wrapped = _Autocast(twin, precision)
    device = next(twin.parameters()).device
    with loader.batch_sampler.for_lr_finder(), _kept_random_state(), contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))  # its remarks; ours say more
        if sys.stderr is None or not sys.stderr.isatty():
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))  # its progress bar
        finder = LRFinder(wrapped, build_optimizer(wrapped), criterion, device=device)
        finder.range_test(
            _NormalizedBatches(loader, device),
            start_lr=start_lr,
            end_lr=end_lr,
            num_iter=iterations,
            smooth_f=0,  # smoothed afterwards, without the lag of a running mean
        )
    rates = [float(rate) for rate in finder.history["lr"]]
    losses = [float(loss) for loss in finder.history["loss"]]
    suggested, method = suggest_lr(rates, losses)
    return LRFinderResult(rates, losses, smooth(losses).tolist(), suggested, method)


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Put every global random state back at the block's end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
