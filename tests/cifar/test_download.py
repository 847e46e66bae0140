"""Downloads from a server on this machine that is good, slow, stalling, lying or rude; and extraction."""

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from cifar import download
from cifar.download import DownloadFailed, extract, fetch
from core.cli import LOG
from core.errors import RunError
from helpers import REPOSITORY
from helpers.rude_server import BAD, GOOD, MD5, Handler
from helpers.tiny_cifar import tar_gz


@pytest.fixture(scope="module")
def _server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.stop = threading.Event()
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(_server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    limits = {"CONNECT_S": 10, "STALL_S": 1, "SLOW_WINDOW_S": 0.3, "SLOW_BYTES_PER_S": 0}
    for name, value in limits.items():
        monkeypatch.setattr(download, name, value)
    _server.asked.clear()
    return _server


@pytest.fixture
def get(server, tmp_path) -> Callable[..., bytes]:
    """Downloads from these kinds of source (or full sources) and returns the file's bytes."""

    def run(*kinds: str) -> bytes:
        sources = [kind if "/" in kind else f"{server.url}/{kind}/x.tar.gz" for kind in kinds]
        path = fetch(sources, tmp_path / "x.tar.gz", md5=MD5, size=len(GOOD))
        assert path == tmp_path / "x.tar.gz" and not run.part.exists()
        return path.read_bytes()

    run.part = tmp_path / "x.tar.gz.part"
    return run


def test_good_source_gives_the_file_and_no_other_is_asked(get, server, capfd):
    assert get("good", "norange") == GOOD
    assert server.asked == [("good", None)]
    assert capfd.readouterr() == ("", "")  # no bar where stderr is no terminal


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "404: Not Found"),
        ("corrupt", "wrong md5"),
        ("longer", "200004 bytes, not 200000"),
        ("login", "perhaps a login page"),
        ("loop", "HTTP Error 302"),
        ("redirect_to_file", "is not allowed"),
        ("rude", "BadStatusLine: ?[31m"),
        ("silent", "no answer within 0.3 s"),
        ("endless_head", "no answer within 0.3 s"),
        ("refused", "/x: Connection refused"),
        ("foo://127.0.0.1/x", "unknown url type: foo"),
        ("http://[broken/x", "IPv6"),
        ("http://127.0.0.1:99999999/x", ""),
        ("/nowhere/x.tar.gz", "No such file"),
        ("/dev/zero", "bytes, not 200000"),
        (str(REPOSITORY), ""),
        (__file__, "bytes, not 200000"),
    ],
)
def test_failing_source_is_named_with_its_reason_and_the_next_one_used(
    get, server, kind, reason, caplog, monkeypatch
):
    if "within" in reason:
        monkeypatch.setattr(download, "CONNECT_S", 0.3)
        monkeypatch.setattr(download, "STALL_S", 20)
    if kind == "refused":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            kind = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(DownloadFailed) as failure:
        get(kind)
    line = str(failure.value)
    assert line.startswith("  ") and reason in line and line.isprintable()
    assert not get.part.exists() or get.part.stat().st_size == 0, "wrong bytes would spoil the next source"
    if "within" not in reason:  # nor may the good source, on a loaded machine
        assert get(kind, "good") == GOOD
        assert f"download source failed: {line.strip()}" in caplog.text


@pytest.mark.parametrize(
    ("kinds", "asked"),
    [
        (["redirect"], [("redirect", None), ("good", None)]),
        (["lengthless"], [("lengthless", None)]),
        (["truncated", "good"], [("truncated", None), ("good", "bytes=60000-")]),
        (["truncated"], [("truncated", None), *(("truncated", f"bytes={n}0000-") for n in (6, 12, 18))]),
        (["stall", "good"], [("stall", None), ("good", "bytes=70000-")]),
        (["corrupt", "good"], [("corrupt", None), ("good", None)]),
        (["truncated", "corrupt"], [("truncated", None), ("corrupt", "bytes=60000-"), ("corrupt", None),
                                    *(("truncated", f) for f in (None, "bytes=60000-", "bytes=120000-",
                                                                 "bytes=180000-"))]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value[0], str) else "",
)  # fmt: skip
def test_next_attempt_resumes_where_the_last_one_stopped(get, server, kinds, asked, caplog):
    assert get(*kinds) == GOOD
    assert server.asked == asked
    assert ("no byte for 1 s, after 70,000 of 200,000 bytes" in caplog.text) == ("stall" in kinds)


def test_slow_source_is_left_and_the_fastest_one_used_when_all_are_slow(get, server, monkeypatch):
    monkeypatch.setattr(download, "SLOW_BYTES_PER_S", 1e6)
    assert get("slow", "good") == GOOD
    assert [kind for kind, _ in server.asked] == ["slow", "good"]
    assert server.asked[1][1] is not None, "the slow source's bytes should be kept"
    server.asked.clear()
    assert get("slower", "slow", "missing") == GOOD
    assert [kind for kind, _ in server.asked] == ["slower", "slow", "missing", "slow"]


START = 123_456


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("good", None),
        ("norange", None),
        ("refuses_range", None),
        ("missing", "404"),
        ("norange_truncated", "the connection closed after 50,000 of 200,000 bytes"),
        ("wrong_range", "another range"),
        ("login", "login page"),
    ],
)
def test_part_of_an_earlier_run_is_resumed_and_never_lost(get, server, kind, reason):
    get.part.write_bytes(GOOD[:START])
    if reason is None:
        assert get(kind) == GOOD
    else:
        with pytest.raises(DownloadFailed, match=reason):
            get(kind)
        assert get.part.read_bytes() == GOOD[:START]
    assert server.asked[0] == (kind, f"bytes={START}-")
    assert len(server.asked) == (2 if kind == "refuses_range" else 1)


