"""The LR finder: its suggestion for each kind of curve; it leaves everything else unchanged."""

import copy
import json
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cifar.dataset import Split
from training.engine import TrainStep
from training.recipe import Recipe
from utils import DEFAULT_LR, VALLEY, find_lr, make_train_loader, smooth, suggest_lr

STORED = Path(__file__).resolve().parent / "expected" / "lr_range_test.json"
RATES = np.logspace(-4, 0, 200)
EXPONENT = np.log10(RATES)


def fall(at: float, depth: float = 1.0, width: float = 0.1) -> np.ndarray:
    """A loss that falls by `depth` around the rate 10 ** at."""
    return -depth / (1 + np.exp(-(EXPONENT - at) / width))


def rise(at: float) -> np.ndarray:
    """A loss that rises beyond the rate 10 ** at, faster and faster."""
    return 3 * np.maximum(0, EXPONENT - at) ** 2


# ---- suggestions ----


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_it_suggests_the_steepest_descent(rate: float, noise: float) -> None:
    losses = 4.6 + fall(math.log10(rate)) + rise(-0.3) + np.random.default_rng(0).normal(0, noise, 200)
    suggested, method = suggest_lr(RATES, losses)
    assert method.startswith("steepest")
    assert suggested == pytest.approx(rate, rel=0.05 if noise == 0 else 0.3)


def test_it_falls_back_on_a_tenth_of_the_highest_rate_with_the_lowest_loss() -> None:
    losses = 4.6 + fall(-3) + fall(-1, depth=0.3, width=0.4) + rise(math.log10(0.5))
    suggested, method = suggest_lr(RATES, losses)
    as_good_as_lowest = losses <= losses.min() + VALLEY * (losses[0] - losses.min())
    assert method.startswith("fallback")
    assert suggested == pytest.approx(RATES[as_good_as_lowest].max() / 10, rel=0.15)
    assert not as_good_as_lowest[-1]  # the loss rose again before the end


def test_if_both_are_out_of_bounds_it_suggests_the_default_and_says_so() -> None:
    suggested, method = suggest_lr(RATES, 4.6 + fall(-3) + rise(-2.5))
    assert suggested == DEFAULT_LR == 0.1
    assert method.startswith("the default: 1.0e-03 and") and "outside 0.01 to 0.3" in method


def test_a_loss_that_never_fell_or_is_not_finite_suggests_the_default() -> None:
    for losses in (4.6 + 0 * RATES, 4.6 + rise(-4), 4.6 + fall(-1, depth=0.05), 4.6 + EXPONENT):
        assert suggest_lr(RATES, losses) == (DEFAULT_LR, "the default: the loss never fell")
    for bad in (math.nan, math.inf):
        for losses in ([bad] * 200, [4.6, 4.5, bad] + [4.0] * 197, [], [4.6] * 9):
            suggested, method = suggest_lr(RATES[: len(losses)], losses)
            assert suggested == DEFAULT_LR and "NaN" in method


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_comes_after_an_explosion_changes_nothing(bad: float) -> None:
    losses = 4.6 + fall(math.log10(0.05)) + rise(-0.5)
    expected, _ = suggest_lr(RATES, losses)
    losses[190:] = bad
    suggested, method = suggest_lr(RATES, losses)
    assert suggested == pytest.approx(expected, rel=0.05) and method.startswith("steepest")


def test_a_range_test_on_cifar100_suggests_the_references_rate() -> None:
    stored = json.loads(STORED.read_text("utf-8"))
    suggested, method = suggest_lr(stored["learning_rates"], stored["losses"])
    assert method.startswith("fallback")
    assert f"{suggested:.2e}" == "1.00e-01"


def test_smoothing_keeps_a_straight_line_and_reduces_noise() -> None:
    line = np.linspace(1, 3, 200)
    np.testing.assert_allclose(smooth(line)[20:-20], line[20:-20], rtol=1e-9)
    noise = np.random.default_rng(0).normal(0, 1, 200)
    assert smooth(noise).std() < 0.4 * noise.std()
    assert smooth([]).tolist() == [] and smooth([2.0]).tolist() == [2.0]


# ---- the range test itself ----


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(8 * 8 * 8, 10))


def loader_of(workers: int = 0, count: int = 40, **ranks: int) -> torch.utils.data.DataLoader:
    draws = np.random.default_rng(0)
    split = Split(draws.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10)
    return make_train_loader(split, batch_size=16, seed=3, workers=workers, **ranks)


