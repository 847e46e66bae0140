"""The recipe: what it refuses, its schedules against the reference's table of rates, its stored form."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cifar.dataset import DATASETS
from core.errors import UsageError
from training.recipe import MAX_EPOCHS, Recipe

# First and last epoch of each phase of the reference's 100 epochs, and its learning rate.
REFERENCE_RATES = ((1, 40, 0.1), (41, 70, 0.02), (71, 85, 0.004), (86, 100, 0.0008))


def refused(**values: Any) -> str:
    """The one line with which these values are refused."""
    with pytest.raises(UsageError) as caught:
        Recipe(**values)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250, message
    return message


def rates(recipe: Recipe, batches_per_epoch: int) -> list[list[float]]:
    """The learning rate of every batch of every epoch, by really stepping."""
    optimizer = recipe.build_optimizer(nn.Linear(1, 1))
    scheduler = recipe.build_scheduler(optimizer, batches_per_epoch)
    epochs = []
    for _ in range(recipe.epochs):
        epochs.append([])
        for _ in range(batches_per_epoch):
            epochs[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return epochs


# ---- schedules ----


@pytest.mark.parametrize("batches", [1, 7])
def test_the_rates_of_100_epochs_are_the_references(batches: int) -> None:
    by_epoch = rates(Recipe(epochs=100), batches)
    assert len(by_epoch) == 100
    for first, last, rate in REFERENCE_RATES:
        for epoch in range(first, last + 1):
            assert by_epoch[epoch - 1] == pytest.approx([rate] * batches, rel=1e-12), epoch


@pytest.mark.parametrize(
    ("epochs", "milestones"),
    [
        (100, (40, 70, 85)),
        (200, (80, 140, 170)),
        (300, (120, 210, 255)),
        (20, (8, 14, 17)),
        (10, (4, 7, 9)),
        (3, (1, 2)),
        (2, (1,)),
        (1, ()),
        (MAX_EPOCHS, (40_000, 70_000, 85_000)),
    ],
)
def test_the_milestones_scale_with_the_epochs(epochs: int, milestones: tuple[int, ...]) -> None:
    assert Recipe(epochs=epochs).milestone_epochs == milestones


def test_milestones_are_within_the_run_whatever_its_length() -> None:
    for epochs in range(1, 400):
        milestones = Recipe(epochs=epochs).milestone_epochs
        assert list(milestones) == sorted(set(milestones))
        assert all(1 <= epoch < epochs for epoch in milestones)
        assert len(milestones) == 3 or epochs < 6


def test_milestones_of_ones_own_are_kept() -> None:
    recipe = Recipe(epochs=6, milestones=(1, 5), gamma=0.5, lr=0.8)
    assert recipe.milestone_epochs == (1, 5)
    assert [rate[0] for rate in rates(recipe, 3)] == pytest.approx([0.8, 0.4, 0.4, 0.4, 0.4, 0.2])
    assert Recipe(epochs=6, milestones=()).milestone_epochs == ()


def test_onecycle_rises_to_its_peak_and_anneals_to_nothing() -> None:
    recipe = Recipe(epochs=10, scheduler="onecycle", max_lr=0.5)
    seen = [rate for epoch in rates(recipe, 10) for rate in epoch]
    peak = seen.index(max(seen))
    assert seen[peak] == pytest.approx(0.5) and peak == 29  # 30 % of 100 batches
    assert seen[0] == pytest.approx(0.5 / 25)
    assert seen[-1] == pytest.approx(0.5 / 25 / 1e4)
    steps = [b - a for a, b in itertools.pairwise(seen)]
    assert min(steps[:peak]) > 0 > max(steps[peak:])
    assert recipe.milestone_epochs == ()


def test_onecycle_peaks_at_the_learning_rate_by_default() -> None:
    assert max(max(epoch) for epoch in rates(Recipe(epochs=10, scheduler="onecycle", lr=0.3), 5)) == 0.3


@pytest.mark.parametrize("steps", range(1, 15))
def test_onecycle_goes_through_the_shortest_runs(steps: int) -> None:
    seen = [rate for epoch in rates(Recipe(epochs=steps, scheduler="onecycle"), 1) for rate in epoch]
    assert all(0 < rate <= 0.1 + 1e-12 for rate in seen)
    rates(Recipe(epochs=1, scheduler="onecycle"), steps)


def test_the_schedules_leave_the_momentum_alone() -> None:
    for scheduler in ("multistep", "onecycle"):
        recipe = Recipe(epochs=3, scheduler=scheduler)
        optimizer = recipe.build_optimizer(nn.Linear(1, 1))
        schedule = recipe.build_scheduler(optimizer, 2)
        for _ in range(5):
            optimizer.step()
            schedule.step()
            assert optimizer.param_groups[0]["momentum"] == 0.9


def test_the_optimizer_is_the_references() -> None:
    optimizer = Recipe().build_optimizer(nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    chosen = [group[key] for key in ("lr", "momentum", "weight_decay", "nesterov", "dampening")]
    assert chosen == [0.1, 0.9, 5e-4, True, 0]
    assert len(group["params"]) == 2  # the bias decays too, as in the reference
    assert Recipe(momentum=0.0).build_optimizer(nn.Linear(2, 2)).param_groups[0]["nesterov"] is False


def test_the_loss_is_cross_entropy_in_nats() -> None:
    loss = Recipe().build_criterion()(torch.zeros(4, 100), torch.arange(4))
    assert loss.item() == pytest.approx(math.log(100), rel=1e-6)


# ---- what is refused ----

NAN, INF = float("nan"), float("inf")
BAD = {
    "model": ["", "resnet57", "ResNet56", "x" * 5000, "a\nb"],
    "dataset": ["cifar10", ""],
    "scheduler": ["exponential"],
    "precision": ["fp16", "auto"],
    "epochs": [0, -1, MAX_EPOCHS + 1, 10**30],
    "lr": [0.0, -0.1, 101.0, NAN, INF, -INF],
    "momentum": [-0.1, 1.0, NAN, INF],
    "weight_decay": [-1e-9, 1.5, NAN, INF],
    "gamma": [0.0, -1.0, 1.5, NAN, INF],
    "seed": [-1, 2**32, 10**30],
    "target_accuracy": [-1.0, 100.5, NAN, INF],
    "batch_size": [0, -1, 50_001, 10**30, -(10**5000)],
    "test_batch_size": [0, -1, 10_001, 10**5000],
    "limit_train": [0, -1, 50_001],
    "limit_test": [0, -1, 10_001],
    "val_split": [-1, 50_000, 10**5000],
    "warmup_epochs": [-1, 20, 10**5000],
    "label_smoothing": [-0.1, 1.0, NAN],
    "clip_norm": [-1.0, INF, NAN],
    "accumulate": [0, -1, 129, 10**5000],
    "image_sizes": [(15,), (33,), (24, 10**5000), (), (32,) * 21],
    "mix": ["cutmixup", ""],
    "mix_probability": [-0.1, 1.1, NAN],
    "mixup_alpha": [0.0, -1.0, 101.0, NAN],
    "cutmix_alpha": [0.0, -1.0, 101.0, NAN],
    "ema_decay": [-0.1, 1.0, NAN],
    "swa_start": [0, -1, 21],
    "sam": ["SAM", ""],
    "teacher": [""],
    "distill_alpha": [-0.1, 1.1, NAN],
    "distill_temperature": [0.0, -1.0, INF, NAN],
    "drop_path": [-0.1, 1.0, NAN],
    "dropout": [-0.1, 1.0, NAN],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else type(value).__name__,
)
def test_a_value_out_of_range_names_its_flag(name: str, value: Any) -> None:
    assert f"--{name.replace('_', '-')} " in refused(**{name: value})


OPTIONAL = {"limit_train", "limit_test", "max_lr", "milestones", "image_sizes", "swa_start", "sam_rho"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_a_value_of_a_wrong_type_is_a_usage_error_that_names_its_flag(name: str) -> None:
    stored = Recipe().to_dict()
    wrong = [True, [], ["a"], {}, [[1]], b"7", 1j, torch.tensor(1), "7", 1.5, 7, None]
    default = getattr(Recipe(), name)
    fits = {bool: bool, str: str, int: int, float: (int, float)}.get(type(default), int | None)
    if name == "teacher":
        fits = str | None
    refusals = 0
    for value in wrong:
        if isinstance(value, fits) and (value is not True or fits is bool):
            continue
        if name in OPTIONAL and value in ([], 1.5, 7):
            continue
        with pytest.raises(UsageError) as caught:
            Recipe.from_dict(stored | {name: value})
        assert f"--{name.replace('_', '-')} " in str(caught.value) and "\n" not in str(caught.value)
        refusals += 1
    assert refusals >= 8


def test_a_wrong_type_is_refused_for_optional_fields_too() -> None:
    for name, value in (("limit_train", 1.5), ("limit_test", 1.5), ("milestones", 7), ("milestones", 1.5)):
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            Recipe.from_dict({name: value})


@pytest.mark.parametrize(
    "milestones", [(2, 1), (1, 1), (0, 1), (-1,), (20,), (5, 30), (10**30,), (True,), (1.5,), ("1",)]
)
def test_milestones_rise_within_the_run(milestones: tuple) -> None:
    assert "--milestones" in refused(epochs=20, milestones=milestones)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_lr": 0.1}, ["--max-lr", "--scheduler onecycle"]),
        ({"scheduler": "onecycle", "milestones": (3,)}, ["--milestones", "--scheduler multistep"]),
        ({"scheduler": "onecycle", "max_lr": 0.0}, ["--max-lr"]),
        ({"scheduler": "onecycle", "max_lr": NAN}, ["--max-lr"]),
        ({"limit_train": 100}, ["--batch-size 128", "100 images to train on", "smaller"]),
        ({"val_split": 49_900}, ["--batch-size 128", "100 images to train on"]),
        ({"limit_train": 300, "val_split": 200}, ["--batch-size 128", "100 images"]),
        ({"limit_train": 100, "val_split": 100, "batch_size": 1}, ["--val-split", "99"]),
        ({"dataset": "synthetic", "limit_train": 10_001}, ["--limit-train", "10,000"]),
        ({"warmup_epochs": 2}, ["--warmup-epochs", "--scheduler cosine"]),
        ({"dropout": 0.3}, ["--dropout", "wrn_", "resnet56"]),
        ({"sam_rho": 0.1}, ["--sam-rho", "--sam sam"]),
        ({"sam": "sam", "sam_rho": 0.0}, ["--sam-rho"]),
        ({"swa_start": 5, "ema_decay": 0.9}, ["--swa-start", "--ema-decay", "one of them"]),
        ({"dataset": "synthetic", "limit_test": 2_001}, ["--limit-test", "2,000"]),
        ({"dataset": "synthetic", "batch_size": 10_001}, ["--batch-size", "10,000"]),
    ],
)
def test_contradictions_name_the_flags(values: dict[str, Any], words: list[str]) -> None:
    message = refused(**values)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_defaults_hold_for_every_dataset(dataset: str) -> None:
    Recipe(dataset=dataset)
    Recipe(dataset=dataset, limit_test=10)  # one test batch of 10


def test_the_extremes_that_are_allowed() -> None:
    Recipe(batch_size=50_000, seed=2**32 - 1, gamma=1.0, momentum=0.0, weight_decay=0.0)
    Recipe(limit_train=1, batch_size=1, limit_test=1, epochs=1, target_accuracy=0, lr=1)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0
    with pytest.raises(UsageError, match="--epochs"):
        dataclasses.replace(Recipe(), epochs=0)


# ---- what is said of it ----


def test_the_data_note_never_lets_synthetic_pass_for_cifar() -> None:
    assert Recipe().data_note == "CIFAR-100"
    assert "synthetic" in Recipe(dataset="synthetic").data_note
    note = Recipe(limit_train=1000, limit_test=500, val_split=200).data_note
    assert "1,000 training images only" in note and "500 test images only" in note
    assert "200 held out" in note


def test_the_schedule_note_names_rates_and_drops() -> None:
    assert Recipe(epochs=100).schedule_note == "learning rate 0.1, x 0.2 after 40, 70, 85"
    assert Recipe(epochs=1).schedule_note == "learning rate 0.1"
    assert "0.3" in Recipe(scheduler="onecycle", max_lr=0.3).schedule_note


# ---- stored and read again ----

PRESETS = [
    Recipe(),
    Recipe(milestones=(3, 7), epochs=9),
    Recipe(scheduler="cosine", warmup_epochs=2, decay_bn=False, mix="both", image_sizes=(24, 32), sam="asam"),
    Recipe(teacher="output/teacher_best.pth", swa_start=3, model="wrn_16_4", dropout=0.3),
    Recipe(scheduler="onecycle", max_lr=0.4, limit_train=1000, limit_test=5, val_split=10, precision="bf16"),
]


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_recipe_survives_a_weights_only_file(recipe: Recipe, tmp_path: Path) -> None:
    torch.save(recipe.to_dict(), tmp_path / "recipe.pth")
    assert Recipe.from_dict(torch.load(tmp_path / "recipe.pth", weights_only=True)) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_stored_recipe_without_a_newer_field_takes_its_default() -> None:
    stored = Recipe(lr=0.3).to_dict()
    for name in list(stored):
        if name not in ("model", "epochs", "lr"):
            del stored[name]
    assert Recipe.from_dict(stored) == Recipe(lr=0.3)


@pytest.mark.parametrize("name", ["warm_up", 3, None, "a\nb", "x" * 5000, ("t", 1)])
def test_an_unknown_field_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match="unknown recipe field") as caught:
        Recipe.from_dict(Recipe().to_dict() | {name: 1})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Recipe)]), values, max_size=4))
def test_any_stored_values_make_a_recipe_or_a_usage_error(stored: dict[str, Any]) -> None:
    try:
        recipe = Recipe.from_dict(stored)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