@pytest.mark.parametrize("size", [100_000, 200_000, 300_000])
def test_spoilt_part_does_not_spoil_the_download(get, size):
    get.part.write_bytes(b"x" * size)
    assert get("good") == GOOD


def test_whole_part_needs_no_server(get, server):
    get.part.write_bytes(GOOD)
    assert get("missing") == GOOD
    assert server.asked == []


@pytest.mark.parametrize("content", [GOOD, BAD], ids=["good", "bad"])
def test_local_archive_by_path_and_url(get, server, tmp_path, content):
    copy = tmp_path / "my own copy?.tar.gz"
    copy.write_bytes(content)
    for source in (str(copy), copy.as_uri()):
        with nullcontext() if content == GOOD else pytest.raises(DownloadFailed, match="wrong md5"):
            assert get(source) == GOOD
    assert copy.read_bytes() == content and server.asked == []


def test_secrets_in_a_url_are_not_shown(get, server, caplog, monkeypatch):
    monkeypatch.setattr(LOG, "propagate", True)  # to caplog
    caplog.set_level("INFO", LOG.name)
    address = server.url.removeprefix("http://")
    secret = f"http://me:hunter2@{address}/missing/x?signature=s3cret"
    with pytest.raises(DownloadFailed) as failure:
        get(secret)
    assert get(secret, "good") == GOOD
    trying = rf"Trying http://{address}/missing/x \(given up after \d+ s without an answer\)"
    assert re.search(trying, caplog.text)
    for shown in (caplog.text, str(failure.value)):
        assert f"http://{address}/missing/x: " in shown
        assert "hunter2" not in shown and "s3cret" not in shown


def test_unwritable_destination_is_one_line(get, server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*sub: ") as failure:
        fetch([f"{server.url}/good/x"], tmp_path / "file" / "sub" / "x", md5=MD5, size=9)
    assert not isinstance(failure.value, DownloadFailed) and server.asked == []
    get.part.mkdir()
    with pytest.raises(RunError, match=r"cannot write .*x\.tar\.gz\.part"):
        get("good")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_reported_at_once_and_blamed_on_no_source(get, server):
    get.part.symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left") as failure:
        get("good", "norange")
    assert not isinstance(failure.value, DownloadFailed)
    assert server.asked == [("good", None)]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_the_part(server, tmp_path):
    code = (
        "import signal, sys; from cifar.download import fetch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a background job
        f"fetch([sys.argv[1]], sys.argv[2], md5={MD5!r}, size={len(GOOD)})"
    )
    part = tmp_path / "x.part"
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url + "/stall/x", str(tmp_path / "x")],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size == 70_000):
            assert time.monotonic() < deadline, "the download did not start"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert b"KeyboardInterrupt" in errors
    assert part.read_bytes() == GOOD[:70_000]


def test_two_downloads_into_one_part_both_succeed(server, tmp_path):
    def download_file() -> bytes:
        return fetch([f"{server.url}/slow/x"], tmp_path / "x", md5=MD5, size=len(GOOD)).read_bytes()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download_file)
        time.sleep(0.5)  # the second one finds a part
        second = pool.submit(download_file)
        assert first.result() == second.result() == GOOD


def test_dead_network_fails_within_its_bound(get, monkeypatch):
    """Each name look-up hangs, as where packets are dropped; a source may take CONNECT_S, not a minute."""
    release = threading.Event()
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: release.wait(60))
    monkeypatch.setattr(download, "CONNECT_S", 0.1)
    with pytest.raises(DownloadFailed) as failure:
        get(*(f"http://host{n}.invalid/x" for n in range(7)))
    assert not release.is_set() and str(failure.value).count("no answer within 0.1 s") == 7
    release.set()


def test_extraction_replaces_damaged_files_and_writes_only_the_names(tmp_path):
    archive, folder = tmp_path / "a.tar.gz", tmp_path / "in" / "top"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"old")
    (folder / "own").write_bytes(b"stays")
    link = tarfile.TarInfo("top/c")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    entries = [("top/a", b"new"), ("top/b", b"2"), ("top/other", b"3"), ("../outside", b""), (link, b"")]
    archive.write_bytes(tar_gz(entries))
    extract(archive, ["top/a", "top/b", "top/c"], folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {"a": b"new", "b": b"2", "own": b"stays"}
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder] == [archive]


def test_damaged_archive_is_refused_and_changes_no_file(tmp_path):
    archive, folder = tmp_path / "a.tar.gz", tmp_path / "top"
    folder.mkdir()
    (folder / "a").write_bytes(b"old")
    whole = tar_gz([("top/a", os.urandom(100_000))])
    for damaged in (whole[: len(whole) // 2], b"no archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises(RunError) as failure:
            extract(archive, ["top/a"], folder)
        assert "\n" not in str(failure.value)
        assert [path.read_bytes() for path in folder.iterdir()] == [b"old"]
