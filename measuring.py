"""Measuring: two ways to do a thing in turn, and what the machine could do at best.

A rate is images a second of wall-clock time. On a machine that other programs use too, the processor time of
this process is the steadier figure: it is kept beside, where the work is done by this process on a CPU.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.machine import device_name, usable_cores

# (images, channels, pixels a side) of the 3x3 convolutions whose best counts as the convolution peak:
# ResNet-56's own three shapes, and two that are easier on caches and registers.
CONVOLUTIONS = ((128, 16, 32), (128, 32, 16), (128, 64, 8), (32, 128, 16), (16, 256, 16))
MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


@dataclass(frozen=True)
class Sample:
    """One measurement: `images` done in `wall_s` seconds, for `cpu_s` seconds of this process's threads."""

    images: int
    wall_s: float
    cpu_s: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.wall_s

    @property
    def core_rate(self) -> float:
        """Images a second of processor time."""
        return self.images / self.cpu_s


@dataclass
class Pair:
    """A thing to measure, the plain way and the project's; each call does it once."""

    plain: Callable[[], Sample]
    project: Callable[[], Sample]
    samples: list[tuple[Sample, Sample]] = field(default_factory=list)  # (plain, project) of each round


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(work: Callable[[], int], device: torch.device) -> Sample:
    """Do `work` once and measure it, to the end of what it asked of the device."""
    synchronize(device)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    images = work()
    synchronize(device)
    return Sample(images, time.perf_counter() - wall_s, max(time.process_time() - cpu_s, 1e-9))


def measure(pairs: Sequence[Pair], rounds: int, after_sample: Callable[[], object]) -> None:
    """Measure every pair `rounds` times, plain and project in turn, after one unmeasured run of each.

    In turn, so that a slow minute of the machine falls on both sides. `after_sample` is called after every
    run: 2 * len(pairs) * (rounds + 1) times.
    """
    for number in range(rounds + 1):
        for pair in pairs:
            samples = []
            for work in (pair.plain, pair.project):
                samples.append(work())
                after_sample()
            if number:
                pair.samples.append((samples[0], samples[1]))


def repeated(step: Callable[[], int], times: int) -> Callable[[], int]:
    """`step` so many times as one piece of work."""
    return lambda: sum(step() for _ in range(times))


def summary(
    samples: Sequence[tuple[Sample, Sample]], *, per_core: bool = False, own_cpu: bool = True
) -> dict:
    """Medians over rounds with the least and the most, and the ratio of the two medians, project to plain.

    Args:
        per_core: rates in images a second of processor time instead of wall-clock time.
        own_cpu: whether this process's processor time is that of the whole work; then its ratio is given too.
    """
    get = (lambda sample: sample.core_rate) if per_core else (lambda sample: sample.rate)
    plain, project = ([get(pair[side]) for pair in samples] for side in (0, 1))
    ratios = [b / a for a, b in zip(plain, project, strict=True)]
    unit = "images_per_s_per_core" if per_core else "images_per_s"
    result = {
        unit: statistics.median(project),
        f"{unit}_spread": [min(project), max(project)],
        f"plain_{unit}": statistics.median(plain),
        f"plain_{unit}_spread": [min(plain), max(plain)],
        "ratio": statistics.median(project) / statistics.median(plain),
        "ratio_spread": [min(ratios), max(ratios)],
    }
    if own_cpu and not per_core:
        medians = [statistics.median(pair[side].core_rate for pair in samples) for side in (0, 1)]
        result["cpu_time_ratio"] = medians[1] / medians[0]
        result["images_per_core_second"], result["plain_images_per_core_second"] = medians[1], medians[0]
    return result


def best_seconds(work: Callable[[], object], device: torch.device, at_least_s: float) -> float:
    """The shortest of the times that `work` took, over `at_least_s` seconds of trying and 3 tries."""
    timed(lambda: (work(), 0)[1], device)  # allocations and the choice of a kernel
    times: list[float] = []
    while sum(times) < at_least_s or len(times) < 3:
        times.append(timed(lambda: (work(), 0)[1], device).wall_s)
    return min(times)


def matrix_peak(device: torch.device, dtype: torch.dtype, at_least_s: float) -> float:
    """FLOP/s of torch.mm on square matrices; a multiply-add counts as two."""
    side = MATRIX_SIDE.get(device.type, 4096)
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / best_seconds(lambda: torch.mm(a, b, out=out), device, at_least_s)


@torch.no_grad()
def convolution_peak(device: torch.device, dtype: torch.dtype, at_least_s: float) -> float:
    """FLOP/s of the fastest forward 3x3 convolution of CONVOLUTIONS, in channels_last memory."""
    best = 0.0
    for count, channels, side in CONVOLUTIONS:
        images, weight = (
            torch.rand(shape, device=device).to(dtype).to(memory_format=torch.channels_last)
            for shape in ((count, channels, side, side), (channels, channels, 3, 3))
        )
        seconds = best_seconds(
            lambda images=images, weight=weight: F.conv2d(images, weight, padding=1),
            device,
            at_least_s / len(CONVOLUTIONS),
        )
        best = max(best, 2 * count * (channels * 3 * side) ** 2 / seconds)
    return best


def copy_rate(device: torch.device, at_least_s: float) -> float:
    """Bytes/s that copying a large array moves: each byte is read once and written once."""
    size = COPY_BYTES.get(device.type, 2**28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, at_least_s)


@torch.no_grad()
def step_bytes(model: nn.Module, element_bytes: int, size: int = 32) -> int:
    """Bytes an image moves in a training step, were each array read and written in memory once a use.

    Forward, a convolution reads its input and writes its output; BatchNorm reads twice (statistics, then
    normalisation) and writes; the ReLU or sum after it reads and writes. Backward moves twice as much:
    gradients beside what was stored. Weights are left out (the batch shares them), and caches save a part.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.BatchNorm2d):
            total += 5 * output.numel()
        else:
            total += inputs[0].numel() + output.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return 3 * element_bytes * total


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, as plain types."""
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor_name() -> str:
    """The processor's name as /proc/cpuinfo, or else Python, has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
