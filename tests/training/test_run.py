"""Runs of train.py that are killed, interrupted or run out of disk: each resumes to the same bytes."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core import files
from core.errors import RunError
from core.files import atomic_write
from helpers import REPOSITORY
from helpers.driver import QUICK, Driver, digests, processes_of_group, wait_until_gone
from training.checkpoint import load_checkpoint
from training.run import RunFiles

KILLS = 20
KILL, INT, TERM = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)
PRESETS = {
    "multistep": [],
    "onecycle": ["--scheduler", "onecycle"],
    "fp16": ["--precision", "fp16"],
    "val split": ["--val-split", "100", "--limit-train", "200"],
}


def finished(driver: Driver, flags: list, folder: Path) -> dict[str, str]:
    """Run train.py to its end with these flags, output in `folder`; the digests of what it leaves."""
    code, output = driver.run([*flags, "--output-dir", folder], folder / "output")
    assert code == 0, output
    return digests(folder)


def last(folder: Path) -> Path:
    return folder / "CNN_Model_last.pth"


def progress(folder: Path) -> tuple[int, int]:
    """The epoch and the batch that a resumed run would continue at."""
    try:
        state = RunFiles(folder, "CNN_Model").load_last()
    except RunError as error:
        assert "nothing to resume" in str(error)  # anything else is a loss
        return 0, 0
    return state["epoch"], state["batches_done"]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def one_error(output: str) -> str:
    """The one error that a run ended with."""
    errors = [line for line in output.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1 and errors[0].startswith("train.py: error: "), output
    assert output.endswith(f"{errors[0]}\n")
    return errors[0]


@pytest.fixture(scope="session")
def unbroken(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The digests of each recipe's run that nothing disturbed."""
    folders = {name: tmp_path_factory.mktemp("unbroken") for name in PRESETS}
    return {name: finished(driver, [*QUICK, *PRESETS[name]], folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def whole(unbroken: dict[str, dict[str, str]]) -> dict[str, str]:
    return unbroken["multistep"]


@pytest.fixture(scope="module")
def stopped(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run stopped in epoch 2, with a last state and the one before it."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = [*QUICK, "--output-dir", folder]
    moment = ["signal_in", "after_train_batch", 2, 3, INT]
    code, output = driver.run(flags, folder / "output", ["checkpoint_each_batch"], moment)
    assert code == 128 + INT, output
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to do as one likes with."""
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


# ---- killed and interrupted ----


def test_kills_at_random_moments(driver: Driver, whole: dict, tmp_path: Path) -> None:
    rng, kills, runs = random.Random(5), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        code, at = None, (0, 0)
        while code != 0:
            flags = QUICK if at == (0, 0) else ["--resume"]
            flags = [*flags, "--output-dir", folder]
            child = driver.start(flags, folder / "output", ["checkpoint_each_batch"])
            code = child.kill_after(rng.uniform(0, 2.5)) if kills < KILLS else child.wait()
            kills += code == -KILL
            assert code in (0, -KILL), child.output
            assert at <= progress(folder)  # nothing that was saved is lost
            at = progress(folder)
        assert digests(folder) == whole
        runs += 1


@pytest.mark.parametrize(
    ("method", "epoch", "call", "number"),
    [
        ("begin_epoch", 1, 1, KILL),  # there is a state from the beginning on
        ("after_train_batch", 2, 3, INT),
        ("after_test_batch", 2, 1, TERM),
        ("finish_epoch", 1, 1, INT),
        ("begin_epoch", 3, 1, TERM),
        ("finish_epoch", 3, 1, INT),
    ],
)
def test_signals_at_chosen_moments(driver, whole, tmp_path, method, epoch, call, number) -> None:
    moment = ["signal_in", method, epoch, call, number]
    code, output = driver.run([*QUICK, "--output-dir", tmp_path], tmp_path / "output", moment)
    assert code == (-KILL if number == KILL else 128 + number), output
    assert "Traceback" not in output and "rror" not in output
    assert number == KILL or f"Resume with: python train.py --resume {last(tmp_path)}" in output
    assert finished(driver, ["--resume", last(tmp_path)], tmp_path) == whole


@pytest.mark.parametrize("recipe", ["onecycle", "fp16", "val split"])
def test_other_recipes(driver: Driver, unbroken: dict, tmp_path: Path, recipe: str) -> None:
    flags = [*QUICK, *PRESETS[recipe], "--output-dir", tmp_path]
    each, stops = ["checkpoint_each_batch"], []
    for moment in (("after_train_batch", 1, 4, KILL), ("after_train_batch", 2, 2, INT)):
        stops.append(driver.run(flags, tmp_path / "output", each, ["signal_in", *moment])[0])
        flags = ["--resume", "--output-dir", tmp_path]
    stops.append(driver.run(flags, tmp_path / "output", ["signal_in", "finish_epoch", 3, 1, KILL])[0])
    assert stops == [-KILL, 128 + INT, -KILL]
    if recipe == "val split":  # interrupted while the test images are read, at the very end
        stopped = driver.run(flags, tmp_path / "output", ["signal_in", "after_test_batch", 4, 1, TERM])
        assert stopped[0] == 128 + TERM and "Stopped after the last epoch" in stopped[1]
    assert finished(driver, ["--resume"], tmp_path) == unbroken[recipe]


@pytest.mark.parametrize("workers", [(1, 3), (3, 0), (0, 1)])
def test_another_number_of_workers(driver: Driver, whole: dict, tmp_path: Path, workers: tuple) -> None:
    flags = [*QUICK, "--output-dir", tmp_path]
    for count, moment, code in zip(workers, ((2, 3, INT), (3, 2, KILL)), (128 + INT, -KILL), strict=True):
        fault = ["signal_in", "after_train_batch", *moment]
        child = driver.start([*flags, "--workers", count], tmp_path / "output", fault)
        assert child.wait() == code
        assert wait_until_gone(child.pid) == []  # the workers notice that their parent is gone
        flags = ["--resume", last(tmp_path)]
    assert finished(driver, flags, tmp_path) == whole


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_same_seed_same_bytes(driver: Driver, whole: dict, tmp_path: Path, workers: int) -> None:
    flags = [*QUICK, "--workers", workers]
    assert finished(driver, flags, tmp_path) == whole
    if workers == 0:  # and the comparison can tell runs apart
        other = finished(driver, [*flags, "--seed", "1", "--overwrite"], tmp_path)
        for key in ("history", "last model", "last random", "best model", "training_results history"):
            assert other[key] != whole[key], key


# ---- writing files ----


def test_a_kill_at_every_step_of_writing_files(driver: Driver, whole: dict, copy: Path) -> None:
    """The n-th attempt dies at its n-th step: mkstemp, write, fsync, chmod, replace, unlink."""
    code, number, at = None, 0, progress(copy)
    while code != 0:
        number += 1
        code, output = driver.run(["--resume", last(copy)], copy / "output", ["die_at_step", number])
        assert code in (0, -KILL), output
        assert at <= progress(copy)
        at = progress(copy)
    assert number > 20  # more steps than an epoch's end has
    assert digests(copy) == whole
    assert not list(copy.glob(".*"))  # an empty .lock may stay, which holds nobody up


def test_overwriting_loses_nothing_before_the_new_state_is_on_disk(driver, whole, stopped, tmp_path) -> None:
    """The n-th attempt dies at its n-th step of writing or deleting; the last one reaches training."""
    flags, code, new_state = [*QUICK, "--overwrite"], -KILL, []
    while code == -KILL:
        folder = Path(shutil.copytree(stopped, tmp_path / str(len(new_state))))
        faults = ["die_at_step", len(new_state) + 1], ["signal_in", "after_train_batch", 1, 1, INT]
        code, output = driver.run([*flags, "--output-dir", folder], folder / "output", *faults)
        at = progress(folder)
        if at == progress(stopped):
            best = Path("CNN_Model_best.pth")
            assert (folder / best).read_bytes() == (stopped / best).read_bytes()
        else:
            assert at in ((1, 0), (1, 1))
        new_state.append(at != progress(stopped))
    assert code == 128 + INT, output
    assert new_state == sorted(new_state) and 5 < sum(new_state) < len(new_state) - 5
    for attempt in (new_state.index(True), len(new_state) - 1):
        assert finished(driver, ["--resume"], tmp_path / str(attempt)) == whole


def test_a_full_disk_is_found_before_training(driver: Driver, whole: dict, tmp_path: Path) -> None:
    """By a file-size limit, which needs no root; an earlier run, which would be overwritten, is kept."""
    assert finished(driver, QUICK, tmp_path) == whole
    flags = [*QUICK, "--overwrite", "--output-dir", tmp_path]
    code, output = driver.run(flags, tmp_path / "output 2", ["limit_file_size", 300_000])
    assert code == 1 and "cannot write" in one_error(output) and "File too large" in output
    assert "Epoch" not in output
    assert digests(tmp_path) == whole


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
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


def test_a_small_disk_is_found_before_training(driver: Driver, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        code, output = driver.run([*QUICK, "--output-dir", tmp_path / "disk"], tmp_path / "output")
        assert code == 1 and "MB left, the run needs about" in one_error(output)
        assert "Epoch" not in output


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (["fill_disk_in_epoch", 2], "No space left on device; earlier files are unchanged"),
        (["limit_file_size_in", "begin_epoch", 2, 300_000], "earlier files are unchanged"),
    ],
)
def test_a_disk_that_fills_up_leaves_a_state_that_resumes(driver, whole, tmp_path, fault, words) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder, "8m") if fault[0] == "fill_disk_in_epoch" else contextlib.nullcontext():
        code, output = driver.run([*QUICK, "--output-dir", folder], tmp_path / "output", fault)
        assert code == 1 and words in one_error(output)
        assert "[1/3]" in output and load_checkpoint(last(folder))["epoch"] == 2
        (folder / "ballast").unlink(missing_ok=True)
        assert finished(driver, ["--resume"], folder) == whole


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut cannot be tried here, but the order that makes it harmless can be seen."""
    path, calls = tmp_path / "state", []
    path.write_text("old")

    def record(name: str, function: Callable) -> None:
        def recorded(*args: int | str | Path) -> None:
            paths = [Path(f"/proc/self/fd/{arg}").resolve() if name == "fsync" else Path(arg) for arg in args]
            calls.append([name, *("folder" if p.is_dir() else p.suffix or p.name for p in paths)])
            function(*args)

        monkeypatch.setattr(files.os, name, recorded)

    record("fsync", os.fsync)
    record("replace", os.replace)
    with atomic_write(path, keep=tmp_path / "previous") as file:
        file.write(b"new")
    moves = ["replace", "state", "previous"], ["replace", ".tmp", "state"]
    assert calls == [["fsync", ".tmp"], *moves, ["fsync", "folder"]]


@pytest.mark.parametrize("where", ["read-only", "read-only/new", "file", "file/new"])
def test_an_unwritable_output_folder_is_refused(driver: Driver, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "read-only").mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # the user without rights must come this far
    code, output = driver.run([*QUICK, "--output-dir", tmp_path / where], tmp_path / "output", ["be_nobody"])
    assert code == 1 and output.count("\n") == 1, output  # nothing else was done before
    assert str(tmp_path / where.split("/")[0]) in one_error(output)
    assert re.search("Permission denied|is a file|Not a directory", output)
    assert (tmp_path / "file").read_text() == "a file"
    assert list((tmp_path / "read-only").iterdir()) == []


# ---- which state is resumed ----


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "missing"])
def test_the_state_before_a_damaged_one(driver: Driver, whole: dict, copy: Path, how: str) -> None:
    damage(last(copy), how)
    moment = ["signal_in", "finish_epoch", 3, 1, KILL]
    code, output = driver.run(["--resume", last(copy)], copy.parent / "output", moment)
    assert code == -KILL
    assert "Resuming from the checkpoint before it" in output and "CNN_Model_last.prev.pth" in output
    # the good earlier state is still there, and not the damaged one in its place
    assert load_checkpoint(copy / "CNN_Model_last.prev.pth")["epoch"] == 2
    assert (copy / "CNN_Model_last.damaged.pth").exists() == (how != "missing")
    assert finished(driver, ["--resume", last(copy)], copy) == whole


def test_two_damaged_states_are_one_line_that_names_both(driver: Driver, copy: Path) -> None:
    damage(last(copy), "truncated")
    damage(copy / "CNN_Model_last.prev.pth", "flipped bit")
    before = contents(copy)
    code, output = driver.run(["--resume", last(copy)], copy.parent / "out")
    assert code == 1 and output.count("\n") == 1 and str(last(copy)) in one_error(output)
    assert "CNN_Model_last.prev.pth" in output
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("flags", "expected", "words"),
    [
        ("--resume CNN_Model_last.pth --epochs 5", 2, "--epochs 5 contradicts"),
        ("--resume nowhere/CNN_Model_last.pth", 1, "does not exist"),
        ("--resume nothing.pth", 1, "does not exist"),
        ("--resume --name other", 1, "does not exist; there is CNN_Model_last.pth: pass --resume FILE"),
        ("--resume CNN_Model_best.pth", 1, "is not a state to resume from: name a NAME_last.pth"),
    ],
)
def test_a_wrong_resume_is_one_line(driver, copy, flags, expected, words) -> None:
    before = contents(copy)
    flags = [copy / word if word.endswith(".pth") else word for word in flags.split()]
    code, output = driver.run([*flags, "--output-dir", copy], copy.parent / "out")
    assert code == expected and output.count("\n") == 1 and words in one_error(output)
    assert contents(copy) == before


