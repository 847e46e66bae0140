"""The machine: its devices, precisions and cores, torch's global settings, versions of software and code."""

import contextlib
import ctypes
import functools
import importlib.metadata
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from core import distributed
from core.errors import RunError, UsageError


def choose_device(name: str) -> torch.device:
    """The device to train on; "auto" means CUDA if available, else MPS, else the CPU.

    Raises:
        UsageError: the device is not available.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and torch.cuda.device_count() <= distributed.local_rank():
        raise UsageError(
            f"--device cuda: torch sees {torch.cuda.device_count()} CUDA devices, and this is process "
            f"{distributed.local_rank() + 1}; pass --device cpu"
        )
    if name == "mps" and not has_mps:
        raise UsageError("--device mps: torch sees no such device; pass --device cpu")
    return torch.device(name, distributed.local_rank()) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's own name on CUDA, else "cpu" or "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def precision_name(precision: str, device: torch.device) -> str:
    """`precision`, or "fp32 (TF32)" on a GPU that multiplies fp32 in TF32 (compute capability 8.0 on)."""
    tf32 = precision == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return "fp32 (TF32)" if tf32 and torch.cuda.get_device_capability(device) >= (8, 0) else precision


def fastest_precision(device: torch.device) -> str:
    """ "bf16" where the device multiplies it in hardware; on GPUs before that whose tensor cores multiply
    float16 (compute capability 7.0 and 7.5: V100, T4, RTX 20) "fp16"; else "fp32"."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    if device.type == "cpu":
        return "fp32" if cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}) else "bf16"
    return "fp32"


def cpu_flags() -> set[str]:
    """The instruction sets that Linux lists for the processor ("avx2", "amx_bf16", ...); empty elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return set(next((line for line in file if line.startswith(("flags", "Features"))), "").split())
    return set()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory, while compiling too, where torch wraps the error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in ("out of memory", "can't allocate memory"))


@contextlib.contextmanager
def report_out_of_memory(advice: str) -> Iterator[None]:
    """Turn torch's errors about too little memory into a RunError that ends with `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory: {advice}") from None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bf16 or fp16; for fp32 a context that changes nothing, so that all take one path."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


# Compiling takes one to two minutes, which a run regains from this many training images on. On a CPU in fp32
# it gains nothing: the time is spent in oneDNN's convolutions, compiled or not.
COMPILE_PAYS_FROM_IMAGES = 1_000_000


def choose_compile(
    wanted: str, device: torch.device, precision: str, images: int, stored: bool | None
) -> tuple[bool, str]:
    """Whether to compile the network with torch.compile, and why, in a few words.

    Args:
        wanted: "auto", "on" or "off".
        images: how many images the run trains on, over all epochs.
        stored: the choice of the run that is resumed, or None; "auto" keeps it, for bitwise equal results.
    """
    if wanted != "auto":
        return wanted == "on", f"--compile {wanted}"
    if stored is not None:
        return stored, "as before the interruption"
    if device.type == "mps" or (device.type, precision) == ("cpu", "fp32"):
        return False, f"it gains nothing on {device.type} in {precision}"
    why = f"{images:,} images to train on; it pays from {COMPILE_PAYS_FROM_IMAGES:,}"
    return images >= COMPILE_PAYS_FROM_IMAGES, why


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step; other C libraries are left alone.

    By default glibc returns the activations of each step to the kernel, and the next step faults them in
    again, page by page: 7 % of a ResNet-56 step on two cores. At most the peak is kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # as in mallopt(3)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def set_up_torch(seed: int, device: torch.device, *, deterministic: bool) -> None:
    """Seed every random generator and set torch's global switches; on CUDA, fp32 products use TF32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def versions() -> dict[str, str]:
    """Versions of what can change a run's results to the bit, for its checkpoints and its log."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "torchvision", "albumentations", "numpy", "opencv-python-headless"):
        found[package] = "unknown"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # another build of OpenCV, say
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def code_version() -> str:
    """The commit of this code at first call, with "-dirty" if files differ from it; "unknown" without git."""
    folder = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    only_here = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # ignore an enclosing repository
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=only_here)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


# One core augments more than 10,000 images/s; this many keep any GPU busy.
MAX_WORKERS = 16


def choose_workers(device_type: str) -> int:
    """How many DataLoader workers suit this machine; with 0 the training process makes the batches.

    With a GPU, one for each core that this process may use, less one for the training process. On a CPU,
    training itself uses every core, and augmenting costs about an eightieth of it: on two cores 0, 1 and 2
    workers measured the same; from about eight on, one worker hides what would be a tenth of the step.
    """
    cores = max(1, usable_cores() // distributed.local_world_size())
    if device_type != "cpu":
        return min(cores - 1, MAX_WORKERS)
    return 1 if cores >= 8 else 0


def usable_cores() -> int:
    """How many cores this process may use, by its affinity and the container's CPU quota; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _cgroup_cores(Path("/sys/fs/cgroup")))))


def _cgroup_cores(root: Path) -> float:
    """The CPU quota under `root` in cores (cgroup v2, else v1); infinity where there is none."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max 100000"
            quota, period = (int(word) for name in names for word in (root / name).read_text().split())
            if quota > 0:
                return quota / period
    return math.inf
