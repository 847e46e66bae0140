"""Files that are either the old version or the new one, whatever happens in between."""

import contextlib
import glob
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from core.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def atomic_write(path: str | Path, keep: str | Path | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file whose content appears at `path` whole, or not at all.

    With `keep`, what stood at `path` is moved there once the new content is safely on disk.

    The bytes go to a temporary name in the same folder, are flushed and fsynced, and are moved into
    place by `os.replace`; then the folder is fsynced, so that the new name survives a power cut. On any
    error the temporary file is removed and what stood at `path` stays.

    Raises:
        RunError: the folder is missing or read-only, the disk is full, a file-size limit is reached.
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; give the mode that open() would have given.
        os.chmod(temporary, 0o666 & ~_umask())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"cannot write {path}: {reason}; earlier files are unchanged") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def remove_temporary_files(folder: Path, prefix: str) -> None:
    """Delete the temporary files that processes killed in an `atomic_write` left beside `prefix`... files.

    For the holder of the run's lock alone: a live process's temporary file looks the same.
    """
    for path in folder.glob(f".{glob.escape(prefix)}*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def _umask() -> int:
    """The process's umask; reading it means setting it for a moment."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable where the system can open folders (Windows cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RunLock:
    """A file that says which process writes a run; a lock left by a dead process of this host is taken over.

    Raises:
        RunError: a live process, or one on another host, holds the lock; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> "RunLock":
        mine = _this_process()
        for _ in range(3):
            try:
                self._create(mine)
            except FileExistsError:
                self._remove_if_stale()
                continue
            except OSError as error:
                raise RunError(f"cannot write {self.path}: {error.strerror or error}") from None
            return self
        raise RunError(f"cannot take {self.path}: other processes keep taking it; pass another --name")

    def _create(self, content: str) -> None:
        """Create the lock with its content at once: a process killed in between leaves none half written.

        Raises:
            OSError: FileExistsError where there is a lock, others where none can be written.
        """
        descriptor, temporary = tempfile.mkstemp(
            dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp"
        )
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~_umask())
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                raise
            except (OSError, AttributeError):  # a file system without hard links
                with open(self.path, "x") as file:
                    file.write(content)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def __exit__(self, *details: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.path.read_text() == _this_process():  # else someone deleted it, and took the run over
                self.path.unlink()

    def _remove_if_stale(self) -> None:
        """Remove the lock of a dead process; of several that find it one does, and the others look again."""
        try:
            with open(self.path) as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return  # removed, and taken by another process, while we waited
                self._refuse_if_held(file)
                if fcntl is None:
                    file.close()  # Windows removes no open file
                self.path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(
                f"cannot use {self.path}: {error.strerror or error}; pass another --name"
            ) from None

    def _refuse_if_held(self, file: TextIO) -> None:
        try:
            pid, host, started = file.read(1000).split()
            alive = host != socket.gethostname() or _start_time(int(pid)) == started
        except (ValueError, OverflowError):
            # half written: its process died, or is writing it this moment
            pid, host, alive = "an unknown number", "an unknown host", self._age_s() < 5
        if alive:
            raise RunError(
                f"process {pid} on {host} is writing this run ({self.path}): pass another --name, or "
                "delete that file if no such process runs"
            )

    def _age_s(self) -> float:
        with contextlib.suppress(OSError):
            return time.time() - self.path.stat().st_mtime
        return 0.0


def _this_process() -> str:
    return f"{os.getpid()} {socket.gethostname()} {_start_time(os.getpid())}\n"


def _start_time(pid: int) -> str:
    """When process `pid` started, in the kernel's ticks, so that a reused number is told apart; "dead" for
    one that does not run, "alive" for one that runs where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]  # a zombie writes nothing any more
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except OSError:
        pass
    return "alive"
