"""Fetch one known file from the first source that gives it whole, and keep what came of it."""

import http.client
import logging
import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cifar.archive import md5_of
from core.errors import RunError, printable
from core.files import atomic_write

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
# Some hosts refuse urllib's own name.
USER_AGENT = "cifar100-resnet/1.0"


class DownloadFailed(RunError):
    """No source gave the file; `reasons` holds (source, reason) pairs in the order of trying."""

    def __init__(self, message: str, reasons: Sequence[tuple[str, str]]):
        super().__init__(message)
        self.reasons = list(reasons)


class _SourceFailed(Exception):
    """One source is given up. `again`: it gave bytes, so a second try may go on from there."""

    def __init__(self, reason: str, again: bool = False, bytes_per_s: float = 0.0):
        super().__init__(reason)
        self.again = again
        self.bytes_per_s = bytes_per_s


@dataclass(frozen=True)
class _Job:
    """What is wanted, and how patient to be; see `fetch`."""

    destination: Path
    part: Path
    md5: str
    size: int
    show_progress: bool
    connect_s: float
    stall_s: float
    slow_window_s: float
    clock: Callable[[], float]


def fetch(
    sources: Sequence[str],
    destination: str | Path,
    *,
    md5: str,
    size: int,
    show_progress: bool = True,
    connect_s: float = 8.0,
    stall_s: float = 20.0,
    slow_window_s: float = 30.0,
    slow_bytes_per_s: float = 200_000.0,
    clock: Callable[[], float] = time.monotonic,
) -> Path:
    """Put the file with this `md5` and `size` (bytes) at `destination` and return that path.

    `sources` are http(s) URLs, file URLs or paths of local files, all of the same bytes, tried in
    order. Bytes received are kept in `destination` + ".part", also over Ctrl-C, and the next try
    goes on from there, whichever source it asks (HTTP Range). A source is given up when its first
    answer takes over `connect_s` (name look-up, redirects and TLS included: each wait alone could
    take minutes), when no byte comes for `stall_s`, or when it gives under `slow_bytes_per_s` over
    `slow_window_s` while others are untried. Once all were tried, those that gave something are
    asked again, the fastest first and without the speed rule, for as long as a round brings 1 %.
    Sources given up before one succeeds are named in the log.

    Raises:
        DownloadFailed: no source gave the file whole and with the right md5.
        RunError: the folder cannot be written.
    """
    destination = Path(destination)
    part = destination.with_name(destination.name + ".part")
    job = _Job(destination, part, md5, size, show_progress, connect_s, stall_s, slow_window_s, clock)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {destination.parent}: {error.strerror}") from error

    reasons: dict[str, str] = {}
    rates: dict[str, float] = {}
    waiting = list(dict.fromkeys(sources))
    first_round = True
    while waiting:
        bytes_before = _size_of(part)
        again = []
        for number, source in enumerate(waiting, start=1):
            # The last untried source need only be faster than those given up as slow.
            untried = number < len(waiting)
            least = slow_bytes_per_s if untried else max(rates.values(), default=0.0)
            try:
                path = _try_source(source, job, least if first_round else 0.0)
                for failed, reason in reasons.items():
                    log.warning("given up: %s: %s", label(failed), reason)
                return path
            except _SourceFailed as failure:
                reasons[source] = str(failure)
                if failure.again:
                    again.append(source)
                    rates[source] = failure.bytes_per_s
        if not first_round and _size_of(part) - bytes_before < size / 100:
            break
        first_round = False
        waiting = sorted(again, key=lambda source: -rates[source])
    pairs = [(label(source), reason) for source, reason in reasons.items()]
    raise DownloadFailed(f"no source gave {destination.name}", pairs)


