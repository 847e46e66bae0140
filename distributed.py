"""Several processes as one: calls that hand their input back where there is only one process.

The launcher is torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK. Loops and scripts call these functions
without asking how many processes there are (the way of facebookresearch/pycls).
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch import nn

from errors import UsageError

# A rank that waits for a dead one gives up after this long, so that no process stays behind.
TIMEOUT = datetime.timedelta(minutes=10)


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


def stop() -> None:
    """Leave the process group; safe to call at any time."""
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of every rank's `values` (any shape, on the training device), on every rank."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_main(value: object) -> object:
    """Rank 0's `value` (any picklable object) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on at least one rank: a host-device synchronisation where there are several."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor([int(flag)], device=device)).item())


def wrap(model: nn.Module, device: torch.device, *, sync_bn: bool = False) -> nn.Module:
    """`model` in DistributedDataParallel, gradients averaged over ranks; the same model on one process.

    With `sync_bn`, BatchNorm statistics are those of the global batch instead of each rank's share.
    """
    if world_size() == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
