"""What a server on this machine answers with: a good file, or one of many kinds of misbehaviour."""

import contextlib
import hashlib
import http.server
from pathlib import Path

import numpy as np

GOOD = np.random.default_rng(0).bytes(200_000)
BAD = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
MD5 = hashlib.md5(GOOD).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """The path says how to misbehave."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1].split("?")[0]
        self.server.asked.append((kind, self.headers.get("Range")))
        with contextlib.suppress(OSError):  # the client may leave
            getattr(self, f"serve_{kind}")()

    def head(self, length: int | None, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def ranged(self, content: bytes = GOOD) -> bytes:
        """Send the head for the range asked; the bytes to send."""
        asked = self.headers.get("Range")
        if asked is None:
            self.head(len(content))
            return content
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(len(content) - start, 206, Content_Range=span)
        return content[start:]

    def serve_good(self) -> None:
        self.wfile.write(self.ranged())

    def serve_norange(self) -> None:
        self.head(len(GOOD))
        self.wfile.write(GOOD)

    def serve_noranged_truncated(self) -> None:
        self.head(len(GOOD))
        self.wfile.write(GOOD[:50_000])

    def serve_refuses_range(self) -> None:
        if self.headers.get("Range"):
            self.send_error(416)
        else:
            self.serve_norange()

    def serve_wrong_range(self) -> None:
        self.head(len(GOOD) - 10, 206, Content_Range=f"bytes 10-{len(GOOD) - 1}/{len(GOOD)}")
        self.wfile.write(GOOD[10:])

    def serve_truncated(self) -> None:
        self.wfile.write(self.ranged()[:60_000])

    def serve_corrupt(self) -> None:
        self.wfile.write(self.ranged(BAD))

    def serve_longer(self) -> None:
        self.wfile.write(self.ranged(GOOD + b"more"))

    def serve_login(self) -> None:
        self.head(None)
        self.wfile.write(b"<html>please sign in</html>")

    def serve_missing(self) -> None:
        self.send_error(404)

    def serve_redirect(self) -> None:
        self.head(0, 302, Location="/good/moved.tar.gz")

    def serve_loop(self) -> None:
        self.head(0, 302, Location=self.path + "x")

    def serve_redirect_to_file(self) -> None:
        self.head(0, 302, Location=Path(__file__).as_uri())

    def serve_rude(self) -> None:
        self.wfile.write(b"\x1b[31m\r\n\r\nnonsense")

    def serve_silent(self) -> None:
        self.server.stop.wait(20)

    def serve_stall(self) -> None:
        self.wfile.write(self.ranged()[:70_000])
        self.wfile.flush()
        self.server.stop.wait(20)

    def serve_slow(self) -> None:
        self.drip(4_000, 0.05)

    def serve_slower(self) -> None:
        self.drip(1_000, 0.05)

    def drip(self, step: int, wait_s: float) -> None:
        rest = self.ranged()
        for start in range(0, len(rest), step):
            self.wfile.write(rest[start : start + step])
            self.wfile.flush()
            if self.server.stop.wait(wait_s):
                return

    def log_message(self, *_: object) -> None:
        """Keep the test log clean."""
