"""A run that is killed or interrupted, however often, ends with the bytes of the run that was left alone."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import RunError
from helpers.driver import QUICK, Driver, digests, wait_until_gone
from training.checkpoint import load_checkpoint
from training.run import RunFiles

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KILLS = 20
KILL, INT, TERM = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)
PRESETS = {
    "multistep": [],
    "onecycle": ["--scheduler", "onecycle"],
    "val split": ["--val-split", "100", "--limit-train", "200"],
}


@pytest.fixture(scope="session")
def unbroken(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The digests of each recipe's run that nothing disturbed."""
    found = {}
    for name, flags in PRESETS.items():
        folder = tmp_path_factory.mktemp("unbroken")
        code, output = driver.run([*QUICK, *flags, "--output-dir", folder], folder / "output")
        assert code == 0, output
        found[name] = digests(folder)
    return found


def last(folder: Path) -> Path:
    return folder / "CNN_Model_last.pth"


def progress(folder: Path) -> tuple[int, int]:
    """The epoch and the batch that a resumed run would go on at."""
    try:
        state = RunFiles(folder, "CNN_Model").load_last()
    except RunError as error:
        assert "nothing to resume" in str(error)  # anything else is a loss
        return 0, 0
    return state["epoch"], state["batches_done"]


def go_on(folder: Path) -> list:
    """The flags that resume the run in `folder`, or that start it where no state was saved."""
    started = last(folder).exists() or (folder / "CNN_Model_last.prev.pth").exists()
    return ["--resume", "--output-dir", folder] if started else [*QUICK, "--output-dir", folder]


def test_resume_after_kills_at_random_moments_gives_the_same_bytes(
    driver: Driver, unbroken: dict, tmp_path: Path
) -> None:
    rng, kills, runs = random.Random(5), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        folder.mkdir()
        code, at = None, (0, 0)
        while code != 0:
            child = driver.start(go_on(folder), folder / "output", ["checkpoint_each_batch"])
            code = child.kill_after(rng.uniform(0, 2.5)) if kills < KILLS else child.wait()
            kills += code == -KILL
            assert code in (0, -KILL), child.output
            assert at <= progress(folder)  # nothing that was saved is lost
            at = progress(folder)
        assert digests(folder) == unbroken["multistep"]
        runs += 1


