"""Atomic writes under errors and kills; the lock that keeps two writers of a run apart."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from core.errors import RunError, UsageError
from core.files import atomic_write, atomic_write_text, check_output, remove_temporary_files, run_lock
from helpers import python

POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="POSIX modes, names and signals")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_appears_whole_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    atomic_write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == "größer\n".encode()
    assert path.read_bytes() == b"new"
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


@pytest.fixture
def folder_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: files to keep, a folder, links."""
    monkeypatch.chdir(tmp_path)
    for name in ("weights.json", "other.json", "OLD.JSON", "photo.png", "readme"):
        Path(name).write_text(name)
    Path("empty").touch()
    Path("folder").mkdir()
    for link, target in (("link.json", "weights.json"), ("to_empty", "empty"), ("broken", "nowhere")):
        Path(link).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize("name", ["new", "folder/new.png", "other.json", "OLD.JSON", "empty", "broken"])
def test_an_output_may_be_new_or_replace_its_own_kind(folder_of_outputs: Path, name: str) -> None:
    before = entries(folder_of_outputs)
    check_output(Path(name), [".json"], [Path("weights.json")])
    assert entries(folder_of_outputs) == before and entries(folder_of_outputs / "folder") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "cannot write folder: it is a folder"),
        ("none/x.json", "there is no folder none"),
        ("readme/x.json", "there is no folder readme"),
        ("weights.json", "weights.json is an input of this command"),
        ("link.json", "link.json is an input of this command"),
        ("photo.png", "photo.png exists and is not a .json or .txt file"),
        ("readme", "readme exists and is not a"),
        ("to_empty", "to_empty exists and is not a"),
        (os.devnull, "exists and is not a"),
        ("n" * 300, "cannot write nnn"),
    ],
)
def test_other_outputs_are_refused(folder_of_outputs: Path, name: str, message: str) -> None:
    with pytest.raises((UsageError, RunError), match=message) as refused:
        check_output(Path(name), [".json", ".txt"], [Path("weights.json")])
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_read_only_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user writes anywhere")
    with pytest.raises(RunError, match=r"cannot write .*x\.json: Permission denied"):
        check_output(tmp_path / "x.json", [".json"])


@POSIX_ONLY
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_gets_the_mode_that_open_would_have_given(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "ours", "x")
        (tmp_path / "plain").write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@POSIX_ONLY
@pytest.mark.parametrize("name", ["n" * 251 + ".pth", "é" * 125 + ".pth"])
def test_a_name_of_any_length_that_the_system_takes(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / name) as file:
        file.write(b"x")
        (temporary,) = entries(tmp_path)
    assert entries(tmp_path) == [name]
    (tmp_path / temporary).touch()
    remove_temporary_files(tmp_path, name[:100])
    assert entries(tmp_path) == [name]


@pytest.mark.parametrize("where", ["missing/state.pth", "file/state.pth", "folder", "n" * 300])
def test_a_path_that_cannot_be_written_is_one_line_that_names_it(tmp_path: Path, where: str) -> None:
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
    process = python(code, path, text=True)
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate(timeout=10)
    assert path.read_text() == "old"
    assert len(entries(tmp_path)) == 3  # the temporary file: nobody was left to remove it
    remove_temporary_files(tmp_path, "another")
    assert len(entries(tmp_path)) == 3
    remove_temporary_files(tmp_path, "run")
    assert entries(tmp_path) == ["other.tmp", "run_last.pth"]


# ---- the lock ----


def refusal(path: Path) -> str:
    """The message of the error that a second holder of the lock gets."""
    with pytest.raises(RunError) as caught, run_lock(path):
        pass
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_held_lock_refuses_a_second_holder_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "my.run.lock"
    with contextlib.suppress(KeyError), run_lock(path):
        message = refusal(path)
        assert message.startswith("another process is writing the run my.run (") and "--name" in message
        assert path.exists()  # the refused one did not delete it
        raise KeyError
    assert entries(tmp_path) == []
    with run_lock(path):
        pass


HOLD = """
import os, sys, time
from core.files import run_lock
with run_lock(sys.argv[1]):
    if os.fork() == 0:  # as a DataLoader worker, it outlives a killed parent for a while
        print("held", flush=True)
    time.sleep(60)
"""


@POSIX_ONLY
def test_a_killed_process_loses_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = python(HOLD, path, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "held\n"
        refusal(path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert path.exists()
        with run_lock(path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"999999999 elsewhere 5\n", b"\xff\xfe\x00", b"7" * 100_000])
def test_a_file_left_behind_is_no_lock(tmp_path: Path, content: bytes) -> None:
    """Earlier versions wrote the number of their process and the host's name into it."""
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    with run_lock(path):
        refusal(path)
    assert entries(tmp_path) == []


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    assert refusal(tmp_path / "run.lock").startswith("cannot lock")


RACE = """
import os, sys
from core.errors import RunError
from core.files import run_lock
lock, holder = sys.argv[1:]
held = 0
while held < 50:
    try:
        with run_lock(lock):
            os.close(os.open(holder, os.O_CREAT | os.O_EXCL))  # raises for a second holder
            os.unlink(holder)
            held += 1
    except RunError:
        pass
"""


@POSIX_ONLY
def test_of_several_processes_one_holds_the_lock(tmp_path: Path) -> None:
    """Each holder deletes the file, which the others may have opened already."""
    racers = [python(RACE, tmp_path / "lock", tmp_path / "holder") for _ in range(4)]
    assert [racer.communicate(timeout=60) for racer in racers] == [(b"", b"")] * len(racers)
    assert entries(tmp_path) == []