def label(source: str) -> str:
    """`source` without user name, password and query, which may be secrets."""
    scheme, separator, rest = source.partition("://")
    if separator and scheme in ("http", "https"):
        host, slash, path = rest.partition("?")[0].partition("/")
        return printable(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")
    return printable(source)


def _size_of(path: Path) -> int:
    """The size of a file in bytes, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _try_source(source: str, job: _Job, least_bytes_per_s: float) -> Path:
    """`fetch` from one source; raises _SourceFailed with the reason."""
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError as error:
        raise _SourceFailed(f"not a URL: {printable(error)}") from error
    if parts.scheme in ("http", "https"):
        resumed = True
        while resumed:
            resumed = _download(source, job, least_bytes_per_s)
            if _accept_part(job):
                return job.destination
            # Bytes kept from before may be the bad ones: then this source gets a fresh start.
        raise _SourceFailed("what it sends has the wrong md5")
    if parts.scheme == "file":
        return _copy(Path(urllib.request.url2pathname(parts.path)), job)
    if len(parts.scheme) > 1 and "://" in source:
        raise _SourceFailed(f"{printable(parts.scheme)} is not http, https or file")
    return _copy(Path(source).expanduser(), job)


def _copy(path: Path, job: _Job) -> Path:
    """Copy a local file to the destination when it is the right one."""
    try:
        # Asked first: a device or a pipe has no end.
        if not path.is_file():
            raise _SourceFailed("no such file")
        if path.stat().st_size != job.size:
            raise _SourceFailed(f"has {path.stat().st_size:,} bytes, not {job.size:,}")
        if md5_of(path) != job.md5:
            raise _SourceFailed("has the wrong md5")
    except (OSError, ValueError) as error:
        raise _SourceFailed(_reason(error, job)) from error
    if path.resolve() != job.destination.resolve():
        with open(path, "rb") as source, atomic_write(job.destination) as target:
            shutil.copyfileobj(source, target)
    return job.destination


def _accept_part(job: _Job) -> bool:
    """Move a whole .part into place; delete it, and return False, when its md5 is wrong."""
    try:
        if md5_of(job.part) != job.md5:
            job.part.unlink()
            return False
        os.replace(job.part, job.destination)
    except FileNotFoundError:
        # Another process that fetched the same file was faster by a moment.
        return job.destination.is_file() and md5_of(job.destination) == job.md5
    except OSError as error:
        raise RunError(f"cannot write {job.destination}: {error.strerror}") from error
    return True


def _download(source: str, job: _Job, least_bytes_per_s: float) -> bool:
    """Complete the .part from one server; True when bytes kept from before are in it."""
    offset = _size_of(job.part)
    if offset >= job.size:
        return True  # whole or too long: its md5 says which
    try:
        try:
            response = _open(source, offset, job)
        except urllib.error.HTTPError as error:
            # 416: the server finds the range wrong. Ask for the whole file, and check its length.
            if error.code != 416 or not offset:
                raise
            offset = 0
            response = _open(source, 0, job)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SourceFailed(_reason(error, job)) from error
    with response:
        start, length_known = _check_answer(response, offset, job.size)
        position = start
        try:
            position = _receive(response, source, start, job, least_bytes_per_s)
        finally:
            # A page that is no archive (a login page, say) must not stay as the file's beginning.
            if not length_known and position < job.size:
                job.part.unlink(missing_ok=True)
    if position < job.size:
        reason = f"the connection closed after {position:,} of {job.size:,} bytes"
        raise _SourceFailed(reason, again=position > start)
    return start > 0


def _open(source: str, offset: int, job: _Job) -> http.client.HTTPResponse:
    """Ask for the bytes from `offset` on; the answer's head must come within `connect_s`.

    A thread asks, because look-ups and connects to several addresses have no common time limit.
    """
    headers = {"User-Agent": USER_AGENT}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(source, headers=headers)
    answers: queue.SimpleQueue = queue.SimpleQueue()
    given_up = threading.Event()

    def ask() -> None:
        try:
            answer = urllib.request.urlopen(request, timeout=job.stall_s)
        except Exception as error:  # raised again by the caller below
            answer = error
        if given_up.is_set() and not isinstance(answer, Exception):
            answer.close()
        answers.put(answer)

    threading.Thread(target=ask, daemon=True, name="download").start()
    try:
        answer = answers.get(timeout=job.connect_s)
    except queue.Empty:
        given_up.set()
        raise TimeoutError(f"no answer within {job.connect_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _check_answer(response: http.client.HTTPResponse, offset: int, size: int) -> tuple[int, bool]:
    """Where the answer's bytes start in the file, and whether it said a length; 200 starts at 0."""
    if response.status == 206:
        # "bytes 100-199/200"; the total may be "*".
        span, _, total = response.headers.get("Content-Range", "").partition("/")
        start = span.removeprefix("bytes").strip().partition("-")[0]
        if start != str(offset) or total.strip() not in (str(size), "*"):
            raise _SourceFailed("it answers with another range than the one asked for")
        return offset, True
    length = response.headers.get("Content-Length")
    if response.status != 200:
        raise _SourceFailed(f"HTTP {response.status}")
    if length is not None and length.strip() != str(size):
        raise _SourceFailed(f"it offers {printable(length)} bytes, not {size:,}")
    return 0, length is not None


def _receive(
    response: http.client.HTTPResponse,
    source: str,
    start: int,
    job: _Job,
    least_bytes_per_s: float,
) -> int:
    """Write the answer's bytes into the .part from `start` on; the position reached at its end.

    Written in place, so that bytes kept from before survive a server without Range that breaks
    off, and two processes that fetch at once write the same bytes to the same places.
    """
    position = window_start = start
    window_began = job.clock()
    bar = tqdm(
        total=job.size,
        initial=start,
        desc=urllib.parse.urlsplit(source).hostname,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if job.show_progress else True,  # None: silent where stderr is no terminal
    )
    with _open_part(job.part) as file, bar:
        file.seek(start)
        while position < job.size:
            try:
                # read1 returns what is there; read would wait for the whole chunk.
                chunk = response.read1(min(CHUNK_BYTES, job.size - position))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{_reason(error, job)}, after {position:,} of {job.size:,} bytes"
                raise _SourceFailed(reason, again=position > start) from error
            if not chunk:
                break
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise RunError(f"cannot write {job.part}: {error.strerror}") from error
            position += len(chunk)
            bar.update(len(chunk))
            seconds = job.clock() - window_began
            if seconds >= job.slow_window_s and position < job.size:
                rate = (position - window_start) / seconds
                if rate < least_bytes_per_s:
                    raise _SourceFailed(f"slow: {rate / 1000:.0f} kB/s", True, rate)
                window_start, window_began = position, job.clock()
    return position


def _open_part(part: Path):
    """The .part, open for writing anywhere in it, made when missing."""
    try:
        return os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)), "r+b")
    except OSError as error:
        raise RunError(f"cannot write {part}: {error.strerror}") from error


def _reason(error: Exception, job: _Job) -> str:
    """An exception of a try as one short line."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return printable(f"HTTP {error.code} {error.reason}")
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return printable(str(error) if "within" in str(error) else f"no byte for {job.stall_s:g} s")
    said = getattr(error, "strerror", None) or str(error)
    if isinstance(error, http.client.HTTPException) or not said:
        said = f"{type(error).__name__} {said}".strip()  # BadStatusLine alone holds just the line
    return printable(said)
