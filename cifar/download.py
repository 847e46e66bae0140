"""Download a tar.gz of known md5 from the first source that is fast enough, and extract it."""

import contextlib
import hashlib
import http.client
import logging
import os
import queue
import re
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.cli import LOG, progress_bar
from core.errors import RunError, printable
from core.files import atomic_write

log = logging.getLogger(__name__)

# A source is given up when its first answer takes longer than CONNECT_S (name look-up, redirects and TLS
# included), when no byte arrives for STALL_S, or when it is slower than SLOW_BYTES_PER_S over SLOW_WINDOW_S.
CONNECT_S = 8.0
STALL_S = 20.0
SLOW_WINDOW_S = 30.0
SLOW_BYTES_PER_S = 200_000.0
CHUNK_BYTES = 256 * 1024
GZIP_START = b"\x1f"  # the first byte of every gzip file
USER_AGENT = "cifar100-resnet/1.0"  # some hosts refuse urllib's default


class DownloadFailed(RunError):
    """No source provided the file; the message has a line for each source with its reason."""


class _SourceFailed(Exception):
    """Why one source was given up."""


def fetch(sources: Sequence[str], destination: str | Path, *, md5: str, size: int) -> Path:
    """Put the tar.gz with this `md5` and `size` (bytes) at `destination` and return that path.

    `sources` are http(s) URLs, file URLs or local paths of the same file, tried in order until one is fast
    enough (see CONNECT_S). The bytes received are kept in `destination` + ".part", after Ctrl-C too, and the
    next attempt resumes there, whichever source it uses (HTTP Range). Once all sources were tried, those
    that sent at least a thousandth of the file are tried again, the fastest first and at any speed, for as
    long as that makes progress.

    Raises:
        DownloadFailed: no source provided the whole file with the right md5.
        RunError: the folder cannot be written.
    """
    download = _Download(Path(destination), md5, size)
    with _writing(download.path.parent):
        download.path.parent.mkdir(parents=True, exist_ok=True)
    reasons: dict[str, str] = {}
    remaining, min_speed = list(dict.fromkeys(sources)), SLOW_BYTES_PER_S
    while remaining:
        speeds: dict[str, float] = {}
        for source in remaining:
            bytes_before, began = _size_of(download.part), time.monotonic()
            LOG.info(f"Trying {_label(source)} (given up after {CONNECT_S:g} s without an answer)")
            try:
                download.from_source(source, min_speed)
            except _SourceFailed as failure:
                reasons[source] = str(failure)
            else:
                for failed, reason in reasons.items():
                    log.warning("download source failed: %s: %s", _label(failed), reason)
                return download.path
            received = _size_of(download.part) - bytes_before
            if received >= size / 1000:
                speeds[source] = received / max(time.monotonic() - began, 1e-3)
        remaining, min_speed = sorted(speeds, key=lambda source: -speeds[source]), 0.0
    raise DownloadFailed("\n".join(f"  {_label(source)}: {reason}" for source, reason in reasons.items()))


def md5_of(path: Path) -> str:
    """The md5 of a file in hexadecimal; OSError if it cannot be read."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def broken_link(path: Path) -> str | None:
    """A sentence about the broken symbolic link that `path` is or goes through; None if there is none."""
    for link in filter(os.path.islink, (path, *path.parents)):
        try:
            link.stat()
        except FileNotFoundError:  # PermissionError: the target may exist
            return f"{link} is a broken link to {os.readlink(link)}"
        except OSError:
            pass
    return None


def extract(archive: Path, names: Sequence[str], folder: Path) -> None:
    """Extract the files `names` of a tar.gz of known md5 into `folder`, each one atomically.

    No path comes from the archive: a member is written to `folder` under the last part of its name, so that
    no archive can write elsewhere, with or without tarfile's filters (Python 3.10.12).

    Raises:
        RunError: the archive is damaged, or `folder` cannot be written.
    """
    with _writing(folder):
        folder.mkdir(exist_ok=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:  # in the archive's order: going back would decompress it again
                if member.isfile() and member.name in names:
                    with atomic_write(folder / Path(member.name).name) as target:
                        shutil.copyfileobj(tar.extractfile(member), target)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise RunError(f"cannot unpack {archive}: {printable(error)}") from error


def _label(source: str) -> str:
    """`source` without user name, password and query, which may be secrets."""
    if source.startswith(("http://", "https://")):
        source = re.sub(r"(?s)(?<=://)[^/?#]*@|\?.*", "", source)
    return printable(source)


def _size_of(path: Path) -> int:
    """The size of a file in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise a RunError for an OSError: the disk failed, not the source."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