def test_resuming_a_finished_run_touches_nothing(driver: Driver, whole: dict, copy: Path) -> None:
    assert finished(driver, ["--resume", last(copy)], copy) == whole
    before = contents(copy)
    code, output = driver.run(["--resume", last(copy)], copy.parent / "out")
    assert code == 0 and output.count("\n") == 2, output
    assert "is finished" in output and "python train.py --init-from" in output
    assert contents(copy) == before
    # without its results it is not finished: they are written now
    (copy / "CNN_Model_training_results.pth").unlink()
    assert finished(driver, ["--resume", last(copy)], copy) == whole


def test_resuming_at_another_precision(driver: Driver, whole: dict, copy: Path) -> None:
    code, output = driver.run(["--resume", last(copy), "--precision", "bf16"], copy.parent / "out")
    assert code == 0 and "Precision changed from fp32 to bf16" in output, output
    assert load_checkpoint(copy / "CNN_Model_training_results.pth")["recipe"]["precision"] == "bf16"
    assert digests(copy) != whole  # the steps after it were really others


def test_a_resumed_copy_keeps_another_run_of_its_name(driver: Driver, whole: dict, copy: Path) -> None:
    """The copy holds the run's name; what has that name in the output folder may be further on."""
    kept, before = shutil.copy(last(copy), copy.parent / "kept.pth"), contents(copy)
    code, output = driver.run(["--resume", kept, "--output-dir", copy], copy.parent / "out")
    assert code == 0 and "is kept; this run writes CNN_Model-2" in output, output
    now = contents(copy)
    assert {name: now[name] for name in before} == before
    changed = {key for key, value in digests(copy, "CNN_Model-2").items() if value != whole[key]}
    assert changed == {"last name", "best name", "training_results name"}


