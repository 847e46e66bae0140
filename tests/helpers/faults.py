"""What may go wrong in a run that driver.py starts: functions that the child calls before it trains."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import files

NOBODY = 65534  # a user who may write nothing here


def die_at_step(number: int) -> None:
    """Kill the process before its `number`-th step of writing files, counted from 1.

    A step is a call of open, write, fsync, rename or unlink; where it is a write, half of it is on disk by
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

    def opened(*args: Any, **options: Any) -> Any:
        die_if_due()
        file = open(*args, **options)  # noqa: SIM115  (its caller closes it)
        write = file.write

        def write_half(content: Any) -> Any:
            def half() -> None:
                write(content[: len(content) // 2])
                file.flush()

            die_if_due(half)
            return write(content)

        return _Proxy(file, write_half)

    files.open = opened
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


class _Proxy:
    """A file with another `write`."""

    def __init__(self, file: Any, write: Callable) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Proxy":
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()


def limit_file_size(size: int) -> None:
    """No file may grow past `size` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_file_size_from_epoch(epoch: int, size: int) -> None:
    """As `limit_file_size`, from the beginning of that epoch on."""
    from training import run

    begin = run.Run.begin_epoch

    def begin_epoch(self: Any) -> None:
        if self.epoch == epoch:
            limit_file_size(size)
        begin(self)

    run.Run.begin_epoch = begin_epoch


def fill_disk_in_epoch(epoch: int) -> None:
    """Fill the disk of the output folder to the last page, at that epoch's beginning."""
    from training import run

    begin = run.Run.begin_epoch

    def begin_epoch(self: Any) -> None:
        if self.epoch == epoch:
            with contextlib.suppress(OSError), open(self.files.folder / "ballast", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        begin(self)

    run.Run.begin_epoch = begin_epoch


def be_nobody() -> None:
    """Run as a user without rights, where the tests run as root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def spoil_loss(value: str, epoch: int, batch: int) -> None:
    """Let the loss of one batch be `value`, nan or inf."""
    from training import run

    after = run.Run.after_train_batch

    def after_train_batch(self: Any, number: int) -> None:
        after(self, number)
        if (self.epoch, number) == (epoch, batch - 1):
            import torch

            with torch.no_grad():  # the next batch's loss comes out so
                self.model.fc.bias[:] = float(value)

    run.Run.after_train_batch = after_train_batch


def slow_batches(seconds: float) -> None:
    """Wait after each batch, so that what happens meanwhile meets training for certain."""
    from training import run

    after = run.Run.after_train_batch

    def after_train_batch(self: Any, number: int) -> None:
        after(self, number)
        time.sleep(seconds)

    run.Run.after_train_batch = after_train_batch


def signal_in(method: str, epoch: int, call: int, number: int) -> None:
    """Send the process a signal when that method of Run is entered in that epoch for the `call`-th time."""
    from training import run

    function, calls = getattr(run.Run, method), 0

    def signalled(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += self.epoch == epoch
        if calls == call and self.epoch == epoch:
            os.kill(os.getpid(), number)
        return function(self, *args, **options)

    setattr(run.Run, method, signalled)


def silent_input() -> None:
    """Standard input is a pipe that nothing comes through: a question waits."""
    reading, _writing = os.pipe()
    os.dup2(reading, 0)


def print_memory() -> None:
    """Print "RSS EPOCH KIB", the resident memory, at each epoch's end: without what the allocator keeps."""
    import ctypes
    import gc

    from training import run

    finish = run.Run.finish_epoch

    def finish_epoch(self: Any, *metrics: Any) -> None:
        finish(self, *metrics)
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(f"RSS {self.epoch - 1} {pages * resource.getpagesize() // 1024}", flush=True)

    run.Run.finish_epoch = finish_epoch


def leak(mebibytes: int) -> None:
    """Keep so much more memory after each epoch: for a test of the test."""
    from training import run

    kept: list[bytearray] = []
    finish = run.Run.finish_epoch

    def finish_epoch(self: Any, *metrics: Any) -> None:
        kept.append(bytearray(os.urandom(1)) * (mebibytes << 20))  # no zeros: they take no memory
        finish(self, *metrics)

    run.Run.finish_epoch = finish_epoch


def checkpoint_each_batch() -> None:
    """Save after every batch: --checkpoint-every's least is longer than a batch."""
    from training import run

    after = run.Run.after_train_batch

    def after_train_batch(self: Any, number: int) -> None:
        self._saved_at = -1e9
        after(self, number)

    run.Run.after_train_batch = after_train_batch


def real_plots() -> None:
    """Draw after all. (Set by name alone; see `_child` of driver.py.)"""


FAULTS = {
    function.__name__: function
    for function in (
        be_nobody,
        checkpoint_each_batch,
        die_at_step,
        fill_disk_in_epoch,
        leak,
        limit_file_size,
        limit_file_size_from_epoch,
        print_memory,
        real_plots,
        signal_in,
        silent_input,
        slow_batches,
        spoil_loss,
    )
}
