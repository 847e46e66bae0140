"""Files that hold either their old or their new content, whatever happens; one writer for each run."""

import contextlib
import glob
import os
import secrets
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from core.errors import RunError, UsageError


@contextlib.contextmanager
def atomic_write(path: str | Path, keep: str | Path | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file whose content appears at `path` whole, or not at all.

    With `keep`, an earlier file at `path` is moved there once the new content is safely on disk.

    The bytes are written to a temporary file in the same folder, flushed, fsynced and moved into place by
    `os.replace`; then the folder is fsynced, so that the new name survives a power cut. On any error the
    temporary file is deleted and an earlier file at `path` stays.

    Raises:
        RunError: the folder is missing or read-only, the disk is full, a file-size limit is reached.
    """
    path = Path(path)
    name = os.fsencode(path.name)[:240].decode(errors="ignore")  # with what is added, at most 255 bytes
    temporary = path.parent / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"cannot write {path}: {reason}; earlier files are unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def check_output(path: Path, suffixes: Collection[str], inputs: Collection[Path] = ()) -> None:
    """Check that a result can be written to `path` and replaces no file of another kind: before the work.

    Args:
        suffixes: those of the files that may be replaced (".json"); an empty file may too, whatever its name.
        inputs: files that the command reads.

    Raises:
        UsageError: `path` is a folder, in a folder that does not exist, an input, or of another kind.
        RunError: no file can be written there.
    """
    try:
        if path.is_dir():
            raise UsageError(f"cannot write {path}: it is a folder, name a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
        with contextlib.suppress(FileNotFoundError):  # a new file may have any name
            empty = path.stat().st_size == 0 and not path.is_symlink()  # as /dev/stdout is
            if any(path.samefile(other) for other in inputs):
                raise UsageError(f"{path} is an input of this command: name another file for the output")
            if not path.is_file() or not (empty or path.suffix.lower() in suffixes):
                kind = " or ".join(suffixes)
                raise UsageError(f"{path} exists and is not a {kind} file: name another one, or delete it")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def remove_temporary_files(folder: Path, prefix: str) -> None:
    """Delete temporary files left by processes that were killed while they wrote a file named `prefix`...

    Only the holder of the run's lock may do so: a live process's temporary file looks the same.
    """
    for path in folder.glob(f".{glob.escape(prefix)}*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def run_lock(path: str | Path) -> Iterator[None]:
    """Hold a lock on the file `path`, so that no second process writes the same run.

    The system frees the lock when its process ends, however that happens: a file left behind, by a killed
    process say, is not a lock. Where the file system has no locks, filelock makes the file itself one.

    Raises:
        RunError: another process holds the lock, or the file cannot be written.
    """
    path = Path(path)
    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"another process is writing the run {path.stem} ({path}): wait for it, or pass another --name"
        ) from None
    except OSError as error:
        raise RunError(f"cannot lock {path}: {error.strerror or error}; pass another --name") from None
    with held:
        try:
            yield
        finally:
            # Safe while the lock is held: filelock accepts no lock on a file that has been deleted meanwhile.
            # Windows deletes no open file; there filelock deletes it on release.
            with contextlib.suppress(OSError):
                path.unlink()
