"""What may go wrong in a run that driver.py starts: functions that the child calls before it trains."""

import contextlib
import ctypes
import gc
import io
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core import files
from training.run import Run

NOBODY = 65534  # a user who may write nothing here


def call_in(method: str, action: Callable[[Run], None], *, after: bool = False) -> None:
    """Call `action(run)` before (or `after`) each call of that method of Run."""
    function = getattr(Run, method)

    def with_action(run: Run, *args: Any, **options: Any) -> None:
        if not after:
            action(run)
        function(run, *args, **options)
        if after:
            action(run)

    setattr(Run, method, with_action)


def at(method: str, epoch: int, call: int, action: Callable[[Run], None]) -> None:
    """Call `action(run)` when that method of Run is called in that epoch for the `call`-th time."""
    calls = 0

    def count(run: Run) -> None:
        nonlocal calls
        if run.epoch == epoch:
            calls += 1
            if calls == call:
                action(run)

    call_in(method, count)


def signal_in(method: str, epoch: int, call: int, number: int) -> None:
    """Send the process a signal when that method of Run is called in that epoch for the `call`-th time."""
    at(method, epoch, call, lambda _: os.kill(os.getpid(), number))


def die_at_step(number: int) -> None:
    """Kill the process before its `number`-th step of writing files, counted from 1.

    A step is a call of open, write, fsync, replace or unlink; where it is a write, half of it is on disk by
    then.
    """
    steps = 0

    def die_if_due(last_act: Callable[[], None] = lambda: None) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            die_if_due()
            return function(*args, **options)

        return call

    class File(io.BufferedWriter):
        def write(self, content: bytes) -> int:
            die_if_due(lambda: (super(File, self).write(content[: len(content) // 2]), self.flush()))
            return super().write(content)

    files.open = counted(lambda path, mode: File(io.FileIO(path, mode)))
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def limit_file_size(size: int) -> None:
    """No file may grow past `size` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_file_size_in(method: str, epoch: int, size: int) -> None:
    """As `limit_file_size`, from the first call of that method of Run in that epoch on."""
    at(method, epoch, 1, lambda _: limit_file_size(size))


def fill_disk_in_epoch(epoch: int) -> None:
    """Fill the disk of the output folder to the last page, at that epoch's beginning."""

    def fill(run: Run) -> None:
        with contextlib.suppress(OSError), open(run.files.folder / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    at("begin_epoch", epoch, 1, fill)


def be_nobody() -> None:
    """Run as a user without rights, where the tests run as root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def spoil_loss(value: str, epoch: int, batch: int) -> None:
    """Let the loss of one batch be `value`, nan or inf."""

    def spoil(run: Run) -> None:
        if (run.epoch, run.batches_done) == (epoch, batch - 1):
            with torch.no_grad():  # the next batch's loss comes out so
                run.model.fc.bias[:] = float(value)

    call_in("after_train_batch", spoil, after=True)


def slow_batches(seconds: float) -> None:
    """Wait after each batch, so that what happens meanwhile meets training for certain."""
    call_in("after_train_batch", lambda _: time.sleep(seconds), after=True)


def silent_input() -> None:
    """Standard input is a pipe that nothing comes through: a question waits."""
    reading, _writing = os.pipe()
    os.dup2(reading, 0)


def print_memory(leak: int = 0) -> None:
    """Print "RSS EPOCH KIB", the resident memory, at each epoch's end: without what the allocator keeps.

    With `leak`, keep that many bytes more after each epoch: for a test of the test.
    """
    kept = []

    def show(run: Run) -> None:
        kept.append(b"x" * leak)
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(f"RSS {run.epoch - 1} {pages * resource.getpagesize() // 1024}", flush=True)

    call_in("finish_epoch", show, after=True)


def checkpoint_each_batch() -> None:
    """Save after every batch: --checkpoint-every's least is longer than a batch."""
    call_in("begin_epoch", lambda run: setattr(run, "checkpoint_every_s", -1.0))
