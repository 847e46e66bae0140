"""Runs train.py many times at the price of one import: a process that imports it and forks a child a run.

It must never have computed anything with torch before it forks, since a child cannot use its parent's
threads. A child differs from `python train.py ...` in four ways: it reads a CIFAR-100 of 200 random training
and 100 test images, knows a smaller network (resnet8), its plots are a few bytes instead of half a second of
drawing, and it may carry faults (the functions of faults.py).
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from helpers import REPOSITORY, faults
from training.checkpoint import load_checkpoint

STILL_RUNNING = -1000
# A quick run: 5 batches an epoch, and a network whose branches drop out, so that training draws from torch's
# global random state and a resumed run must get that back too.
QUICK = ["--yes", "--model", "resnet8", "--lr", "0.05", "--epochs", "3", "--limit-train", "100"]
QUICK += ["--batch-size", "20", "--precision", "fp32", "--workers", "0"]


class Driver:
    """The forking process, from outside. `data` is the folder of the small data set."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
        environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.driver", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def close(self) -> None:
        """End it, and with it every child that still runs."""
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def start(self, flags: list[Any], output: Path, *faults: list[Any]) -> "Child":
        """Run `train.py FLAGS --data-dir DATA`, standard output and error in the file `output`."""
        flags = [*map(str, flags), "--data-dir", str(self.data)]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        pid = self._ask({"start": flags, "output": str(output), "faults": faults})
        return Child(self, pid, output)

    def run(self, flags: list[Any], output: Path, *faults: list[Any]) -> tuple[int, str]:
        """`start`, then wait: the exit code (minus the signal for a killed one) and what was printed."""
        child = self.start(flags, output, *faults)
        return child.wait(), child.output

    def _ask(self, request: dict[str, Any]) -> int:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


class Child:
    """One run of train.py."""

    def __init__(self, driver: Driver, pid: int, output: Path) -> None:
        self._driver, self.pid, self._output = driver, pid, output

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit code, minus the signal's number for a killed one; STILL_RUNNING after the timeout."""
        return self._driver._ask({"wait": self.pid, "timeout_s": timeout_s})

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Wait until it has printed `text`."""
        end, ended = time.monotonic() + timeout_s, False
        while text not in self.output:
            assert not ended and time.monotonic() < end, f"{text!r} did not come: {self.output}"
            time.sleep(0.005)
            ended = self.ended()

    def kill_after(self, cpu_s: float) -> int:
        """Kill it when it has computed for so long, however busy the machine is; its exit code."""
        while not self.ended() and self._computed_s() < cpu_s:
            time.sleep(0.002)
        return self.kill()

    def _computed_s(self) -> float:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return math.inf

    def ended(self) -> bool:
        """Whether it has ended."""
        return self.wait(0) != STILL_RUNNING

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send it a signal, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):  # it has ended, and was waited for
            os.kill(self.pid, number)
        return self.wait()


def processes_of_group(group: int) -> list[int]:
    """The live processes of a process group: a child leads its own, its loader's workers are in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(path.parent.name))
    return found


def wait_until_gone(group: int, timeout_s: float = 30) -> list[int]:
    """The processes of the group that still live after that long; empty as soon as there are none."""
    end = time.monotonic() + timeout_s
    while (left := processes_of_group(group)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def digests(folder: Path, name: str = "CNN_Model") -> dict[str, str]:
    """What a finished run left, to be compared bit by bit: the table's bytes, and of each checkpoint the
    weights and all the rest but the time it took, random states included."""
    table = (folder / f"{name}_history.csv").read_bytes()
    found = {"history": hashlib.sha256(table).hexdigest()}
    for kind in ("last", "best", "training_results"):
        state = load_checkpoint(folder / f"{name}_{kind}.pth")
        state.pop("elapsed_s", None)
        found |= {f"{kind} {key}": _digest(value) for key, value in state.items()}
    return found


def _digest(value: Any) -> str:
    """A digest of nested plain values and tensors; floats by repr, which tells all of them apart."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        value = value.dtype, value.shape, value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        value = {key: _digest(entry) for key, entry in value.items()}
    elif isinstance(value, list | tuple):
        value = [_digest(entry) for entry in value]
    return hashlib.sha256(f"{kind} {value!r}".encode()).hexdigest()


# ---- the forking process itself ----


def main(folder: Path) -> int:
    """Answer requests, one JSON line each, until standard input ends."""
    import pytest

    import model
    import train  # noqa: F401  (imported once, for every child)
    from helpers.tiny_cifar import install_tiny_cifar, tiny_contents

    model.MODELS["resnet8"] = functools.partial(model.ResNet, model.BasicBlock, 1, drop_path=0.3)
    install_tiny_cifar(pytest.MonkeyPatch(), tiny_contents()).lay(folder / "data")
    codes: dict[int, int] = {}  # of every child so far
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                return _child(request)
            codes[answer] = STILL_RUNNING
        else:
            answer = _wait(request["wait"], request["timeout_s"], codes)
        print(answer, flush=True)
    for pid in [pid for pid, code in codes.items() if code == STILL_RUNNING]:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return 0


def _wait(pid: int, timeout_s: float, codes: dict[int, int]) -> int:
    end = time.monotonic() + timeout_s
    while codes[pid] == STILL_RUNNING:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            break
        else:
            time.sleep(0.005)
    return codes[pid]


def _child(request: dict[str, Any]) -> int:
    """What `python train.py FLAGS` does, with the faults asked for."""
    os.setpgid(0, 0)  # so that its workers can be told from others'
    descriptor = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, descriptor), (2, descriptor)):
        os.dup2(source, target)
    sys.argv = ["train.py", *request["start"]]
    import train
    from core.cli import run_main
    from core.files import atomic_write_text

    train.plot_history = lambda rows, path, **options: atomic_write_text(path, f"{len(rows)} epochs")
    for name, *values in request["faults"]:
        getattr(faults, name)(*values)
    return run_main(train.main, "train.py")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
