"""Signals, full disks, unwritable folders, two runs of one name, divergence: what train.py makes of them."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from core import files
from core.files import atomic_write
from helpers.driver import QUICK, Driver, digests, processes_of_group, wait_until_gone
from training.checkpoint import load_checkpoint

KILL, INT, TERM = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)


def one_error(output: str) -> str:
    """The one error that a run ended with."""
    errors = [line for line in output.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1 and errors[0].startswith("train.py: error: "), output
    assert output.endswith(f"{errors[0]}\n")
    return errors[0]


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the quick run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = driver.run([*QUICK, "--output-dir", folder], folder / "output")
    assert code == 0, output
    return digests(folder)


# ---- writing ----


def test_fault_a_file_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut cannot be tried here, but the order that makes it harmless can be seen."""
    path, calls = tmp_path / "state", []
    path.write_text("old")
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "content"
        calls.append(f"fsync {kind}")
        real["fsync"](descriptor)

    def replace(source: str | Path, target: str | Path) -> None:
        calls.append(f"{Path(source).suffix or Path(source).name} to {Path(target).name}")
        real["replace"](source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    with atomic_write(path, keep=tmp_path / "previous") as file:
        file.write(b"new")
    assert calls == ["fsync content", "state to previous", ".tmp to state", "fsync folder"]


def test_fault_full_disk_is_found_before_training(driver: Driver, tmp_path: Path) -> None:
    """By a file-size limit: no root is needed for that."""
    flags = [*QUICK, "--output-dir", tmp_path / "out"]
    code, output = driver.run(flags, tmp_path / "output", ["limit_file_size", 300_000])
    assert code == 1 and "cannot write" in one_error(output) and "File too large" in output
    assert "Epoch" not in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["CNN_Model_log.txt"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_fault_a_small_disk_is_found_before_training(driver: Driver, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        flags = [*QUICK, "--output-dir", tmp_path / "disk"]
        code, output = driver.run(flags, tmp_path / "output")
        assert code == 1 and "MB left, the run needs about" in one_error(output)
        assert "Epoch" not in output


def test_fault_a_disk_that_fills_up_leaves_a_state_that_resumes(
    driver: Driver, whole: dict, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "8m"):
        flags = [*QUICK, "--output-dir", tmp_path / "disk"]
        code, output = driver.run(flags, tmp_path / "output", ["fill_disk_in_epoch", 2])
        assert code == 1 and "No space left on device; earlier files are unchanged" in one_error(output)
        assert load_checkpoint(tmp_path / "disk" / "CNN_Model_last.pth")["epoch"] == 2
        (tmp_path / "disk" / "ballast").unlink()
        flags = ["--resume", "--output-dir", tmp_path / "disk"]
        assert driver.run(flags, tmp_path / "output 2")[0] == 0
        assert digests(tmp_path / "disk") == whole


def test_fault_a_limit_reached_while_training_leaves_a_state_that_resumes(
    driver: Driver, whole: dict, tmp_path: Path
) -> None:
    flags = [*QUICK, "--output-dir", tmp_path]
    fault = ["limit_file_size_from_epoch", 2, 300_000]
    code, output = driver.run(flags, tmp_path / "output", fault)
    assert code == 1 and "earlier files are unchanged" in one_error(output)
    assert "[1/3]" in output and load_checkpoint(tmp_path / "CNN_Model_last.pth")["epoch"] == 2
    assert driver.run(["--resume", "--output-dir", tmp_path], tmp_path / "output 2")[0] == 0
    assert digests(tmp_path) == whole


@pytest.mark.parametrize("where", ["read-only", "read-only/new", "file", "file/new"])
def test_fault_an_output_folder_that_cannot_be_written_is_refused(
    driver: Driver, tmp_path: Path, where: str
) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "read-only").mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # the user without rights must come this far
    flags = [*QUICK, "--output-dir", tmp_path / where]
    code, output = driver.run(flags, tmp_path / "output", ["be_nobody"])
    assert code == 1 and output.count("\n") == 1, output  # nothing else was done before
    assert str(tmp_path / where.split("/")[0]) in one_error(output)
    assert re.search("Permission denied|is a file|Not a directory", output)
    assert (tmp_path / "file").read_text() == "a file"
    assert list((tmp_path / "read-only").iterdir()) == []


# ---- two runs, one name ----


def test_fault_two_runs_of_one_name_are_kept_apart(driver: Driver, whole: dict, tmp_path: Path) -> None:
    flags = [*QUICK, "--output-dir", tmp_path]
    first = driver.start(flags, tmp_path / "output", ["slow_batches", 20.0], ["checkpoint_each_batch"])
    while not (tmp_path / "CNN_Model_last.pth").exists():
        time.sleep(0.01)
        assert not first.ended(), first.output
    for again in (["--overwrite"], ["--resume"]):
        code, output = driver.run([*flags, *again], tmp_path / "output 2")
        error = one_error((tmp_path / "output 2").read_text())
        assert code == 1 and "another process is writing the run CNN_Model" in error
        assert "pass another --name" in error
        (tmp_path / "output 2").unlink()
    assert not first.ended()
    # the lock of a killed run is free, and the run can be resumed
    assert first.kill() == -KILL and (tmp_path / "CNN_Model.lock").exists()
    code, output = driver.run(["--resume", "--output-dir", tmp_path], tmp_path / "output 3")
    assert code == 0, output
    assert digests(tmp_path) == whole and not (tmp_path / "CNN_Model.lock").exists()
    # a finished run is kept, without --overwrite
    before = {path: path.read_bytes() for path in tmp_path.glob("CNN_Model_*")}
    code, output = driver.run([*flags, "--epochs", "1"], tmp_path / "output 4")
    assert code == 0 and "this run writes CNN_Model-2" in output
    assert {path: path.read_bytes() for path in before} == before
    assert len(load_checkpoint(tmp_path / "CNN_Model-2_training_results.pth")["history"]) == 1


def test_fault_overwriting_keeps_the_old_run_until_training_begins(driver: Driver, tmp_path: Path) -> None:
    flags = [*QUICK, "--epochs", "1", "--output-dir", tmp_path]
    assert driver.run(flags, tmp_path / "output")[0] == 0
    before = digests(tmp_path)
    child = driver.start([*flags, "--lr-finder", "--overwrite"], tmp_path / "output 2")
    child.wait_for("Versions")
    assert child.kill(INT) == 128 + INT
    assert digests(tmp_path) == before


# ---- signals ----


@pytest.mark.parametrize("number", [INT, TERM])
@pytest.mark.parametrize("where", ["question", "finder", "batch"])
def test_fault_a_signal_before_training_ends_it_without_a_traceback(
    driver: Driver, tmp_path: Path, where: str, number: int
) -> None:
    flags = [*QUICK, "--lr-finder", "--output-dir", tmp_path]
    if where == "question":
        flags = [flag for flag in flags if flag not in ("--yes", "--lr-finder")]
        flags = [*flags[: flags.index("--lr")], *flags[flags.index("--lr") + 2 :]]
    if where == "batch":  # of the finder, with workers
        flags += ["--workers", "2"]
    child = driver.start(flags, tmp_path / "output", ["silent_input"])
    child.wait_for("LR Finder?" if where == "question" else "Versions")
    time.sleep(0.3)
    begin = time.monotonic()
    assert child.kill(number) == 128 + number, child.output
    # a signal that comes while a worker is being started waits for the finder's end
    assert time.monotonic() - begin < (90 if where == "batch" else 20)
    # the finder may be over by then on a slow machine
    assert re.search(r"Interrupted; there was nothing to save\.|Stopped in epoch 1", child.output)
    assert "Traceback" not in child.output
    assert wait_until_gone(child.pid) == []
    assert not (tmp_path / "CNN_Model.lock").exists()


@pytest.mark.parametrize("first, second", [(INT, INT), (TERM, INT), (INT, TERM)])
def test_fault_a_second_signal_exits_at_once(driver: Driver, tmp_path: Path, first: int, second: int) -> None:
    flags = [*QUICK, "--output-dir", tmp_path, "--workers", "2"]
    child = driver.start(flags, tmp_path / "output", ["slow_batches", 30.0])
    child.wait_for("Training:")
    time.sleep(1)
    os.kill(child.pid, first)
    child.wait_for("once more to quit at once")
    begin = time.monotonic()
    assert child.kill(second) == 128 + second
    assert time.monotonic() - begin < 20, "not after the slow batch of 30 s"
    assert "Traceback" not in child.output
    assert wait_until_gone(child.pid) == []


@pytest.mark.parametrize("end", [INT, KILL, "error"])
def test_fault_no_worker_is_left_behind(driver: Driver, tmp_path: Path, end: int | str) -> None:
    flags = [*QUICK, "--output-dir", tmp_path, "--workers", "3", "--epochs", "50"]
    fault = ["spoil_loss", "nan", 2, 3] if end == "error" else ["slow_batches", 0.05]
    child = driver.start(flags, tmp_path / "output", fault)
    child.wait_for("Epoch [1/")
    if end != "error":
        assert len(processes_of_group(child.pid)) == 4  # so that the search below would find them
        begin = time.monotonic()
        assert child.kill(end) == (-KILL if end == KILL else 128 + INT)
        assert time.monotonic() - begin < 30
    else:
        assert child.wait() == 1
    assert wait_until_gone(child.pid) == []


# ---- divergence ----


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_fault_a_loss_that_is_no_number_stops_the_run(driver: Driver, tmp_path: Path, value: str) -> None:
    flags = [*QUICK, "--output-dir", tmp_path]
    faults = ["checkpoint_each_batch"], ["spoil_loss", value, 2, 4]
    code, output = driver.run(flags, tmp_path / "output", *faults)
    error = one_error(output)
    assert code == 1 and "NaN or infinite in batch 4 of epoch 2/3 at learning rate 0.01" in error
    assert "try a lower --lr" in error
    state = load_checkpoint(tmp_path / "CNN_Model_last.pth")
    assert (state["epoch"], state["batches_done"]) == (2, 3)
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


# ---- memory ----


def growth_kib(output: str) -> int:
    sizes = {int(epoch): int(size) for epoch, size in re.findall(r"RSS (\d+) (\d+)", output)}
    return sizes[6] - sizes[2]


def test_fault_memory_does_not_grow_from_epoch_2_to_6(driver: Driver, tmp_path: Path) -> None:
    flags = [*QUICK, "--epochs", "6", "--output-dir", tmp_path]
    code, output = driver.run(flags, tmp_path / "output", ["print_memory"])
    assert code == 0 and growth_kib(output) < 2048, output
    # and a leak of 1 MiB an epoch would show
    flags += ["--overwrite"]
    code, output = driver.run(flags, tmp_path / "output 2", ["print_memory"], ["leak", 1])
    assert code == 0 and growth_kib(output) > 2048, output
