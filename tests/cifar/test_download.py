"""Downloads against a server on this machine that is good, slow, stalling, lying or rude."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cifar import download
from cifar.download import DownloadFailed, fetch
from conftest import REPOSITORY
from core.errors import RunError
from helpers.rude_server import BAD, GOOD, MD5, Handler


@pytest.fixture(scope="module")
def _server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.stop = threading.Event()
        server.asked = []
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
    _server.asked.clear()
    _server.url = f"http://127.0.0.1:{_server.server_address[1]}"
    return _server


@pytest.fixture
def get(server, tmp_path):
    """Fetch from these kinds of source (or full sources), with limits fit for a test."""

    def run(*kinds: str, **options) -> Path:
        sources = [k if "/" in k else f"{server.url}/{k}/x.tar.gz" for k in kinds]
        limits = {"connect_s": 10, "stall_s": 1, "slow_window_s": 0.3, "slow_bytes_per_s": 0}
        limits.update(options)
        return fetch(sources, tmp_path / "x.tar.gz", md5=MD5, size=len(GOOD), show_progress=True, **limits)

    run.part = tmp_path / "x.tar.gz.part"
    return run


def kinds_asked(server) -> list[str]:
    return [kind for kind, _ in server.asked]


def test_good_source_gives_the_file_and_asks_no_other(get, server, capfd):
    path = get("good", "norange")
    assert path.read_bytes() == GOOD
    assert kinds_asked(server) == ["good"]
    assert not get.part.exists()
    assert capfd.readouterr() == ("", "")  # no bar where stderr is no terminal


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "HTTP 404"),
        ("corrupt", "wrong md5"),
        ("longer", "200004 bytes, not 200,000"),
        ("login", "closed after 27 of 200,000 bytes"),
        ("loop", "HTTP 302"),
        ("redirect_to_file", "HTTP 302"),
        ("rude", "BadStatusLine ?[31m"),
        ("silent", "no answer within 0.3 s"),
        ("refused", "refused"),
        ("ftp://127.0.0.1/x", "ftp is not http, https or file"),
        ("http://[broken/x", "not a URL"),
        ("http://127.0.0.1:99999999/x", ""),
        ("/nowhere/x.tar.gz", "no such file"),
        ("/dev/zero", "no such file"),
        (str(REPOSITORY), "no such file"),
        (__file__, "bytes, not 200,000"),
    ],
)
def test_failing_source_is_named_with_its_reason_and_the_next_one_asked(get, server, kind, reason, caplog):
    if kind == "refused":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            kind = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    options = {"connect_s": 0.3} if kind == "silent" else {}
    with pytest.raises(DownloadFailed) as failure:
        get(kind, **options)
    ((_, said),) = failure.value.reasons
    assert reason in said
    assert said.isprintable()
    assert not get.part.exists(), "bytes that are no part of the file would spoil the next source"
    assert get(kind, "good", **options).read_bytes() == GOOD
    assert said in caplog.text


def test_redirect_is_followed(get, server):
    assert get("redirect").read_bytes() == GOOD
    assert kinds_asked(server) == ["redirect", "good"]


def test_truncated_download_goes_on_at_the_next_source_where_it_stopped(get, server):
    assert get("truncated", "good").read_bytes() == GOOD
    assert server.asked == [("truncated", None), ("good", "bytes=60000-")]


def test_source_that_breaks_off_is_asked_again_while_that_helps(get, server):
    assert get("truncated").read_bytes() == GOOD
    assert [asked for _, asked in server.asked] == [
        None,
        "bytes=60000-",
        "bytes=120000-",
        "bytes=180000-",
    ]


def test_stalled_source_is_left_for_the_next(get, server):
    began = time.monotonic()
    assert get("stall", "good").read_bytes() == GOOD
    assert server.asked == [("stall", None), ("good", "bytes=70000-")]
    assert time.monotonic() - began < 8, "stall_s is 1"


def test_stall_alone_is_reported_and_its_bytes_are_kept(get):
    get.part.write_bytes(GOOD[:180_000])
    with pytest.raises(DownloadFailed) as failure:
        get("silent", connect_s=0.2)
    assert failure.value.reasons[0][1] == "no answer within 0.2 s"
    assert get.part.read_bytes() == GOOD[:180_000]


def test_slow_source_is_left_while_others_are_untried(get, server):
    assert get("slow", "good", slow_bytes_per_s=1e6).read_bytes() == GOOD
    assert kinds_asked(server) == ["slow", "good"]
    assert server.asked[1][1] is not None, "what the slow one gave should be kept"


def test_slow_source_is_used_when_nothing_else_works_and_the_fastest_first(get, server):
    path = get("slower", "slow", "missing", slow_bytes_per_s=1e6)
    assert path.read_bytes() == GOOD
    assert kinds_asked(server) == ["slower", "slow", "missing", "slow"]


def test_last_source_need_only_beat_the_slow_ones(get, server):
    assert get("slow", "slower", slow_bytes_per_s=1e6).read_bytes() == GOOD
    assert kinds_asked(server) == ["slow", "slower", "slow"]
    server.asked.clear()
    get.part.with_suffix("").unlink()
    assert get("slower", "slow", slow_bytes_per_s=1e6).read_bytes() == GOOD
    assert kinds_asked(server) == ["slower", "slow"]


def test_speed_is_measured_by_the_clock_given(get, server):
    ticks = iter(range(0, 10_000_000, 1000))  # each look at this clock: 1000 s later
    assert get("good", "norange", slow_window_s=30, slow_bytes_per_s=1e6, clock=lambda: next(ticks))
    assert kinds_asked(server)[:2] == ["good", "norange"]


def test_part_is_resumed_by_range(get, server):
    get.part.write_bytes(GOOD[:123_456])
    assert get("good").read_bytes() == GOOD
    assert server.asked == [("good", "bytes=123456-")]


def test_server_without_range_sends_all(get, server):
    get.part.write_bytes(GOOD[:123_456])
    assert get("norange").read_bytes() == GOOD


def test_server_without_range_that_breaks_off_costs_none_of_the_part(get):
    get.part.write_bytes(GOOD[:123_456])
    with pytest.raises(DownloadFailed):
        get("noranged_truncated")
    assert get.part.read_bytes() == GOOD[:123_456]


def test_range_refused_asks_for_the_whole(get, server):
    get.part.write_bytes(GOOD[:123_456])
    assert get("refuses_range").read_bytes() == GOOD
    assert server.asked == [("refuses_range", "bytes=123456-"), ("refuses_range", None)]


def test_another_range_than_asked_is_refused(get):
    get.part.write_bytes(GOOD[:123_456])
    with pytest.raises(DownloadFailed, match="no source gave") as failure:
        get("wrong_range")
    assert "another range" in failure.value.reasons[0][1]
    assert get.part.read_bytes() == GOOD[:123_456]


@pytest.mark.parametrize("spoilt", [b"x" * 100_000, b"x" * 200_000, b"x" * 300_000])
def test_spoilt_part_does_not_spoil_the_download(get, spoilt):
    get.part.write_bytes(spoilt)
    assert get("good").read_bytes() == GOOD


def test_whole_part_needs_no_server(get, server):
    get.part.write_bytes(GOOD)
    assert get("missing").read_bytes() == GOOD
    assert server.asked == []


def test_corrupt_bytes_never_reach_the_destination_nor_the_next_source(get, server, tmp_path):
    assert get("corrupt", "good").read_bytes() == GOOD
    assert server.asked == [("corrupt", None), ("good", None)]


def test_local_archive_by_path_and_url(get, server, tmp_path):
    copy = tmp_path / "my own copy.tar.gz"
    copy.write_bytes(GOOD)
    for source in (str(copy), copy.as_uri()):
        path = get(source, "missing")
        assert path.read_bytes() == GOOD
        path.unlink()
    assert server.asked == []
    copy.write_bytes(BAD)
    with pytest.raises(DownloadFailed) as failure:
        get(str(copy))
    assert failure.value.reasons == [(str(copy), "has the wrong md5")]
    assert copy.read_bytes() == BAD


def test_secrets_in_a_url_are_not_shown(get, server, caplog):
    address = server.url.removeprefix("http://")
    with pytest.raises(DownloadFailed) as failure:
        get(f"http://me:hunter2@{address}/missing/x?signature=s3cret", "missing")
    shown = caplog.text + str(failure.value.reasons)
    assert "hunter2" not in shown and "s3cret" not in shown
    assert f"http://{address}/missing/x" in shown


def test_unwritable_destination_is_one_line_and_asks_nobody(get, server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the folder") as failure:
        fetch([server.url + "/good/x"], tmp_path / "file" / "sub" / "x", md5=MD5, size=9)
    assert not isinstance(failure.value, DownloadFailed)
    get.part.mkdir()
    with pytest.raises(RunError, match=r"cannot write .*x\.tar\.gz\.part"):
        get("good")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_said_at_once_and_blamed_on_no_source(get, server):
    get.part.symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left") as failure:
        get("good", "norange")
    assert not isinstance(failure.value, DownloadFailed)
    assert kinds_asked(server) == ["good"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_the_part(server, tmp_path):
    code = (
        "import sys; from cifar.download import fetch\n"
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


def test_two_at_once_into_one_part_both_succeed(server, tmp_path):
    results = []

    def run() -> None:
        source = server.url + "/slow/x"
        results.append(fetch([source], tmp_path / "x", md5=MD5, size=len(GOOD)).read_bytes())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)  # the second finds a part begun
    for thread in threads:
        thread.join()
    assert results == [GOOD, GOOD]


def test_dead_network_fails_within_its_bound(get, monkeypatch):
    """Every look-up hangs, as where packets are dropped: seven sources, each `connect_s` long."""

    def silent(*_args: object, **_options: object) -> None:
        threading.Event().wait(60)
        raise TimeoutError

    monkeypatch.setattr(download.urllib.request, "urlopen", silent)
    began = time.monotonic()
    with pytest.raises(DownloadFailed) as failure:
        get(*(f"http://host{n}.invalid/x" for n in range(7)), connect_s=0.1)
    assert time.monotonic() - began < 10
    assert len(failure.value.reasons) == 7