def test_the_printed_command_resumes_to_the_same_bytes(driver: Driver, tmp_path: Path) -> None:
    """`python train.py` itself is stopped by SIGTERM, then a shell runs the command that it printed."""
    flags = ["--yes", "--dataset", "synthetic", "--limit-train", "500", "--limit-test", "100", "--lr", "0.05"]
    flags += ["--model", "resnet20", "--epochs", "2", "--batch-size", "50", "--workers", "1"]
    flags += ["--checkpoint-every", "0.01", "--precision", "fp32"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    name, environment = "CNN_Model_synthetic", os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = {"cwd": REPOSITORY, "env": environment, "text": True, "stdin": subprocess.DEVNULL}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "train.py", *flags, "--output-dir", broken]
    process = subprocess.Popen(command, **options)
    while not (broken / f"{name}_last.pth").exists() and process.poll() is None:  # in the first epoch
        time.sleep(0.02)
    process.terminate()
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + TERM
    assert "Interrupted: saving after this batch" in errors and "Traceback" not in errors
    assert "Stopped in epoch 1" in printed
    command = re.search(r"Resume with: (.+)", printed)[1]
    assert "--workers 1" in command and "--checkpoint-every 0.01" in command
    subprocess.run(command, shell=True, check=True, timeout=200, **options)
    assert driver.run([*flags, "--output-dir", whole], tmp_path / "output")[0] == 0
    assert digests(whole, name) == digests(broken, name)


