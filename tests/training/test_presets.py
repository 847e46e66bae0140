"""Presets: what overrides what; each trains end to end, and optional techniques resume exactly."""

import csv
import signal
from pathlib import Path

import pytest
import torch

from core.errors import UsageError
from helpers.driver import QUICK, Driver, digests
from training.checkpoint import load_checkpoint, save_checkpoint
from training.presets import PRESETS, apply_preset, preset_values, presets_table
from training.recipe import Recipe, given_flags, recipe_from
from training.settings import build_parser

KILL, INT = int(signal.SIGKILL), int(signal.SIGINT)
SMALL = ["--model", "resnet8", "--limit-train", "100", "--batch-size", "20", "--workers", "0", "--yes"]
# All that has a state of its own or draws at random, in two runs, since SWA and EMA exclude each other.
TECHNIQUES = {
    "moving average": (
        "--scheduler cosine --warmup-epochs 1 --mix both --mix-probability 0.8 --ema-decay 0.9 --sam asam "
        "--clip-norm 1 --drop-path 0.2 --accumulate 2 --image-sizes 24 32 --no-decay-bn --val-split 20 "
        "--limit-train 120"
    ),
    "equal average": "--swa-start 2 --zero-init-residual --label-smoothing 0.1 --sam sam --sam-start 3",
}


def recipe(*argv: str) -> Recipe:
    return recipe_from(given_flags(apply_preset(build_parser().parse_args(list(argv)))))


def test_reference_is_exactly_the_defaults() -> None:
    assert recipe("--recipe", "reference") == recipe() == Recipe()


@pytest.mark.parametrize("name", PRESETS)
def test_the_help_shows_the_flags_that_make_the_recipe(name: str) -> None:
    goal, flags = PRESETS[name]
    assert f"\n  {name}: {goal}{flags}" in presets_table()
    assert recipe("--recipe", name) == recipe(*flags.split()) == Recipe(**preset_values(name))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model resnet20 --mix none", {"model": "resnet20", "mix": "none"}),
        ("--decay-bn --ema-decay 0", {"decay_bn": True, "ema_decay": 0}),
        # and the values that the flags leave without meaning
        ("--epochs 6", {"epochs": 6, "warmup_epochs": 5}),
        ("--epochs 5", {"epochs": 5, "warmup_epochs": 0}),
        ("--scheduler multistep --milestones 3", {"milestones": (3,), "warmup_epochs": 0}),
        ("--scheduler onecycle --max-lr 0.2", {"max_lr": 0.2, "lr": 0.1, "warmup_epochs": 0}),
        ("--swa-start 1", {"swa_start": 1, "ema_decay": 0}),
    ],
)
def test_flags_beside_a_recipe_override_it(flags: str, expected: dict) -> None:
    made = {name: recipe("--recipe", name, *flags.split()) for name in PRESETS}
    assert {name: getattr(made["wide"], name) for name in expected} == expected


def test_flags_beside_fast_override_it() -> None:
    made = recipe("--recipe", "fast", "--lr", "0.4", "--epochs", "1")
    assert (made.lr, made.max_lr, made.epochs, made.image_sizes) == (0.4, None, 1, None)


@pytest.mark.parametrize(
    ("flags", "sam", "start"),
    [
        ("", "sam", 4),
        ("--epochs 4", "sam", 4),
        ("--epochs 3", "none", None),
        ("--epochs 3 --sam asam", "asam", None),
        ("--sam none", "none", None),
    ],
)
def test_a_late_start_of_sam_is_dropped_where_it_has_no_meaning(
    monkeypatch: pytest.MonkeyPatch, flags: str, sam: str, start: int | None
) -> None:
    monkeypatch.setitem(PRESETS, "best", ("", "--epochs 5 --sam sam --sam-start 4"))
    made = recipe("--recipe", "best", *flags.split())
    assert (made.sam, made.sam_start) == (sam, start)


def test_a_resumed_run_takes_no_recipe() -> None:
    with pytest.raises(UsageError, match="--recipe is for new runs"):
        recipe("--recipe", "best", "--resume")