class _Download:
    """A file of known md5 and size (bytes) at `path`, and what has been received of it in `part`."""

    def __init__(self, path: Path, md5: str, size: int) -> None:
        self.path, self.md5, self.size = path, md5, size
        self.part = path.with_name(path.name + ".part")

    def from_source(self, source: str, min_speed: float) -> None:
        """Complete the file from one source, which must send at least `min_speed` bytes/s.

        Raises:
            _SourceFailed: it did not.
        """
        path = None if "://" in source else Path(os.path.expanduser(source))
        while True:
            try:
                start = self._receive(path.absolute().as_uri() if path else source, min_speed)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _SourceFailed((path and broken_link(path)) or _reason(error)) from error
            if self._accept_part():
                return
            if start == 0:
                raise _SourceFailed("sends a file with the wrong md5")
            # The bytes from an earlier attempt may be the bad ones: start afresh.

    def _accept_part(self) -> bool:
        """Move the whole .part into place; if its md5 is wrong, delete it and return False."""
        with _writing(self.path):
            try:
                if md5_of(self.part) == self.md5:
                    os.replace(self.part, self.path)
                    return True
                self.part.unlink()
                return False
            except FileNotFoundError:  # another process has just completed the same download
                return self.path.is_file() and md5_of(self.path) == self.md5

    def _receive(self, url: str, min_speed: float) -> int:
        """Complete the .part from a URL; return where in the file its answer began, in bytes.

        Written in place, so that earlier bytes survive a server without Range that breaks off, and two
        processes that download at once write the same bytes to the same places.
        """
        start = _size_of(self.part)
        if start >= self.size:
            return start  # complete or too long: the md5 will tell
        with _open(url, start) as response:
            if response.status not in (200, 206, None):  # None: a local file
                raise _SourceFailed(f"HTTP {response.status}")
            if response.status != 206:
                start = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise _SourceFailed("sends another range than the one asked for")
            length = response.headers.get("Content-Length")
            if length not in (None, str(self.size - start)):
                raise _SourceFailed(f"offers {printable(length)} bytes, not {self.size - start}")
            with _writing(self.part):
                self.part.touch()
                host = urllib.parse.urlsplit(url).hostname
                bar = progress_bar(total=self.size, initial=start, desc=host, unit="B", unit_scale=True)
                with open(self.part, "r+b") as file, bar:
                    file.seek(start)
                    for chunk in self._chunks(response, start, min_speed):
                        file.write(chunk)
                        file.flush()
                        bar.update(len(chunk))
        return start

    def _chunks(self, response: http.client.HTTPResponse, start: int, min_speed: float) -> Iterator[bytes]:
        """The file's bytes from `start` on, as they arrive."""
        position = window_start = start
        window_began = time.monotonic()
        while position < self.size:
            progress = f"after {position:,} of {self.size:,} bytes"
            try:
                # read1 returns what is there; read would wait for the whole chunk
                chunk = response.read1(min(CHUNK_BYTES, self.size - position))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _SourceFailed(f"{_reason(error)}, {progress}") from error
            if not chunk:
                raise _SourceFailed(f"the connection closed {progress}")
            if position == 0 and not chunk.startswith(GZIP_START):
                raise _SourceFailed("sends something else than a gzip file, perhaps a login page")
            yield chunk
            position += len(chunk)
            seconds = time.monotonic() - window_began
            if seconds >= SLOW_WINDOW_S and position < self.size:
                speed = (position - window_start) / seconds
                if speed < min_speed:
                    raise _SourceFailed(f"too slow: {speed / 1000:.0f} kB/s")
                window_start, window_began = position, time.monotonic()


def _open(url: str, start: int) -> http.client.HTTPResponse:
    """Ask for the bytes from `start` on; the answer must begin within CONNECT_S.

    A thread asks: urllib's time-out limits neither the look-up of the name, nor the sum over a host's
    addresses and redirects, nor an answer whose head arrives byte by byte.
    """
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=STALL_S))
        except Exception as error:  # raised by the caller below
            answers.put(error)

    threading.Thread(target=ask, daemon=True, name="download").start()
    try:
        answer = answers.get(timeout=CONNECT_S)
    except queue.Empty:
        raise _SourceFailed(f"no answer within {CONNECT_S:g} s") from None
    if isinstance(answer, urllib.error.HTTPError) and answer.code == 416 and start:
        return _open(url, 0)  # the server refuses the range: ask for the whole file
    if isinstance(answer, Exception):
        raise answer
    return answer


def _reason(error: Exception) -> str:
    """The reason that an exception gives, as one short line."""
    if type(error) is urllib.error.URLError:  # not its subclass HTTPError, which names the status
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no byte for {STALL_S:g} s"
    name = f"{type(error).__name__}: " if isinstance(error, http.client.HTTPException) else ""
    return printable(f"{name}{getattr(error, 'strerror', None) or error}")
