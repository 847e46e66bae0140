"""Several processes as one: calls that hand their input back where there is only one process.

The launcher is torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK. Loops and scripts call these functions
without asking how many processes there are (the way of facebookresearch/pycls).
"""

import contextlib
import datetime
import functools
import os

import torch
import torch.distributed as dist
from torch import nn

from core import sync_bn as cpu_sync_bn
from core.errors import UsageError

# A rank that waits for a dead one gives up after this long, so that no process stays behind.
TIMEOUT = datetime.timedelta(minutes=10)
# What the main process alone does while the others wait may take longer: a download, the LR finder, a
# person who is asked something.
WAIT_FOR_MAIN = datetime.timedelta(days=1)


def rank() -> int:
    """This process's number, from 0; known before `start`, from torchrun's environment."""
    return _from_environment("RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes train together."""
    return _from_environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its machine: the CUDA device that it takes."""
    return _from_environment("LOCAL_RANK", 0)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not (value.isascii() and value.isdigit()):
        raise UsageError(f"the environment variable {name} is {value!r:.40}: torchrun sets it; unset it")
    return int(value)


def is_main() -> bool:
    """Whether this process is the one that asks, prints, draws and writes."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Join the process group that torchrun set up: NCCL on CUDA, gloo elsewhere. No-op on one process.

    Raises:
        UsageError: torchrun asks for several processes on a device that cannot take part (mps).
    """
    if world_size() == 1 or dist.is_initialized():
        return
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"several processes train on cpu or cuda, not on {device.type}: pass --device cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    _waiting_group()


@functools.cache
def _waiting_group() -> "dist.ProcessGroup":
    """The same processes in a group for `broadcast_object`, which waits longer and uses no GPU."""
    return dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN)


def stop() -> None:
    """Leave the process group; safe to call at any time."""
    if dist.is_available() and dist.is_initialized():
        _waiting_group.cache_clear()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` says that another process of the run is gone, or waits for what will not come."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return (
        world_size() > 1
        and isinstance(error, RuntimeError)
        and (isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs))
    )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of every rank's `values` (any shape, on the training device), on every rank."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def broadcast_object(value: object) -> object:
    """Rank 0's `value` (any picklable object) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_waiting_group())
    return box[0]


def any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """Whether each of `flags` is set on at least one rank: one all-reduce, which waits for the device."""
    if world_size() == 1:
        return list(flags)
    return sum_over_ranks(torch.tensor(flags, dtype=torch.int32, device=device)).bool().tolist()


def wrap_ddp(model: nn.Module, device: torch.device, *, sync_bn: bool = False) -> nn.Module:
    """`model` in DistributedDataParallel, gradients averaged over ranks; the same model on one process.

    With `sync_bn`, BatchNorm statistics are those of the global batch instead of each rank's share.
    """
    if world_size() == 1:
        return model
    if sync_bn:
        on_cuda = device.type == "cuda"  # torch's own refuses tensors on a CPU
        convert = nn.SyncBatchNorm.convert_sync_batchnorm if on_cuda else cpu_sync_bn.convert
        model = convert(model)
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the main one's buffers: without --sync-bn, each has BatchNorm statistics of its own.

    DistributedDataParallel does so before each training pass only; testing after the last one would else be
    of networks that differ between ranks, and from the one in the checkpoint.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(flat, src=0)
    for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
