"""The recipe: what it refuses, its flags, its schedules against the reference's rates, its stored form."""

import contextlib
import dataclasses
import itertools
import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.errors import UsageError
from model import build_model
from training.recipe import MAX_EPOCHS, Recipe, check_resume_flags, flag_of, given_flags, recipe_from
from training.settings import build_parser

FIELDS = dataclasses.fields(Recipe)
NAN, INF = float("nan"), float("inf")
# Values that each field accepts, at the ends of its range, and values that it refuses.
VALUES = {
    "model": (["wrn_16_4"], ["", "resnet57", "ResNet56", "x" * 5000, "a\nb"]),
    "dataset": (["synthetic"], ["cifar10", ""]),
    "limit_train": ([1, 50_000], [0, -1, 50_001, 10**5000]),
    "limit_test": ([1, 10_000], [0, -1, 10_001]),
    "val_split": ([0, 49_999], [-1, 50_000, 10**5000]),
    "epochs": ([1, MAX_EPOCHS], [0, -1, MAX_EPOCHS + 1, 10**30]),
    "batch_size": ([1, 50_000], [0, -1, 50_001, 10**30, -(10**5000)]),
    "test_batch_size": ([1, 10_000], [0, -1, 10_001, 10**5000]),
    "lr": ([1e-8, 1, 100.0], [0.0, -0.1, 101.0, NAN, INF, -INF]),
    "momentum": ([0, 0.9999], [-0.1, 1.0, NAN, INF]),
    "weight_decay": ([0, 1.0], [-1e-9, 1.5, NAN, INF]),
    "scheduler": (["onecycle", "cosine"], ["exponential", ""]),
    "milestones": ([(1, 19), (7,)], [(2, 1), (1, 1), (0, 1), (-1,), (20,), (10**30,)]),
    "gamma": ([1e-6, 1.0], [0.0, -1.0, 1.5, NAN, INF]),
    "max_lr": ([1e-8, 100], [0.0, 101, NAN]),
    "augment": (["trivialaugment", "randaugment:1,9"], []),
    "seed": ([0, 2**32 - 1], [-1, 2**32, 10**30]),
    "precision": (["bf16", "fp16"], ["fp8", "auto"]),
    "target_accuracy": ([0, 100], [-1.0, 100.5, NAN, INF]),
    "warmup_epochs": ([0, 19], [-1, 20, 10**5000]),
    "decay_bn": ([False, True], []),
    "label_smoothing": ([0, 0.9], [-0.1, 1.0, NAN]),
    "clip_norm": ([0, 1e6], [-1.0, INF, NAN]),
    "accumulate": ([1, 128], [0, -1, 129, 10**5000]),
    "image_sizes": ([(16, 32), (32,)], [(15,), (33,), (24, 10**5000), (), (32,) * 21]),
    "mix": (["mixup", "cutmix", "both"], ["cutmixup", ""]),
    "mix_probability": ([0, 1], [-0.1, 1.1, NAN]),
    "mixup_alpha": ([0.001, 100], [0.0, -1.0, 101.0, NAN]),
    "cutmix_alpha": ([0.001, 100], [0.0, -1.0, 101.0, NAN]),
    "ema_decay": ([0, 0.999999], [-0.1, 1.0, NAN]),
    "swa_start": ([1, 20], [0, -1, 21]),
    "sam": (["sam", "asam"], ["SAM", ""]),
    "sam_rho": ([1e-6, 100], [0.0, 101, NAN]),
    "sam_start": ([1, 20], [0, -1, 21]),
    "init_from": (["output/base_best.pth"], [""]),
    "teacher": ([("output/teacher_best.pth",), ("a.pth", "b.pth")], [("",), ("a.pth", ""), ()]),
    "distill_alpha": ([0, 1], [-0.1, 1.1, NAN]),
    "distill_weight": ([0, 1000], [-0.1, 1001, NAN]),
    "distill_temperature": ([0.1, 100], [0.0, -1.0, INF, NAN]),
    "distill_standardize": ([True, False], []),
    "zero_init_residual": ([True, False], []),
    "drop_path": ([0, 0.99], [-0.1, 1.0, NAN]),
    "dropout": ([0, 0.99], [-0.1, 1.0, NAN]),
}
# What some fields need beside them.
CONTEXT = {
    "limit_train": {"batch_size": 1},
    "val_split": {"batch_size": 1},
    "max_lr": {"scheduler": "onecycle"},
    "warmup_epochs": {"scheduler": "cosine"},
    "sam_rho": {"sam": "sam"},
    "sam_start": {"sam": "sam"},
    "distill_weight": {"teacher": ("a.pth",)},
    "distill_standardize": {"teacher": ("a.pth",)},
    "dropout": {"model": "wrn_16_4"},
}


