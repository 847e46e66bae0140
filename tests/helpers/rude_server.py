"""A server on this machine that sends a good file, or misbehaves in the way that the path names."""

import contextlib
import hashlib
import http.server
from collections.abc import Callable
from pathlib import Path

import numpy as np

GOOD = b"\x1f" + np.random.default_rng(0).bytes(199_999)  # begins as a gzip file does
BAD = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
MD5 = hashlib.md5(GOOD).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the path /KIND/... as ANSWERS[KIND] says."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1].split("?")[0]
        self.server.asked.append((kind, self.headers.get("Range")))
        with contextlib.suppress(OSError):  # the client may leave
            ANSWERS[kind](self)

    @property
    def start(self) -> int:
        """The first byte that the request asks for."""
        return int(self.headers.get("Range", "bytes=0-")[6:-1])

    def send(self, content: bytes, length: int | None, status: int = 200, **headers: str) -> None:
        """Send a head that promises `length` bytes (None: promises nothing), then `content`."""
        self.send_response(status)
        if length is not None:
            headers["Content-Length"] = str(length)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def send_range(self, content: bytes = GOOD, count: int | None = None) -> None:
        """Promise the range that was asked for, and send its first `count` bytes (None: all)."""
        rest = content[self.start :]
        if self.start:
            span = f"bytes {self.start}-{len(content) - 1}/{len(content)}"
            self.send(rest[:count], len(rest), 206, Content_Range=span)
        else:
            self.send(rest[:count], len(rest))

    def drip(self, content: bytes, step: int) -> None:
        """Send `step` bytes 20 times a second."""
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            self.wfile.flush()
            if self.server.stop.wait(0.05):
                return

    def log_message(self, *_: object) -> None:
        """Keep the test log clean."""

    def send_slowly(self, step: int) -> None:
        """Send the range that was asked for, `step` bytes 20 times a second."""
        self.send_range(count=0)
        self.drip(GOOD[self.start :], step)

    def send_endless_head(self) -> None:
        """Send a head that never ends."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Padding: ")
        self.drip(b"x" * 400, 1)

    def stall(self) -> None:
        """Stop after 70,000 bytes without closing the connection."""
        self.send_range(count=70_000)
        self.server.stop.wait(20)


OTHER_RANGE = {"Content_Range": f"bytes 10-{len(GOOD) - 1}/{len(GOOD)}"}
ANSWERS: dict[str, Callable[[Handler], None]] = {
    "good": Handler.send_range,
    "norange": lambda h: h.send(GOOD, len(GOOD)),
    "norange_truncated": lambda h: h.send(GOOD[:50_000], len(GOOD)),
    "refuses_range": lambda h: h.send_error(416) if h.start else h.send(GOOD, len(GOOD)),
    "wrong_range": lambda h: h.send(GOOD[10:], len(GOOD) - 10, 206, **OTHER_RANGE),
    "truncated": lambda h: h.send_range(count=60_000),
    "corrupt": lambda h: h.send_range(BAD),
    "longer": lambda h: h.send_range(GOOD + b"more"),
    "lengthless": lambda h: h.send(GOOD, None),
    "login": lambda h: h.send(b"<html>please sign in</html>", None),
    "missing": lambda h: h.send_error(404),
    "redirect": lambda h: h.send(b"", 0, 302, Location="/good/moved.tar.gz"),
    "loop": lambda h: h.send(b"", 0, 302, Location=h.path + "x"),
    "redirect_to_file": lambda h: h.send(b"", 0, 302, Location=Path(__file__).as_uri()),
    "rude": lambda h: h.wfile.write(b"\x1b[31m\r\n\r\nnonsense"),
    "silent": lambda h: h.server.stop.wait(20),
    "endless_head": Handler.send_endless_head,
    "stall": Handler.stall,
    "slow": lambda h: h.send_slowly(4_000),
    "slower": lambda h: h.send_slowly(1_000),
}