# method of Run, epoch, call: between two batches, in the middle of one, in testing, at an epoch's end
MOMENTS = {
    "training": ("after_train_batch", 2, 3),
    "testing": ("after_test_batch", 2, 1),
    "an epoch's end": ("finish_epoch", 1, 1),
    "an epoch's beginning": ("begin_epoch", 3, 1),
    "the last epoch's end": ("finish_epoch", 3, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [INT, TERM])
def test_resume_after_a_signal_gives_the_same_bytes(
    driver: Driver, unbroken: dict, tmp_path: Path, moment: str, number: int
) -> None:
    flags = [*QUICK, "--output-dir", tmp_path]
    code, output = driver.run(flags, tmp_path / "output", ["signal_in", *MOMENTS[moment], number])
    assert code == 128 + number, output
    assert f"Go on with: python train.py --resume {last(tmp_path)}" in output
    assert "Traceback" not in output and "rror" not in output
    code, output = driver.run(["--resume", last(tmp_path)], tmp_path / "output 2")
    assert code == 0, output
    assert digests(tmp_path) == unbroken["multistep"]


@pytest.mark.parametrize("recipe", ["onecycle", "val split"])
def test_resume_of_other_recipes_gives_the_same_bytes(
    driver: Driver, unbroken: dict, tmp_path: Path, recipe: str
) -> None:
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
    code, output = driver.run(flags, tmp_path / "output")
    assert code == 0, output
    assert digests(tmp_path) == unbroken[recipe]


@pytest.mark.parametrize("workers", [(1, 3), (3, 0), (0, 1)])
def test_resume_with_another_number_of_workers_gives_the_same_bytes(
    driver: Driver, unbroken: dict, tmp_path: Path, workers: tuple[int, int]
) -> None:
    flags = [*QUICK, "--output-dir", tmp_path, "--workers", workers[0]]
    child = driver.start(flags, tmp_path / "output", ["signal_in", "after_train_batch", 2, 3, INT])
    assert child.wait() == 128 + INT
    assert wait_until_gone(child.pid) == []
    flags = ["--resume", last(tmp_path), "--workers", workers[1]]
    child = driver.start(flags, tmp_path / "output", ["signal_in", "after_train_batch", 3, 2, KILL])
    assert child.wait() == -KILL
    assert wait_until_gone(child.pid) == []  # the workers notice that their parent is gone
    code, output = driver.run(["--resume", last(tmp_path)], tmp_path / "output")
    assert code == 0, output
    assert digests(tmp_path) == unbroken["multistep"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resume_is_not_needed_for_equal_bytes_same_seed_same_bytes(
    driver: Driver, unbroken: dict, tmp_path: Path, workers: int
) -> None:
    flags = [*QUICK, "--output-dir", tmp_path, "--workers", workers]
    code, output = driver.run(flags, tmp_path / "output")
    assert code == 0, output
    assert digests(tmp_path) == unbroken["multistep"]
    if workers == 0:  # and the comparison can tell runs apart
        code, output = driver.run([*flags, "--seed", "1", "--overwrite"], tmp_path / "output")
        other = digests(tmp_path)
        for key in ("history", "last model", "last random", "best model", "training_results history"):
            assert other[key] != unbroken["multistep"][key], key


# ---- which state is gone on with ----


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


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def test_resume_after_a_kill_at_every_step_of_writing_files_gives_the_same_bytes(
    driver: Driver, unbroken: dict, copy: Path
) -> None:
    """The n-th attempt dies at its n-th step: open, write, fsync, rename, unlink."""
    code, number, at, flags = None, 0, progress(copy), ["--resume", last(copy)]
    while code != 0:
        number += 1
        code, output = driver.run(flags, copy / "output", ["die_at_step", number])
        assert code in (0, -KILL), output
        assert at <= progress(copy)
        at = progress(copy)
    assert number > 40  # as many steps as an epoch's end has, and then some
    assert digests(copy) == unbroken["multistep"]
    assert not list(copy.glob(".*")) and not list(copy.glob("*.lock"))


def test_resume_is_possible_from_the_moment_that_training_begins(
    driver: Driver, unbroken: dict, tmp_path: Path
) -> None:
    moment = ["signal_in", "begin_epoch", 1, 1, KILL]
    assert driver.run([*QUICK, "--output-dir", tmp_path], tmp_path / "output", moment)[0] == -KILL
    assert progress(tmp_path) == (1, 0)
    code, output = driver.run(["--resume", "--output-dir", tmp_path], tmp_path / "output")
    assert code == 0, output
    assert digests(tmp_path) == unbroken["multistep"]


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "missing"])
def test_resume_falls_back_on_the_state_before_a_damaged_one(
    driver: Driver, unbroken: dict, copy: Path, how: str
) -> None:
    damage(last(copy), how)
    flags = ["--resume", last(copy)]
    code, output = driver.run(flags, copy / "output", ["signal_in", "finish_epoch", 3, 1, KILL])
    assert code == -KILL
    output = (copy / "output").read_text()
    assert "Going on from the checkpoint before it" in output and "CNN_Model_last.prev.pth" in output
    # the good earlier state is still there, and not the damaged one in its place
    assert load_checkpoint(copy / "CNN_Model_last.prev.pth")["epoch"] == 2
    assert (copy / "CNN_Model_last.damaged.pth").exists() == (how != "missing")
    code, output = driver.run(flags, copy / "output")
    assert code == 0, output
    assert digests(copy) == unbroken["multistep"]


def test_resume_with_both_states_damaged_is_one_line_that_names_both(driver: Driver, copy: Path) -> None:
    damage(last(copy), "truncated")
    damage(copy / "CNN_Model_last.prev.pth", "flipped bit")
    before = contents(copy)
    code, output = driver.run(["--resume", last(copy)], copy.parent / "out")
    assert code == 1 and output.count("\n") == 1 and output.startswith("train.py: error: ")
    assert str(last(copy)) in output and "CNN_Model_last.prev.pth" in output
    assert contents(copy) == before


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_resume_of_a_finished_run_says_so_and_touches_nothing(
    driver: Driver, unbroken: dict, copy: Path
) -> None:
    assert driver.run(["--resume", last(copy)], copy.parent / "out")[0] == 0
    before = contents(copy)
    code, output = driver.run(["--resume", last(copy)], copy.parent / "out 2")
    assert code == 0 and "is finished" in output and output.count("\n") == 1, output
    assert contents(copy) == before
    # without its results it is not finished: they are written now
    (copy / "CNN_Model_training_results.pth").unlink()
    code, output = driver.run(["--resume", last(copy)], copy.parent / "out 3")
    assert code == 0 and "is finished" not in output, output
    assert digests(copy) == unbroken["multistep"]