def refused(**values: Any) -> str:
    """The one line with which these values are refused."""
    with pytest.raises(UsageError) as caught:
        Recipe(**values)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250, message
    return message


def cases(column: int) -> list[Any]:
    rows = [(name, number, value) for name, row in VALUES.items() for number, value in enumerate(row[column])]
    return [pytest.param(name, value, id=f"{name}-{number}") for name, number, value in rows]


def command_line(values: dict[str, Any]) -> list[str]:
    """The flags of train.py with these values."""
    argv: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv.append(flag_of(name if value else f"no_{name}"))
        else:
            argv += [flag_of(name), *map(str, value if isinstance(value, tuple) else [value])]
    return argv


def parsed(*argv: str) -> Any:
    return build_parser().parse_args(list(argv))


# ---- values and flags ----


def test_the_table_has_every_field() -> None:
    assert list(VALUES) == [field.name for field in FIELDS]


@pytest.mark.parametrize(("name", "value"), cases(0))
def test_a_value_in_range_goes_through_the_command_line_and_a_checkpoint(name: str, value: Any) -> None:
    values = CONTEXT.get(name, {}) | {name: value}
    recipe = Recipe(**values)
    assert getattr(recipe, name) == value
    args = parsed(*command_line(values))
    assert given_flags(args) == values
    assert recipe_from(given_flags(args)) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(("name", "value"), cases(1))
def test_a_value_out_of_range_names_its_flag(name: str, value: Any) -> None:
    assert f"{flag_of(name)} " in refused(**CONTEXT.get(name, {}), **{name: value})


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_each_field_has_a_flag_with_help_that_tells_its_default(field: dataclasses.Field) -> None:
    (action,) = [a for a in build_parser()._actions if flag_of(field.name) in a.option_strings]
    assert action.default is None  # not given: a question, a preset or the field's default decides
    assert len(action.help) > 8
    if field.default is not None:
        assert "default: " in action.help


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_stored_value_of_a_wrong_type_names_its_flag(field: dataclasses.Field) -> None:
    right = {*(get_args(field.type) or (field.type,))}  # a tuple is stored as a list: none of these fits
    right |= {int} if float in right else set()
    values = [True, 7, 1.5, "7", None, b"7", 1j, {}, ["a"], [True], [[1]], torch.tensor(1)]
    if field.name == "teacher":  # a list of paths; or one, as before there could be several
        values = [value for value in values if value not in ("7", ["a"])]
    for value in (value for value in values if type(value) not in right):
        with pytest.raises(UsageError) as caught:
            Recipe.from_dict(Recipe().to_dict() | {field.name: value})
        assert str(caught.value).startswith(f"{flag_of(field.name)} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_lr": 0.1}, ["--max-lr", "--scheduler onecycle"]),
        ({"scheduler": "onecycle", "milestones": (3,)}, ["--milestones", "--scheduler multistep"]),
        ({"epochs": 5, "milestones": (5,)}, ["--milestones", "from 1 to 4, not 5"]),
        ({"milestones": (9, 5)}, ["--milestones", "rising", "9 5"]),
        ({"limit_train": 100}, ["--batch-size 128", "100 images to train on", "lower it"]),
        ({"val_split": 49_900}, ["--batch-size 128", "100 images to train on"]),
        ({"limit_train": 300, "val_split": 200}, ["--batch-size 128", "100 images"]),
        ({"limit_train": 100, "val_split": 100, "batch_size": 1}, ["--val-split", "at most 99"]),
        ({"dataset": "synthetic", "limit_train": 10_001}, ["--limit-train", "10,000"]),
        ({"dataset": "synthetic", "limit_test": 2_001}, ["--limit-test", "2,000"]),
        ({"dataset": "synthetic", "batch_size": 10_001}, ["--batch-size", "10,000"]),
        ({"warmup_epochs": 2}, ["--warmup-epochs", "--scheduler cosine"]),
        ({"dropout": 0.3}, ["--dropout", "wrn_", "resnet56"]),
        ({"sam_rho": 0.1}, ["--sam-rho", "--sam sam"]),
        ({"swa_start": 5, "ema_decay": 0.9}, ["--swa-start", "--ema-decay", "not both"]),
    ],
)
def test_contradictions_name_the_flags(values: dict[str, Any], words: list[str]) -> None:
    message = refused(**values)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", None),
        ("--yes --workers 2", None),
        ("--epochs 20 --lr 5e-2 --milestones 8 14 17", None),  # those that the epochs give
        ("--precision fp32", None),  # the run resumes on another processor
        ("--epochs 10", "--epochs 10 contradicts the checkpoint's 20"),
        ("--lr 0.1", "--lr 0.1 contradicts the checkpoint's 0.05"),
        ("--milestones 3", "--milestones 3 contradicts the checkpoint's 8 14 17"),
        ("--val-split 0 --limit-train 500", "--limit-train 500"),
        ("--dataset synthetic", "--dataset synthetic contradicts the checkpoint's cifar100"),
        ("--decay-bn --zero-init-residual", "--zero-init-residual True"),
    ],
)
def test_a_resumed_recipe_may_be_repeated_but_not_changed(flags: str, words: str | None) -> None:
    with contextlib.nullcontext() if words is None else pytest.raises(UsageError, match=words):
        check_resume_flags(given_flags(parsed(*flags.split())), Recipe(lr=0.05, precision="bf16"))