# ---- other processes, other faults ----


def test_two_runs_of_one_name_are_kept_apart(driver: Driver, whole: dict, tmp_path: Path) -> None:
    flags = [*QUICK, "--output-dir", tmp_path]
    first = driver.start(flags, tmp_path / "output", ["slow_batches", 20.0], ["checkpoint_each_batch"])
    while not last(tmp_path).exists():
        assert not first.ended(), first.output
    for again in ("--overwrite", "--resume"):
        code, output = driver.run([*flags, again], tmp_path / f"output {again}")
        error = one_error(output)
        assert code == 1 and "another process is writing the run CNN_Model" in error
        assert "pass another --name" in error
    assert not first.ended()
    # the lock of a killed run is free, and the run can be resumed
    assert first.kill() == -KILL and (tmp_path / "CNN_Model.lock").exists()
    assert finished(driver, ["--resume"], tmp_path) == whole
    assert not (tmp_path / "CNN_Model.lock").exists()


@pytest.mark.parametrize(("where", "number"), [("question", INT), ("finder", TERM), ("batch", INT)])
def test_a_signal_before_training_ends_it_without_a_traceback(driver, tmp_path, where, number) -> None:
    flags = [*QUICK, "--lr-finder", "--output-dir", tmp_path]
    if where == "question":
        flags = ["--model", "resnet8", "--output-dir", tmp_path]
    if where == "batch":  # of the finder, with workers
        flags += ["--workers", "2"]
    child = driver.start(flags, tmp_path / "output", ["silent_input"])
    child.wait_for("LR Finder?" if where == "question" else "Output: ")
    time.sleep(0.3)
    assert child.kill(number) == 128 + number, child.output
    # the finder may be over by then on a slow machine
    assert re.search(r"Interrupted; there was nothing to save\.|Stopped in epoch 1", child.output)
    assert "Traceback" not in child.output
    assert wait_until_gone(child.pid) == []
    assert not (tmp_path / "CNN_Model.lock").exists()


