"""The choice of device, precision, compilation and workers; torch's settings; versions."""

import builtins
import io
import math
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core import distributed, machine
from core.errors import UsageError
from core.machine import choose_compile, choose_device, fastest_precision, precision_name, set_up_torch
from helpers import REPOSITORY

CPU = torch.device("cpu")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch see `cuda` CUDA devices, and MPS or not."""

    def devices(cuda: int = 0, mps: bool = False, local_rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(distributed, "local_rank", lambda: local_rank)

    return devices


def test_auto_means_cuda_then_mps_then_the_cpu(devices: Callable[..., None]) -> None:
    devices()
    assert choose_device("auto") == CPU
    devices(mps=True)
    assert choose_device("auto") == torch.device("mps")
    devices(cuda=2, mps=True)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cpu") == CPU
    assert choose_device("mps") == torch.device("mps")


def test_each_process_has_a_cuda_device_of_its_own(devices: Callable[..., None]) -> None:
    devices(cuda=2, local_rank=1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    devices(cuda=2, local_rank=2)
    with pytest.raises(UsageError, match=r"sees 2 CUDA devices, and this is process 3; pass --device cpu"):
        choose_device("auto")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_available_is_a_usage_error(devices: Callable[..., None], name: str) -> None:
    devices()
    with pytest.raises(UsageError, match=f"--device {name}: torch sees .*pass --device cpu"):
        choose_device(name)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu sse avx2 avx512f\n", "fp32"),
        ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16 avx2\n", "bf16"),
        ("flags : fpu amx_bf16\n", "bf16"),
        ("Features\t: fp asimd bf16 sve\n", "bf16"),
        ("model name: bf16\n", "fp32"),
        (None, "fp32"),
    ],
)
def test_a_cpu_trains_in_bf16_where_it_says_that_it_has_it(monkeypatch, cpuinfo, expected) -> None:
    def fake_open(path: str, **_: object) -> io.StringIO:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return io.StringIO(cpuinfo)

    monkeypatch.setattr(builtins, "open", fake_open)
    result = fastest_precision(CPU)
    monkeypatch.undo()  # pytest opens files too
    assert result == expected


@pytest.mark.parametrize(
    ("capability", "fastest"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_precisions_on_cuda(monkeypatch, capability, fastest) -> None:
    gpu, mps = torch.device("cuda", 0), torch.device("mps")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert fastest_precision(gpu) == fastest and fastest_precision(mps) == "fp32"
    assert precision_name("fp32", gpu) == ("fp32 (TF32)" if fastest == "bf16" else "fp32")
    assert precision_name("bf16", gpu) == "bf16"
    assert precision_name("fp32", CPU) == precision_name("fp32", mps) == "fp32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert precision_name("fp32", gpu) == "fp32"


def test_the_network_is_compiled_where_a_run_is_long_enough() -> None:
    cuda = torch.device("cuda", 0)
    assert choose_compile("on", CPU, "fp32", 1, None) == (True, "--compile on")
    assert choose_compile("off", cuda, "bf16", 10**9, True) == (False, "--compile off")
    assert choose_compile("auto", CPU, "fp32", 10**9, None)[0] is False
    assert choose_compile("auto", cuda, "bf16", 10**9, None)[0] is True
    compiles, why = choose_compile("auto", cuda, "bf16", 256, None)
    assert not compiles and "256 images" in why
    # a resumed run keeps its choice
    for stored in (True, False):
        assert choose_compile("auto", cuda, "bf16", 256, stored)[0] is stored
        assert choose_compile("auto", CPU, "fp32", 10**9, stored)[0] is stored


def test_one_seed_seeds_every_generator() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        set_up_torch(seed, CPU, deterministic=False)
        return random.random(), float(np.random.random()), torch.rand(1).item()

    assert draw(5) == draw(5)
    assert all(a != b for a, b in zip(draw(5), draw(6), strict=True))


FAULTS = """
import resource, sys, torch
from core.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(30):
    if step == 20:  # the heap has reached its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(48 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for the allocator of glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        return int(done.stdout)

    assert faults("keep") < 100 < 1000 < faults("as it is")  # 10 times 48 MiB are 122,880 pages


def test_determinism_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "kept")
    try:
        set_up_torch(0, CPU, deterministic=False)
        assert not torch.are_deterministic_algorithms_enabled()
        set_up_torch(0, CPU, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "kept"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_code_version_is_the_commit_of_its_own_repository(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    version = machine.code_version.__wrapped__  # without its cache
    code = tmp_path / "core" / "machine.py"
    code.parent.mkdir()
    code.write_text("1\n")
    monkeypatch.setattr(machine, "__file__", str(code))
    assert version() == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert version() == head
    code.write_text("2\n")
    assert version() == f"{head}-dirty"
    # a copy within another repository is not that repository's code
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "copy" / "core" / "machine.py"))
    (tmp_path / "copy").mkdir()
    assert version() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version() == "unknown"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_containers_quota_is_read(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine._cgroup_cores(tmp_path) == quota


def test_cores_are_bounded_by_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for quota, expected in ((math.inf, 6), (2.5, 2), (0.5, 1), (64, 6)):
        monkeypatch.setattr(machine, "_cgroup_cores", lambda _, quota=quota: quota)
        assert machine.usable_cores() == expected


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(8, "1", (7, 1)), (8, "4", (1, 0)), (256, "1", (machine.MAX_WORKERS, 1)), (1, "4", (0, 0))],
)
def test_workers_follow_device_and_cores(monkeypatch, cores, processes, workers) -> None:
    # the processes of one machine share its cores
    monkeypatch.setattr(distributed, "local_world_size", lambda: int(processes))
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    assert (machine.choose_workers("cuda"), machine.choose_workers("cpu")) == workers