# ---- schedules, optimizer, loss ----

# First and last epoch of each phase of the reference's 100 epochs, and its learning rate.
REFERENCE_RATES = ((1, 40, 0.1), (41, 70, 0.02), (71, 85, 0.004), (86, 100, 0.0008))


def rates(recipe: Recipe, batches_per_epoch: int) -> list[float]:
    """The learning rate of every batch, by really stepping."""
    optimizer = recipe.build_optimizer(nn.Linear(1, 1))
    scheduler = recipe.build_scheduler(optimizer, batches_per_epoch)
    seen = []
    for _ in range(recipe.epochs * batches_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["momentum"] == recipe.momentum
    return seen


@pytest.mark.parametrize("batches", [1, 7])
def test_the_rates_of_100_epochs_are_the_references(batches: int) -> None:
    expected = [rate for first, last, rate in REFERENCE_RATES for _ in range((last - first + 1) * batches)]
    assert rates(Recipe(epochs=100), batches) == pytest.approx(expected, rel=1e-12)


def test_the_milestones_scale_with_the_epochs_and_lie_within_them() -> None:
    for epochs, milestones in ((200, (80, 140, 170)), (20, (8, 14, 17)), (3, (1, 2)), (2, (1,)), (1, ())):
        assert Recipe(epochs=epochs).milestone_epochs == milestones
    for epochs in range(6, 400):
        first, second, third = Recipe(epochs=epochs).milestone_epochs
        assert 1 <= first < second < third < epochs


def test_given_milestones_are_kept() -> None:
    recipe = Recipe(epochs=6, milestones=(1, 5), gamma=0.5, lr=0.8)
    assert recipe.milestone_epochs == (1, 5)
    assert rates(recipe, 3)[::3] == pytest.approx([0.8, 0.4, 0.4, 0.4, 0.4, 0.2])
    assert Recipe(epochs=6, milestones=()).milestone_epochs == ()


def test_onecycle_rises_to_its_peak_and_anneals_to_nothing() -> None:
    seen = rates(Recipe(epochs=10, scheduler="onecycle", max_lr=0.5), 10)
    peak = seen.index(max(seen))
    assert seen[peak] == pytest.approx(0.5) and peak == 29  # 30 % of 100 batches
    assert seen[0] == pytest.approx(0.5 / 25)
    assert seen[-1] == pytest.approx(0.5 / 25 / 1e4)
    steps = [b - a for a, b in itertools.pairwise(seen)]
    assert min(steps[:peak]) > 0 > max(steps[peak:])
    assert max(rates(Recipe(epochs=10, scheduler="onecycle", lr=0.3), 5)) == 0.3


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
def test_the_shortest_runs_have_a_schedule(scheduler: str) -> None:
    for epochs, batches in (*((n, 1) for n in range(1, 15)), *((1, n) for n in range(2, 15))):
        assert all(
            0 < rate <= 0.1 + 1e-12 for rate in rates(Recipe(epochs=epochs, scheduler=scheduler), batches)
        )


def test_cosine_rises_to_its_peak_and_falls_to_nothing() -> None:
    seen = rates(Recipe(epochs=10, scheduler="cosine", warmup_epochs=2, lr=0.4), 5)
    assert seen[:10] == pytest.approx([0.04 * step for step in range(1, 11)])
    assert seen[10] == pytest.approx(0.4)
    assert seen[30] == pytest.approx(0.2)  # half-way through the 40 batches of the fall
    assert seen[49] == pytest.approx(0.4 * (1 + math.cos(math.pi * 39 / 40)) / 2)
    assert min(seen) > 0


def test_cosine_without_warm_up_is_torchs() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=18)
    for rate in rates(Recipe(epochs=6, scheduler="cosine"), 3):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_the_optimizer_is_the_references() -> None:
    optimizer = Recipe().build_optimizer(nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups  # the bias decays too, as in the reference
    chosen = [group[key] for key in ("lr", "momentum", "weight_decay", "nesterov", "dampening")]
    assert chosen == [0.1, 0.9, 5e-4, True, 0]
    assert Recipe(momentum=0.0).build_optimizer(nn.Linear(2, 2)).param_groups[0]["nesterov"] is False


def test_weight_decay_can_leave_out_vectors() -> None:
    model = build_model("resnet20")
    decayed, spared = Recipe(decay_bn=False).build_optimizer(model).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    assert all(value.ndim > 1 for value in decayed["params"])
    names = {name for name, value in model.named_parameters() if any(value is p for p in spared["params"])}
    assert "fc.bias" in names and "bn1.weight" in names and "layer1.0.bn2.bias" in names
    assert not any("conv" in name for name in names)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_the_loss_is_cross_entropy_in_nats_with_soft_targets_where_smoothed() -> None:
    loss = Recipe().build_criterion()(torch.zeros(4, 100), torch.arange(4))
    assert loss.item() == pytest.approx(math.log(100), rel=1e-6)
    logits, labels = torch.randn(5, 100), torch.arange(5)
    soft = F.one_hot(labels, 100) * 0.9 + 0.1 / 100
    smoothed = Recipe(label_smoothing=0.1).build_criterion()(logits, labels)
    torch.testing.assert_close(smoothed, -(soft * logits.log_softmax(1)).sum(1).mean())


# ---- notes ----


def test_the_data_note_never_lets_synthetic_pass_for_cifar() -> None:
    assert Recipe().data_note == "CIFAR-100"
    assert "synthetic" in Recipe(dataset="synthetic").data_note
    note = Recipe(limit_train=1000, limit_test=500, val_split=200).data_note
    assert "1,000 training images only" in note and "500 test images only" in note
    assert "200 held out" in note


def test_the_schedule_and_the_techniques_are_named() -> None:
    assert Recipe(epochs=100).schedule_note == "learning rate 0.1, x 0.2 after 40, 70, 85"
    assert Recipe(epochs=1).schedule_note == "learning rate 0.1"
    assert "0.3" in Recipe(scheduler="onecycle", max_lr=0.3).schedule_note
    assert Recipe(lr=0.3, augment="none").non_default_notes == []
    assert Recipe(decay_bn=False, image_sizes=(24, 32)).non_default_notes == [
        "decay-bn False",
        "image-sizes 24 32",
    ]


@pytest.mark.parametrize(
    ("values", "metric"),
    [({}, "test"), ({"val_split": 9}, "val"), ({"val_split": 9, "swa_start": 1}, "ema_val")],
)
def test_the_best_epoch_is_chosen_on_held_out_images_if_there_are_any(values: dict, metric: str) -> None:
    recipe = Recipe(**values)
    assert (recipe.selection_metric, recipe.selection_split) == (metric, metric.removeprefix("ema_"))


# ---- stored and read again ----


def test_a_stored_recipe_without_a_newer_field_takes_its_default() -> None:
    assert Recipe.from_dict({"model": "resnet56", "epochs": 20, "lr": 0.3}) == Recipe(lr=0.3)
    assert Recipe.from_dict({"teacher": "a.pth"}) == Recipe(teacher=("a.pth",))


@pytest.mark.parametrize("name", ["warm_up", 3, None, "a\nb", "x" * 5000, ("t", 1)])
def test_an_unknown_field_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match="unknown recipe field") as caught:
        Recipe.from_dict(Recipe().to_dict() | {name: 1})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(VALUES)), any_value, max_size=4))
def test_any_stored_values_make_a_recipe_or_a_usage_error(stored: dict[str, Any]) -> None:
    try:
        recipe = Recipe.from_dict(stored)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