@pytest.mark.parametrize(("first", "second"), [(INT, INT), (TERM, INT), (INT, TERM)])
def test_a_second_signal_exits_at_once(driver: Driver, tmp_path: Path, first: int, second: int) -> None:
    flags = [*QUICK, "--output-dir", tmp_path, "--workers", "2"]
    child = driver.start(flags, tmp_path / "output", ["slow_batches", 1000.0])
    child.wait_for("Training:")
    time.sleep(1)
    os.kill(child.pid, first)
    child.wait_for("once more to quit at once")
    assert child.kill(second) == 128 + second, "it waited for the slow batch"
    assert "Traceback" not in child.output
    assert wait_until_gone(child.pid) == []


@pytest.mark.parametrize(("end", "expected"), [(INT, 128 + INT), (KILL, -KILL), (None, 1)])
def test_no_worker_is_left_behind(driver: Driver, tmp_path: Path, end: int | None, expected: int) -> None:
    flags = [*QUICK, "--output-dir", tmp_path, "--workers", "3", "--epochs", "50"]
    fault = ["slow_batches", 0.05] if end else ["spoil_loss", "nan", 2, 3]
    child = driver.start(flags, tmp_path / "output", fault)
    child.wait_for("Epoch [1/")
    if end:
        assert len(processes_of_group(child.pid)) == 4  # so that the search below would find them
    assert (child.kill(end) if end else child.wait()) == expected
    assert wait_until_gone(child.pid) == []


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run(driver: Driver, tmp_path: Path, value: str) -> None:
    faults = ["checkpoint_each_batch"], ["spoil_loss", value, 2, 4]
    code, output = driver.run([*QUICK, "--output-dir", tmp_path], tmp_path / "output", *faults)
    error = one_error(output)
    assert code == 1 and "NaN or infinite in batch 4 of epoch 2/3 at learning rate 0.01" in error
    assert "lower --lr" in error
    state = load_checkpoint(last(tmp_path))
    assert (state["epoch"], state["batches_done"]) == (2, 3)
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


@pytest.mark.parametrize("leak", [0, 1 << 20])
def test_memory_does_not_grow_from_epoch_2_to_6(driver: Driver, tmp_path: Path, leak: int) -> None:
    flags = [*QUICK, "--epochs", "6", "--output-dir", tmp_path]
    code, output = driver.run(flags, tmp_path / "output", ["print_memory", leak])
    kib = dict(re.findall(r"RSS (\d+) (\d+)", output))
    assert code == 0 and (int(kib["6"]) - int(kib["2"]) < 2048) == (leak == 0), output
