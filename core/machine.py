"""Which processor trains, at which precision, and torch's global switches for it."""

import contextlib
import ctypes
import os
import random
import sys
from typing import Any

import numpy as np
import torch

from core import distributed
from core.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device to train on: with "auto" CUDA where there is one, else MPS, else the CPU.

    Raises:
        UsageError: the device asked for is not there.
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
    """The device's name for a log or a report: the GPU's own on CUDA, else "cpu" or "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def precision_name(precision: str, device: torch.device) -> str:
    """`precision` for a log or a report: "fp32 (TF32)" where CUDA multiplies fp32 in TF32.

    After `set_up_torch`, that is on every GPU which has TF32 (compute capability 8.0 and later).
    """
    tf32 = precision == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    has_tf32 = tf32 and torch.cuda.get_device_capability(device) >= (8, 0)
    return "fp32 (TF32)" if has_tf32 else precision


def native_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 itself, so that bf16 is faster than fp32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
        except OSError:
            return False
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
    return False


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on `device`, or a context that does nothing for fp32: one path for both."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


# Compiling costs one to two minutes; a run must train on this many images to win them back. On a CPU in fp32
# nothing is won: the time goes to oneDNN's convolutions, which run compiled and eager alike.
COMPILE_PAYS_FROM_IMAGES = {("cuda", "fp32"): 1e6, ("cuda", "bf16"): 1e6, ("cpu", "bf16"): 1e6}


def choose_compile(
    wanted: str, device: torch.device, precision: str, images: int, stored: bool | None
) -> tuple[bool, str]:
    """Whether to torch.compile the network, and why, in a few words.

    Args:
        wanted: "auto", "on" or "off".
        images: how many images the run trains on in all.
        stored: what a resumed run was trained with: kept by "auto", so that its bits stay the same.
    """
    if wanted != "auto":
        return wanted == "on", f"--compile {wanted}"
    if stored is not None:
        return stored, "as before the interruption"
    least = COMPILE_PAYS_FROM_IMAGES.get((device.type, precision))
    if least is None:
        return False, f"it gains nothing on {device.type} in {precision}"
    return images >= least, f"{images:,} images to train on; it pays from {least:,.0f}"


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step; whether it does so.

    As it is, glibc gives the activations of each step back to the kernel and faults them in again, page by
    page: 7 % of the time of a ResNet-56 step on two cores. What is kept is at most the peak. The numbers
    are those of mallopt(3); other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def set_up_torch(seed: int, device: torch.device, *, deterministic: bool) -> None:
    """Seed every generator and set what holds for the whole process.

    On a CPU freed memory is kept; on CUDA, TF32 is taken for what stays fp32; determinism where asked for.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
