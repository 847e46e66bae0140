"""Atomic writes under kills, limits and full disks; the lock that keeps two runs apart."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import RunError
from core.files import RunLock, atomic_write, atomic_write_text, remove_temporary_files

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HOST = socket.gethostname()
POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="POSIX limits and signals")


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A Python process that runs `code` with the project's modules at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_appears_whole_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    atomic_write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert entries(tmp_path) == ["state.pth"]


@pytest.mark.parametrize("error", [ValueError("x"), OSError(28, "Disk full"), KeyboardInterrupt()])
def test_an_error_within_the_block_keeps_the_old_content(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state.pth"
    path.write_bytes(b"old")
    expected = RunError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["state.pth"]


@POSIX_ONLY
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_gets_the_mode_that_open_would_have_given(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "ours", "x")
        (tmp_path / "plain").write_text("x")
        after = os.umask(umask)
    finally:
        os.umask(before)
    assert after == umask
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("where", ["missing/state.pth", "file/state.pth", "folder", "n" * 300])
def test_a_place_that_cannot_be_written_is_one_line_that_names_it(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("a file where a folder is expected")
    (tmp_path / "folder").mkdir()
    before = entries(tmp_path)
    with pytest.raises(RunError) as caught:
        atomic_write_text(tmp_path / where, "x")
    message = str(caught.value)
    assert str(tmp_path / where) in message and "\n" not in message and "None" not in message
    assert entries(tmp_path) == before
    assert entries(tmp_path / "folder") == []


@POSIX_ONLY
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "state").write_text("old")
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write read-only folders (root)")
        with pytest.raises(RunError, match="Permission denied"):
            atomic_write_text(folder / "state", "new")
    finally:
        folder.chmod(0o700)
    assert (folder / "state").read_text() == "old"


@POSIX_ONLY
def test_a_file_size_limit_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    code = """
import resource, sys
from core.files import atomic_write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from core.errors import RunError
try:
    atomic_write_text(sys.argv[1], "x" * 200_000)
except RunError as error:
    print(error)
"""
    out, err = python(code, path).communicate(timeout=30)
    assert "cannot write" in out and "File too large" in out and err == ""
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["state"]


@POSIX_ONLY
def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode
    if mounted != 0:
        pytest.skip("this user may not mount a tmpfs")
    try:
        (disk / "state").write_text("old")
        with pytest.raises(RunError, match="No space left"):
            atomic_write_text(disk / "state", "x" * 200_000)
        assert (disk / "state").read_text() == "old"
        assert entries(disk) == ["state"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@POSIX_ONLY
def test_a_kill_in_the_middle_of_a_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "run_last.pth"
    path.write_text("old")
    (tmp_path / "other.tmp").write_text("someone else's")
    code = """
import sys, time
from core.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"new" * 100_000)
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""
    process = python(code, path)
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate(timeout=10)
    assert path.read_text() == "old"
    assert len(entries(tmp_path)) == 3  # the temporary file: nobody was left to remove it
    remove_temporary_files(tmp_path, "another")
    assert len(entries(tmp_path)) == 3
    remove_temporary_files(tmp_path, "run")
    assert entries(tmp_path) == ["other.tmp", "run_last.pth"]


@POSIX_ONLY
def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """A process that rewrites a file without a pause is killed at several moments, and read meanwhile."""
    path = tmp_path / "state"
    code = """
import itertools, sys
from core.files import atomic_write
for number in itertools.count():
    with atomic_write(sys.argv[1]) as file:
        for part in range(50):
            file.write(bytes([number % 256]) * 1000)
            file.flush()
"""
    for delay in (0.0, 0.013, 0.05):
        process = python(code, path)
        while not path.exists():
            time.sleep(0.005)
        stop = time.monotonic() + 0.1 + delay
        while time.monotonic() < stop:
            content = path.read_bytes()
            assert len(content) == 50_000 and len(set(content)) == 1
        process.kill()
        process.communicate(timeout=10)
        content = path.read_bytes()
        assert len(content) == 50_000 and len(set(content)) == 1


# ---- the lock ----


