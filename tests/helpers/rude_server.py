"""A server on this machine that sends a good file, or misbehaves in the way that the path names."""

import contextlib
import hashlib
import http.server
from pathlib import Path

import numpy as np

GOOD = b"\x1f" + np.random.default_rng(0).bytes(199_999)  # begins as a gzip file does
BAD = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
MD5 = hashlib.md5(GOOD).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the path /KIND/... by `serve_KIND`."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1].split("?")[0]
        self.server.asked.append((kind, self.headers.get("Range")))
        with contextlib.suppress(OSError):  # the client may leave
            getattr(self, f"serve_{kind}")()

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
        span = (
            {"Content_Range": f"bytes {self.start}-{len(content) - 1}/{len(content)}"} if self.start else {}
        )
        self.send(rest[:count], len(rest), 206 if span else 200, **span)

    def drip(self, content: bytes, step: int) -> None:
        """Send `step` bytes 20 times a second."""
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            self.wfile.flush()
            if self.server.stop.wait(0.05):
                return

    def serve_good(self) -> None:
        self.send_range()

    def serve_norange(self) -> None:
        self.send(GOOD, len(GOOD))

    def serve_norange_truncated(self) -> None:
        self.send(GOOD[:50_000], len(GOOD))

    def serve_refuses_range(self) -> None:
        self.send_error(416) if self.start else self.serve_norange()

    def serve_wrong_range(self) -> None:
        self.send(GOOD[10:], len(GOOD) - 10, 206, Content_Range=f"bytes 10-{len(GOOD) - 1}/{len(GOOD)}")

    def serve_truncated(self) -> None:
        self.send_range(count=60_000)

    def serve_corrupt(self) -> None:
        self.send_range(BAD)

    def serve_longer(self) -> None:
        self.send_range(GOOD + b"more")

    def serve_lengthless(self) -> None:
        self.send(GOOD, None)

    def serve_login(self) -> None:
        self.send(b"<html>please sign in</html>", None)

    def serve_missing(self) -> None:
        self.send_error(404)

    def serve_redirect(self) -> None:
        self.send(b"", 0, 302, Location="/good/moved.tar.gz")

    def serve_loop(self) -> None:
        self.send(b"", 0, 302, Location=self.path + "x")

    def serve_redirect_to_file(self) -> None:
        self.send(b"", 0, 302, Location=Path(__file__).as_uri())

    def serve_rude(self) -> None:
        self.wfile.write(b"\x1b[31m\r\n\r\nnonsense")

    def serve_silent(self) -> None:
        self.server.stop.wait(20)

    def serve_endless_head(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Padding: ")
        self.drip(b"x" * 400, 1)

    def serve_stall(self) -> None:
        self.send_range(count=70_000)
        self.server.stop.wait(20)

    def serve_slow(self, step: int = 4_000) -> None:
        self.send_range(count=0)
        self.drip(GOOD[self.start :], step)

    def serve_slower(self) -> None:
        self.serve_slow(1_000)

    def log_message(self, *_: object) -> None:
        """Keep the test log clean."""