@pytest.mark.parametrize("name", PRESETS)
def test_each_recipe_trains_end_to_end(
    driver: Driver, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    flags = ["--recipe", name, *SMALL, "--epochs", "1", "--no-lr-finder", "--output-dir", tmp_path]
    if name == "best":  # the included teacher knows other classes than the tests' data set has
        flags += ["--teacher", request.getfixturevalue("teachers")[0]]
    code, output = driver.run(flags, tmp_path / "output")
    assert code == 0, output
    (row,) = csv.DictReader((tmp_path / "CNN_Model_history.csv").open())
    stored = load_checkpoint(tmp_path / "CNN_Model_best.pth")["recipe"]
    assert ("ema_test_acc_percent" in row) == (stored["ema_decay"] > 0) == (name == "wide")
    assert (stored["epochs"], stored["teacher"] is not None) == (1, name == "best")


def resumed_run(driver: Driver, tmp_path: Path, flags: list[str]) -> dict:
    """The last state of a run of 4 epochs that was interrupted twice: it is the unbroken run's."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*QUICK, *flags, "--epochs", "4"]
    code, output = driver.run([*flags, "--output-dir", whole], tmp_path / "output")
    assert code == 0, output
    flags = [*flags, "--output-dir", cut]
    each = ["checkpoint_each_batch"]
    for moment in (("after_train_batch", 2, 3, KILL), ("after_train_batch", 3, 5, INT)):
        code, output = driver.run(flags, tmp_path / "output", each, ["signal_in", *moment])
        assert code in (-KILL, 128 + INT), output
        flags = ["--resume", "--output-dir", cut]
    code, output = driver.run(flags, tmp_path / "output")
    assert code == 0, output
    assert digests(cut) == digests(whole)
    return load_checkpoint(cut / "CNN_Model_last.pth")


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_an_interrupted_run_resumes_exactly(driver: Driver, tmp_path: Path, kind: str) -> None:
    state = resumed_run(driver, tmp_path, TECHNIQUES[kind].split())
    assert state["average"]["count"] == {"moving average": 20, "equal average": 3}[kind]


@pytest.fixture
def teachers(driver: Driver, tmp_path: Path) -> list[Path]:
    """Two trained networks."""
    for seed, name in enumerate(("one", "two")):
        flags = [*QUICK, "--epochs", "1", "--output-dir", tmp_path, "--name", name]
        code, output = driver.run([*flags, "--seed", seed], tmp_path / "output")
        assert code == 0, output
    return [tmp_path / "one_best.pth", tmp_path / "two_best.pth"]


def test_a_run_with_two_teachers_resumes_exactly(
    driver: Driver, tmp_path: Path, teachers: list[Path]
) -> None:
    published = "--distill-standardize --distill-weight 9 --distill-temperature 2"
    late = ["--sam", "asam", "--sam-start", "4"]  # after both interruptions
    flags = [*published.split(), *late, "--accumulate", "2", "--teacher", *teachers]
    state = resumed_run(driver, tmp_path, flags)
    assert state["recipe"]["teacher"] == list(map(str, teachers))


def test_a_run_starts_from_given_weights(driver: Driver, tmp_path: Path, teachers: list[Path]) -> None:
    """With a rate too low to move them; and an interrupted run goes on from its own."""
    flags = [*QUICK, "--init-from", teachers[0]]
    code, output = driver.run([*flags, "--output-dir", tmp_path, "--lr", "1e-8"], tmp_path / "output")
    assert code == 0 and "init-from" in output, output
    before, after = (
        load_checkpoint(path)["model"] for path in (teachers[0], tmp_path / "CNN_Model_best.pth")
    )
    torch.testing.assert_close(after["fc.weight"], before["fc.weight"], rtol=0, atol=1e-5)
    assert resumed_run(driver, tmp_path / "resumed", flags[len(QUICK) :])["epoch"] == 5
    code, output = driver.run([*flags, "--model", "resnet20"], tmp_path / "output")
    assert code == 2 and "one_best.pth holds a resnet8, not a resnet20: pass --model resnet8" in output
    code, output = driver.run(["--resume", tmp_path / "one_last.pth", "--epochs", "9"], tmp_path / "output")
    assert code == 2 and "with --init-from instead of --resume" in output
    code, output = driver.run(["--resume", tmp_path / "one_last.pth"], tmp_path / "output")
    assert code == 0 and f"train.py --init-from {tmp_path / 'one_training_results.pth'}" in output


def test_teachers_are_learned_from_and_must_know_the_same_classes(
    driver: Driver, tmp_path: Path, teachers: list[Path]
) -> None:
    losses = []
    for number, chosen in enumerate(([], teachers[:1], teachers)):
        flags = [*QUICK, "--epochs", "1", "--output-dir", tmp_path, "--name", f"student{number}"]
        flags += ["--teacher", *chosen] if chosen else []
        code, output = driver.run(flags, tmp_path / "output")
        assert code == 0 and all(str(path) in output for path in chosen), output
        history = load_checkpoint(tmp_path / f"student{number}_best.pth")["history"]
        losses.append(history[0]["train_loss"])
    assert len(set(losses)) == 3
    other = load_checkpoint(teachers[0])
    other["classes"] = other["classes"][:-1]
    other["model"] |= {name: other["model"][name][:-1] for name in ("fc.weight", "fc.bias")}
    save_checkpoint(tmp_path / "other_classes.pth", other)
    (tmp_path / "damaged.pth").write_bytes(teachers[0].read_bytes()[:-100])
    before = digests(tmp_path, "one")
    for path, code, message in (
        ("none.pth", 1, "none.pth does not exist"),
        ("damaged.pth", 1, "damaged.pth is damaged"),
        ("other_classes.pth", 1, "other_classes.pth was trained on other classes"),
        ("one_best.pth", 2, "one_best.pth would be replaced by this run: pass another --name"),
    ):
        flags = [*QUICK, "--output-dir", tmp_path, "--teacher", teachers[1], tmp_path / path]
        got, output = driver.run([*flags, "--name", "one", "--overwrite"], tmp_path / "output")
        assert got == code and message in output and "Traceback" not in output, output
        assert digests(tmp_path, "one") == before  # nothing of the earlier run is lost