class RecordedBatches(nn.Module):
    """Cross-entropy that keeps the labels of each batch in `labels`."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[list[int]] = []

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.labels.append(labels.tolist())
        return nn.functional.cross_entropy(logits, labels)


def run_finder(model: nn.Module, loader: object, recipe: Recipe | None = None, **options: object) -> object:
    recipe = recipe or Recipe()
    options = {"iterations": 30, **options}
    return find_lr(model, recipe.build_criterion(), recipe.build_optimizer, loader, **options)


def random_states() -> tuple:
    keys = np.random.get_state()
    return random.getstate(), keys[1].tolist(), keys[2:], torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_network_random_states_and_loader_are_unchanged(workers: int) -> None:
    model, loader = small_net().to(memory_format=torch.channels_last), loader_of(workers)
    before, states = copy.deepcopy(model.state_dict()), random_states()
    found = run_finder(model, loader)
    assert random_states() == states
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (loader.batch_sampler.epoch, loader.batch_sampler.start_batch) == (1, 0)
    for (images, labels), (fresh, fresh_labels) in zip(loader, loader_of(), strict=True):
        assert torch.equal(images, fresh) and torch.equal(labels, fresh_labels)
    assert min(found.losses) != max(found.losses)  # it did train something


def test_training_after_it_is_training_without_it() -> None:
    weights = []
    for finder in (False, True):
        model, loader, recipe = small_net(), loader_of(), Recipe(lr=0.05)
        torch.manual_seed(7)  # dropout draws
        if finder:
            run_finder(model, loader, recipe)
        optimizer = recipe.build_optimizer(model)
        step = TrainStep(model, recipe.build_criterion(), optimizer, recipe.build_scheduler(optimizer, 3))
        for images, labels in loader:
            step(images, labels)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_rates_rise_exponentially_from_1e_4_to_1(capsys: pytest.CaptureFixture) -> None:
    found = run_finder(small_net(), loader_of(), iterations=40)
    count = len(found.learning_rates)  # it stops early where the loss explodes
    assert count > 20
    assert found.learning_rates == pytest.approx(np.logspace(-4, 0, 40)[:count].tolist(), rel=1e-6)
    assert len(found.losses) == len(found.smoothed) == count
    assert (found.suggested_lr, found.method) == suggest_lr(found.learning_rates, found.losses)
    for words in (f"{found.suggested_lr:.2e}", found.method, "(lowest)", "over learning rates 1e-04 to "):
        assert words in found.summary
    whole = run_finder(small_net(), loader_of(), iterations=25, start_lr=1e-5, end_lr=1e-3)
    assert whole.learning_rates == pytest.approx(np.logspace(-5, -3, 25).tolist(), rel=1e-6)
    assert capsys.readouterr() == ("", "")  # no bar without a terminal, none of the library's remarks


@pytest.mark.parametrize("workers", [0, 2])
def test_with_several_processes_it_finds_what_one_process_finds(workers: int) -> None:
    loader = loader_of(workers, rank=0, world_size=2)
    assert run_finder(small_net(), loader) == run_finder(small_net(), loader_of())
    assert [len(labels) for _, labels in loader] == [8, 8, 4]  # training still gets this rank's part


@pytest.mark.parametrize(("count", "size"), [(40, 16), (32, 16), (17, 16), (15, 15), (1000, 16)])
def test_it_uses_full_batches_where_there_are_any(count: int, size: int) -> None:
    criterion, loader = RecordedBatches(), loader_of(count=count)
    find_lr(small_net(), criterion, Recipe().build_optimizer, loader, iterations=6)
    assert [len(labels) for labels in criterion.labels] == [size] * 6
    loader.batch_sampler.set_epoch(0)
    epoch = [labels.tolist() for _, labels in loader]
    full = [labels for labels in epoch if len(labels) == size]
    assert criterion.labels == [full[number % len(full)] for number in range(6)]
    loader.batch_sampler.set_epoch(1)
    assert len(loader) == math.ceil(count / 16)  # training has the ragged batch too


def test_it_runs_at_the_runs_precision() -> None:
    losses = [run_finder(small_net(), loader_of(), precision=p, end_lr=1e-3).losses for p in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_network_with_nan_weights_gives_the_default_without_numeric_warnings() -> None:
    model = small_net()
    model[5].bias.data.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run_finder(model, loader_of())
        summary = found.summary
    assert found.suggested_lr == DEFAULT_LR and "NaN" in found.method
    assert "NaN" in summary and "\n" not in summary


def test_it_stops_where_the_loss_explodes_and_works_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    found = run_finder(small_net(), loader_of(), end_lr=1e6, iterations=60)
    assert len(found.losses) < 60
    assert 0.01 <= found.suggested_lr <= 0.3