CONTRADICTIONS = ["--epochs 5", "--lr 0.2", "--batch-size 10", "--seed 1", "--scheduler onecycle"]


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_resume_refuses_flags_that_contradict_the_checkpoint(driver: Driver, copy: Path, flags: str) -> None:
    before = contents(copy)
    code, output = driver.run(["--resume", last(copy), *flags.split()], copy.parent / "out")
    assert code == 2 and output.count("\n") == 1 and f"{flags} contradicts" in output, output
    assert contents(copy) == before


def test_a_run_goes_on_at_another_precision_where_it_is_asked_to(
    driver: Driver, unbroken: dict, copy: Path
) -> None:
    before = load_checkpoint(last(copy))["recipe"]["precision"]
    after = {"fp32": "bf16", "bf16": "fp32"}[before]
    code, output = driver.run(["--resume", last(copy), "--precision", after], copy.parent / "out")
    assert code == 0 and f"Precision: {after} from here on, {before} until here" in output, output
    assert load_checkpoint(copy / "CNN_Model_training_results.pth")["recipe"]["precision"] == after
    assert digests(copy) != unbroken["multistep"]  # the steps after it were really others


@pytest.mark.parametrize("what", ["nowhere/CNN_Model_last.pth", "nothing.pth", ""])
def test_resume_of_a_missing_file_is_one_line(driver: Driver, tmp_path: Path, what: str) -> None:
    (tmp_path / "other_last.pth").write_bytes(b"")
    flags = ["--resume", tmp_path / what] if what else ["--resume", "--output-dir", tmp_path]
    code, output = driver.run(flags, tmp_path / "output")
    assert code == 1 and output.count("\n") == 1 and "does not exist" in output
    if not what:
        assert "other_last.pth: pass --resume FILE" in output  # what could have been meant


def test_resume_refuses_what_is_no_state(driver: Driver, copy: Path) -> None:
    code, output = driver.run(["--resume", copy / "CNN_Model_best.pth"], copy.parent / "out")
    assert code == 1 and output.count("\n") == 1 and "no state to resume from" in output


def test_resume_from_a_copy_keeps_another_run_of_that_name(
    driver: Driver, unbroken: dict, copy: Path
) -> None:
    """The copy holds the run's name; what is under that name in the output folder may be further on."""
    shutil.copy(last(copy), copy.parent / "kept.pth")
    before = {name: content for name, content in contents(copy).items() if "output" not in name}
    code, output = driver.run(["--resume", copy.parent / "kept.pth", "--output-dir", copy], copy / "output")
    assert code == 0 and "is kept; this run writes CNN_Model-2" in output, output
    now = contents(copy)
    assert {name: now[name] for name in before} == before
    changed = {
        key for key, value in digests(copy, "CNN_Model-2").items() if value != unbroken["multistep"][key]
    }
    assert changed == {"last name", "best name", "training_results name"}


# ---- the program itself, without the driver ----


def test_resume_with_the_printed_command_gives_the_same_bytes(driver: Driver, tmp_path: Path) -> None:
    """`python train.py` is stopped by SIGTERM, then a shell runs the command that it printed."""
    flags = ["--yes", "--dataset", "synthetic", "--limit-train", "500", "--limit-test", "100", "--lr", "0.05"]
    flags += ["--model", "resnet20", "--epochs", "2", "--batch-size", "50", "--workers", "1"]
    flags += ["--checkpoint-every", "0.01", "--precision", "fp32"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    name, environment = "CNN_Model_synthetic", os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = {"cwd": REPOSITORY, "env": environment, "text": True, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags, "--output-dir", broken],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    end = time.monotonic() + 200
    while not (broken / f"{name}_last.pth").exists() and time.monotonic() < end:  # in the first epoch
        time.sleep(0.02)
    process.terminate()
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + TERM
    assert "Interrupted: saving after this batch" in errors and "Traceback" not in errors
    assert "Stopped in epoch 1" in printed
    command = re.search(r"Go on with: (.+)", printed)[1]
    assert "--workers 1" in command and "--checkpoint-every 0.01" in command
    subprocess.run(command, shell=True, check=True, timeout=200, capture_output=True, **options)
    code, output = driver.run([*flags, "--output-dir", whole], tmp_path / "output")
    assert code == 0, output
    assert digests(whole, name) == digests(broken, name)
