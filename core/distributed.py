"""Distributed training: functions that return their input unchanged where there is only one process.

So loops and scripts need not ask how many processes torchrun started (as in facebookresearch/pycls).
"""

import contextlib
import datetime
import functools
import os
import re
import signal
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from core.errors import UsageError

# A rank that waits for a dead one gives up after this long, so that no process is left behind.
TIMEOUT = datetime.timedelta(minutes=10)
# The others may wait longer for the main process: for a download, the LR finder, an answer to a question.
WAIT_FOR_MAIN = datetime.timedelta(days=1)
SILENT_WAIT_S = 3.0  # then the main process says whom it waits for

_enabled = False


def enable() -> None:
    """Take this process's place from the environment that torchrun sets; without this call it is alone.

    Only train.py calls it, so that other scripts take no notice of a launcher's variables.

    Raises:
        UsageError: a variable is missing or wrong.
    """
    global _enabled
    size, number = _from_environment("WORLD_SIZE", 1), _from_environment("RANK", 0)
    _from_environment("LOCAL_WORLD_SIZE", 1), _from_environment("LOCAL_RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and (missing or number >= size):
        wrong = f"{missing[0]} is missing" if missing else f"RANK is {number}"
        raise UsageError(f"WORLD_SIZE is {size} but {wrong}: start with torchrun, or unset WORLD_SIZE")
    _enabled = True


def rank() -> int:
    """This process's number among all, from 0; known before `start`."""
    return _from_environment("RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes train together."""
    return _from_environment("WORLD_SIZE", 1) if _enabled else 1


def local_world_size() -> int:
    """How many of them run on this machine."""
    return _from_environment("LOCAL_WORLD_SIZE", 1) if _enabled else 1


def local_rank() -> int:
    """This process's number on its machine, from 0: the index of its CUDA device.

    On each machine, process 0 provides the data set for the others.
    """
    return _from_environment("LOCAL_RANK", 0) if world_size() > 1 else 0


def _from_environment(name: str, default: int) -> int:
    """The variable `name`: a whole number of at least `default` (ranks count from 0, sizes from 1)."""
    value = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < default:
        raise UsageError(f"the environment variable {name} is {value!r:.40}: torchrun sets it; unset it")
    return int(value)


def is_main() -> bool:
    """Whether this process is rank 0, the one that asks, prints, draws and writes."""
    return rank() == 0


def start(device: torch.device, *, sync_bn: bool = False) -> None:
    """Join the process group that torchrun set up: NCCL on CUDA, gloo on a CPU. No-op on one process.

    Raises:
        UsageError: several processes cannot train on this device (MPS), or not with `sync_bn` (CPU).
    """
    if world_size() == 1 or dist.is_initialized():
        return
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"several processes train on cpu or cuda, not on {device.type}: pass --device cpu")
    if sync_bn and device.type != "cuda":  # torch.nn.SyncBatchNorm has no CPU implementation
        raise UsageError(f"--sync-bn needs CUDA, and this run is on {device.type}: leave --sync-bn out")
    backend = "nccl" if device.type == "cuda" else "gloo"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = f"Waiting for {world_size() - 1} more process(es) at {address}"
    with _announced(line), _default_signals():
        dist.init_process_group(backend, timeout=TIMEOUT)
        _waiting_group()


@contextlib.contextmanager
def _announced(line: str) -> Iterator[None]:
    """Print `line` on the main process where the block takes longer than SILENT_WAIT_S."""
    notice = threading.Timer(SILENT_WAIT_S, print, [line], {"flush": True})
    notice.daemon = True
    if is_main():
        notice.start()
    try:
        yield
    finally:
        notice.cancel()


@contextlib.contextmanager
def _default_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process at once: while C++ code waits, no handler in Python runs."""
    earlier = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@functools.cache
def _waiting_group() -> "dist.ProcessGroup":
    """A group of the same processes for whole objects, which waits longer and uses no GPU."""
    return dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN)


def stop() -> None:
    """Leave the process group; safe to call at any time."""
    if dist.is_available() and dist.is_initialized():
        _waiting_group.cache_clear()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` means that another process of the run has ended, or no longer answers."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    signs = "Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting"
    return isinstance(error, dist.DistError) or bool(re.search(signs, str(error)))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over ranks of `values` (any shape, on the training device), on every rank."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def broadcast_object(value: object) -> object:
    """Rank 0's `value` (any picklable object) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with _default_signals():
        dist.broadcast_object_list(box, src=0, group=_waiting_group())
    return box[0]


def gather_objects(value: object, what: str) -> list[object]:
    """Every rank's `value` (any picklable object), by rank, on every rank.

    Args:
        what: named where the main process waits long for the others.
    """
    values = [value] * world_size()
    if world_size() > 1:
        with _announced(f"Waiting for {what} on other processes"), _default_signals():
            dist.all_gather_object(values, value, group=_waiting_group())
    return values


def any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """For each of `flags`, whether it is set on any rank: one all-reduce, which waits for the device."""
    if world_size() == 1:
        return list(flags)
    return sum_over_ranks(torch.tensor(flags, dtype=torch.int32, device=device)).bool().tolist()


def wrap_ddp(model: nn.Module, device: torch.device, *, sync_bn: bool = False) -> nn.Module:
    """`model` in DistributedDataParallel, which averages gradients over ranks; on one process `model` itself.

    With `sync_bn` (CUDA only), BatchNorm statistics are those of the global batch instead of each rank's.
    """
    if world_size() == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to every rank: without --sync-bn, each has BatchNorm statistics of its own.

    DistributedDataParallel does so only before each training pass; after the last one, the evaluated networks
    would differ between ranks, and from the checkpoint.
    """
    for buffer in model.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, src=0)