def test_the_lock_stands_while_it_is_held_and_is_gone_after(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path):
        pid, host, _ = path.read_text().split()
        assert (int(pid), host) == (os.getpid(), HOST)
        with pytest.raises(RunError, match=f"process {pid} on"), RunLock(path):
            pass
        assert path.exists()  # the refused one did not take it away
    assert entries(tmp_path) == []
    with contextlib.suppress(KeyError), RunLock(path):
        raise KeyError
    assert entries(tmp_path) == []


HOLD = """
import sys, time
from core.files import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@POSIX_ONLY
def test_a_live_process_keeps_its_lock_and_a_killed_one_loses_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = python(HOLD, path)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunError) as caught, RunLock(path):
        pass
    message = str(caught.value)
    assert f"process {process.pid} on {HOST}" in message and str(path) in message and "--name" in message
    assert "\n" not in message
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    with RunLock(path):
        assert path.read_text().startswith(f"{os.getpid()} ")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="zombies are told by /proc")
def test_a_killed_process_that_nobody_waited_for_loses_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = python(HOLD, path)
    assert process.stdout.readline() == "held\n"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    with RunLock(path):
        assert path.read_text().startswith(f"{os.getpid()} ")
    process.communicate(timeout=10)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times come from /proc")
def test_a_reused_process_number_is_no_live_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path):
        mine = path.read_text()
    path.write_text(f"{os.getpid()} {HOST} 1\n")  # this number, but started at another time
    with RunLock(path):
        assert path.read_text() == mine


@pytest.mark.parametrize("pid", ["999999999", "-1", "0", "9" * 40, "-" + "9" * 40])
def test_a_number_that_no_process_has_is_stale(tmp_path: Path, pid: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(f"{pid} {HOST} 5\n")
    os.utime(path, (1, 1))
    with RunLock(path):
        assert path.read_text().startswith(f"{os.getpid()} ")


@pytest.mark.parametrize("content", [b"", b"x", b"1 2 3 4", b"\xff\xfe\x00", b"pid host 5", b"7" * 100_000])
def test_a_garbled_lock_is_respected_while_fresh_and_taken_later(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.lock"
    path.write_bytes(content if content != b"pid host 5" else f"pid {HOST} 5".encode())
    with pytest.raises(RunError, match="is writing this run"), RunLock(path):
        pass
    os.utime(path, (1, 1))
    with RunLock(path):
        assert path.read_text().startswith(f"{os.getpid()} ")
    assert entries(tmp_path) == []


def test_another_hosts_lock_is_never_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text("999999999 elsewhere 5\n")
    os.utime(path, (1, 1))
    with pytest.raises(RunError, match="process 999999999 on elsewhere"), RunLock(path):
        pass
    assert path.read_text() == "999999999 elsewhere 5\n"


@pytest.mark.parametrize("kind", ["folder", "missing folder"])
def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("run.lock" if kind == "folder" else "missing/run.lock")
    if kind == "folder":
        path.mkdir()
    with pytest.raises(RunError) as caught, RunLock(path):
        pass
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_lock_that_someone_else_took_over_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path):
        path.write_text("123 elsewhere 5\n")
    assert path.read_text() == "123 elsewhere 5\n"


RACE = """
import os, sys, time
from core.errors import RunError
from core.files import RunLock
lock, holder = sys.argv[1:]
for line in sys.stdin:
    try:
        with RunLock(lock):
            os.close(os.open(holder, os.O_CREAT | os.O_EXCL))  # raises for a second holder
            time.sleep(0.002)
            os.unlink(holder)
    except RunError:
        pass
    print("done", flush=True)
"""


@POSIX_ONLY
def test_of_several_that_find_a_stale_lock_one_takes_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    racers = [python(RACE, lock, tmp_path / "holder", stdin=subprocess.PIPE) for _ in range(4)]
    for _ in range(40):
        lock.write_text(f"999999999 {HOST} 5\n")
        for racer in racers:  # none holds it now: all have answered
            racer.stdin.write("go\n")
            racer.stdin.flush()
        assert [racer.stdout.readline() for racer in racers] == ["done\n"] * len(racers)
        assert entries(tmp_path) == []
    assert [racer.communicate(timeout=60)[1] for racer in racers] == [""] * len(racers)
