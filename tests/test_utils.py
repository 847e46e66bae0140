"""Loaders: the order of images, independent and reproducible draws, ranks, resuming, normalisation.

The LR finder: its suggestion for each kind of curve; it leaves everything else unchanged.
"""

import copy
import itertools
import json
import math
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, get_worker_info

import utils
from cifar.dataset import Split
from core.errors import RunError, UsageError
from training.recipe import Recipe
from utils import DEFAULT_LR, VALLEY, LRFinderResult, find_lr, suggest_lr

COUNT, BATCH = 70, 16  # five batches, the last one of six


@pytest.fixture(scope="module")
def split() -> Split:
    """70 random images without a black pixel; the label is the image's number."""
    images = np.random.default_rng(0).integers(1, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    return Split(images=images, labels=np.arange(COUNT, dtype=np.int64))


@pytest.fixture(scope="module")
def one_image() -> Split:
    """96 times the same image, so that two equal results mean two equal sets of draws."""
    image = np.random.default_rng(1).integers(1, 256, (1, 32, 32, 3), dtype=np.uint8)
    return Split(images=np.repeat(image, 96, axis=0), labels=np.arange(96, dtype=np.int64))


def make(split: Split, **settings):
    """A loader with this file's batch size, seed 3."""
    return utils.make_train_loader(split, **({"batch_size": BATCH, "seed": 3} | settings))


def epoch_of(loader, epoch: int, start_batch: int = 0) -> list[tuple[bytes, list[int]]]:
    """Each batch of one epoch as its images' bytes and its labels."""
    loader.batch_sampler.set_epoch(epoch, start_batch=start_batch)
    return [(images.numpy().tobytes(), labels.tolist()) for images, labels in loader]


def joined(lists) -> list:
    """The lists' items in one list."""
    return list(itertools.chain.from_iterable(lists))


# Form


def test_batches_have_the_promised_form(split):
    batches = list(make(split, augment="none"))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 16, 6]
    for images, labels in batches:
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 32, 32, 3)
        assert labels.dtype == torch.int64 and images.is_contiguous()
        np.testing.assert_array_equal(images.numpy(), split.images[labels.numpy()])


def random_states() -> tuple:
    """The states of the global generators of Python, NumPy and torch."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_iterating_changes_neither_the_split_nor_the_global_random_states(split):
    images, states = split.images.copy(), random_states()
    list(make(split))
    assert random_states() == states and (split.images == images).all()


# Order


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own(split):
    loader = make(split, augment="none")
    orders = [joined(labels for _, labels in epoch_of(loader, epoch)) for epoch in (1, 2, 3)]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_seed_and_epoch_do_not_collide(one_image):
    pairs = [(1, 2), (2, 1), (3, 0), (0, 3), (1, 1), (0, 0), (1, 0), (0, 1), (1 << 32, 1), (1 << 32, 0)]
    orders, images = set(), set()
    for seed, epoch in pairs:
        ((pixels, labels), *_) = epoch_of(make(one_image, seed=seed), epoch)
        orders.add(tuple(labels))
        images.add(pixels)
    assert len(orders) == len(images) == len(pairs)


def test_an_epoch_resumes_with_the_identical_tail(split):
    whole = epoch_of(make(split), 4)
    for start in range(6):
        loader = make(split)  # a fresh one, as after a restart
        assert epoch_of(loader, 4, start) == whole[start:]
        assert len(loader) == 5 - start
    loader = make(split)
    epoch_of(loader, 4, 3)
    assert epoch_of(loader, 5) == epoch_of(make(split), 5)  # the start holds for one epoch


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (1, -1), (1, 6)])
def test_impossible_positions_are_refused(split, epoch, start):
    with pytest.raises(UsageError, match="batches 0 to 4"):
        make(split).batch_sampler.set_epoch(epoch, start_batch=start)


# Draws


def test_draws_differ_within_and_between_batches_epochs_seeds_and_ranks(one_image):
    """Of 96 images about 6 get no transform at all and a few a flip alone; all others must differ."""
    two = {"world_size": 2}
    settings = ({}, 1), ({}, 2), ({"seed": 4}, 1), ({**two, "rank": 0}, 1), ({**two, "rank": 1}, 1)
    runs = []
    for options, epoch in settings:
        loader = make(one_image, **options)
        loader.batch_sampler.set_epoch(epoch)
        runs.append([image.numpy().tobytes() for images, _ in loader for image in images])
    plain = one_image.images[0]
    ordinary = {plain.tobytes(), plain[:, ::-1].tobytes()}
    # Rank 0 of two shares its stream's start with rank 0 of one: the same seed, epoch, batch and rank.
    separate = [run for number, run in enumerate(runs) if number != 3]
    for results in (joined(separate), joined(runs[3:])):
        augmented = [result for result in results if result not in ordinary]
        assert len(augmented) > 0.8 * len(results)
        assert len(set(augmented)) > 0.95 * len(augmented)  # holes alone can coincide: 17 x 17 places


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("context", "counts"), [("fork", (1, 3)), ("spawn", (2,))])
def test_workers_do_not_change_a_byte(one_image, context, counts):
    positions = [(1, 0), (2, 0), (3, 2)]  # epoch, first batch
    alone = make(one_image)
    expected = [epoch_of(alone, *position) for position in positions]
    for workers in counts:
        loader = make(one_image, workers=workers, multiprocessing_context=context)
        assert [epoch_of(loader, *position) for position in positions] == expected


# Ranks


@pytest.mark.parametrize(("world_size", "last"), [(2, [3, 3]), (4, [1, 2, 1, 2])])
def test_ranks_divide_each_global_batch(split, world_size, last):
    whole = epoch_of(make(split, augment="none"), 2)
    parts = [
        epoch_of(make(split, augment="none", rank=rank, world_size=world_size), 2)
        for rank in range(world_size)
    ]
    for number, (_, labels) in enumerate(whole):
        assert joined(part[number][1] for part in parts) == labels
        sizes = [len(part[number][1]) for part in parts]
        assert sizes == ([BATCH // world_size] * world_size if number < 4 else last)


def test_a_last_batch_too_small_for_the_ranks_is_dropped_on_all(split):
    for rank in range(8):  # the last batch has six images
        loader = make(split, rank=rank, world_size=8)
        assert len(loader) == len(epoch_of(loader, 1)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world_size": 3}, "16 does not divide by 3"),
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": 128, "world_size": 128}, "70 training images are too few"),
        ({"seed": -1}, "seed"),
        ({"workers": -1}, "workers"),
        ({"augment": "cutout"}, "unknown augmentation 'cutout'"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(split, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        make(split, **settings)
    assert "\n" not in str(caught.value)


# Workers


class Report(utils.TrainDataset):
    """A dataset whose batches describe the worker: number, process, whether it ignores Ctrl-C, threads."""

    def __getitems__(self, request):
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        numbers = [get_worker_info().id, os.getpid(), ignored, cv2.getNumThreads()]
        return torch.tensor(numbers), torch.from_numpy(request.indices)


def test_workers_persist_ignore_ctrl_c_and_keep_to_one_thread(split):
    loader = make(split, workers=2, multiprocessing_context="fork")
    loader.dataset.__class__ = Report
    cv2.setNumThreads(2)  # a started worker does not inherit this file's setting
    seen = []
    for epoch in (1, 2):
        loader.batch_sampler.set_epoch(epoch)
        seen.append({tuple(report.tolist()) for report, _ in loader})
    cv2.setNumThreads(0)
    assert seen[0] == seen[1] and len(seen[0]) == 2  # the same two processes in both epochs
    assert {(ignored, threads) for _, _, ignored, threads in seen[0]} == {(True, 1)}


# Normalisation and test batches


@pytest.mark.parametrize("shape", [(70, 32, 32, 3), (1, 32, 32, 3), (0, 32, 32, 3), (2, 24, 28, 3)])
def test_normalisation_equals_albumentations(shape):
    library = A.Normalize(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.array([library(image=image)["image"] for image in images]).reshape(shape)
    found = utils.normalize(torch.from_numpy(images))
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_test_batches_are_the_split_in_order_normalised_once(split):
    batches = utils.make_test_batches(split, 32, torch.device("cpu"))
    assert [len(labels) for _, labels in batches] == [32, 32, 6]
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)
    assert torch.cat([labels for _, labels in batches]).tolist() == split.labels.tolist()
    whole = utils.normalize(torch.from_numpy(split.images))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), whole)
    batches[0][1].fill_(-1)  # a copy: the split's labels stay
    assert split.labels.min() == 0


# The LR finder's suggestions

STORED = Path(__file__).resolve().parent / "expected" / "lr_range_test.json"
RATES = np.logspace(-4, 0, 200)
EXPONENT = np.log10(RATES)


def fall(at: float, depth: float = 1.0, width: float = 0.1) -> np.ndarray:
    """A loss that falls by `depth` around the rate 10 ** at."""
    return -depth / (1 + np.exp(-(EXPONENT - at) / width))


def rise(at: float) -> np.ndarray:
    """A loss that rises beyond the rate 10 ** at, faster and faster."""
    return 3 * np.maximum(0, EXPONENT - at) ** 2


def tenth_of_minimum(losses: np.ndarray) -> float:
    """A tenth of the highest rate at which a curve without noise is nearly minimal."""
    return RATES[losses <= losses.min() + VALLEY * (losses[0] - losses.min())].max() / 10


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_it_suggests_the_mean_of_steepest_descent_and_a_tenth_of_the_minimum(
    rate: float, noise: float
) -> None:
    losses = 4.6 + fall(math.log10(rate)) + rise(-0.3)
    suggested, method = suggest_lr(RATES, losses + np.random.default_rng(0).normal(0, noise, 200))
    assert method == "mean of steepest descent and minimum / 10"
    expected = math.sqrt(rate * tenth_of_minimum(losses))
    assert suggested == pytest.approx(expected, rel=0.1 if noise == 0 else 0.3)


def test_batch_noise_hardly_moves_the_suggestion_where_the_loss_falls_little() -> None:
    """The mean curve and the noise of an untrained ResNet-56's range test on CIFAR-100."""
    exponents, losses = [-4, -1.2, -1, -0.7, -0.17, 0], [4.61, 4.6, 4.58, 4.5, 4.395, 4.44]
    mean, deviation = np.interp(EXPONENT, exponents, losses), np.interp(EXPONENT, [-4, 0], [0.01, 0.06])
    draws = np.random.default_rng(0).normal(mean, deviation, (100, 200))
    suggested = sorted(suggest_lr(RATES, draw)[0] for draw in draws)
    assert 0.08 < suggested[5] < suggested[94] < 0.16


def test_of_two_rules_the_one_within_bounds_counts() -> None:
    losses = 4.6 + fall(-3) + fall(-1, depth=0.3, width=0.4) + rise(math.log10(0.5))
    suggested, method = suggest_lr(RATES, losses)
    assert (suggested, method) == (pytest.approx(tenth_of_minimum(losses), rel=0.15), "minimum / 10")
    assert losses[-1] > losses.min() + VALLEY * (losses[0] - losses.min())  # it rose again before the end
    suggested, method = suggest_lr(RATES, 4.6 + fall(-1.9, width=0.05) + rise(-1.6))
    assert (suggested, method) == (pytest.approx(10**-1.9, rel=0.15), "steepest descent")


def test_if_both_are_out_of_bounds_it_suggests_the_default_and_says_so() -> None:
    suggested, method = suggest_lr(RATES, 4.6 + fall(-3) + rise(-2.5))
    assert suggested == DEFAULT_LR == 0.1
    assert method.startswith("the default: 9.7e-04 and") and "outside 0.01 to 0.3" in method


def test_a_loss_that_never_fell_or_is_not_finite_suggests_the_default() -> None:
    for losses in (4.6 + 0 * RATES, 4.6 + rise(-4), 4.6 + fall(-1, depth=0.05), 4.6 + EXPONENT):
        assert suggest_lr(RATES, losses) == (DEFAULT_LR, "the default: the loss never fell")
    for bad in (math.nan, math.inf):
        for losses in ([bad] * 200, [4.6, 4.5, bad] + [4.0] * 197, [], [4.6] * 9):
            suggested, method = suggest_lr(RATES[: len(losses)], losses)
            assert suggested == DEFAULT_LR and "NaN" in method


def test_a_range_test_on_cifar100_suggests_the_references_rate() -> None:
    stored = json.loads(STORED.read_text("utf-8"))
    suggested, method = suggest_lr(stored["learning_rates"], stored["losses"])
    assert (method, f"{suggested:.2e}") == ("minimum / 10", "1.00e-01")


# The range test


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(8 * 8 * 8, 10))


def loader_of(workers: int = 0, count: int = 40, **ranks: int) -> DataLoader:
    draws = np.random.default_rng(0)
    split = Split(draws.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10)
    return make(split, workers=workers, **ranks)


def run_finder(model: nn.Module, loader: DataLoader, **options: object) -> LRFinderResult:
    recipe = Recipe(lr=0.05)
    options = {"criterion": recipe.build_criterion(), "iterations": 30, **options}
    return find_lr(model, build_optimizer=recipe.build_optimizer, loader=loader, **options)


class OutOfMemory(nn.Flatten):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsecond line")


def test_out_of_memory_in_the_finder_is_one_line() -> None:
    message = "out of memory: pass a smaller --batch-size, or --lr to skip the LR finder"
    with pytest.raises(RunError, match=f"^{message}$"):
        run_finder(small_net().append(OutOfMemory()), loader_of())


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


def test_rates_rise_exponentially_from_1e_4_to_1(capsys: pytest.CaptureFixture) -> None:
    found = run_finder(small_net(), loader_of(), iterations=40)
    count = len(found.learning_rates)  # it stops early where the loss explodes
    assert count > 20
    assert found.learning_rates == pytest.approx(np.logspace(-4, 0, 40)[:count].tolist(), rel=1e-6)
    assert len(found.losses) == len(found.smoothed) == count
    assert (found.suggested_lr, found.method) == suggest_lr(found.learning_rates, found.losses)
    for words in (f"{found.suggested_lr:.2e}", found.method, "(lowest)", "for rates 1e-04 to "):
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
    seen, loader = [], loader_of(count=count)

    def criterion(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels.tolist())
        return nn.functional.cross_entropy(logits, labels)

    run_finder(small_net(), loader, criterion=criterion, iterations=6)
    assert [len(labels) for labels in seen] == [size] * 6
    loader.batch_sampler.set_epoch(0)
    epoch = [labels.tolist() for _, labels in loader]
    full = [labels for labels in epoch if len(labels) == size]
    assert seen == [full[number % len(full)] for number in range(6)]
    loader.batch_sampler.set_epoch(1)
    assert len(loader) == math.ceil(count / 16)  # training has the ragged batch too


def test_it_runs_at_the_runs_precision() -> None:
    precisions = "fp32", "bf16", "fp16"
    fp32, *others = (
        run_finder(small_net(), loader_of(), precision=p, end_lr=1e-3).losses for p in precisions
    )
    for losses in others:
        assert losses != fp32
        assert losses == pytest.approx(fp32, rel=0.02)


def test_a_network_with_nan_weights_gives_the_default_without_numeric_warnings() -> None:
    model = small_net()
    model[5].bias.data.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run_finder(model, loader_of())
        summary = found.summary
    assert found.suggested_lr == DEFAULT_LR and "NaN" in found.method
    assert "NaN" in summary and summary.count("\n") == 1


def test_it_stops_where_the_loss_explodes_and_works_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    found = run_finder(small_net(), loader_of(), end_lr=1e6, iterations=60)
    assert len(found.losses) < 60
    assert 0.01 <= found.suggested_lr <= 0.3


# ---- workers that fail ----


@pytest.mark.parametrize(
    ("free_mib", "batch_mib", "workers", "prefetch"),
    [(1000, 1, 4, 4), (64, 12, 4, 0), (64, 4, 4, 2), (64, 4, 1, 4), (0, 1, 1, 0)],
)
def test_fewer_batches_are_prefetched_where_shared_memory_is_short(
    monkeypatch, free_mib, batch_mib, workers, prefetch
):
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_mib << 20))
    assert utils.choose_prefetch(workers, batch_mib << 20) == prefetch


def test_without_room_for_a_batch_the_training_process_makes_them(split, monkeypatch) -> None:
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert make(split, workers=2).num_workers == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker must inherit the fault")
def test_a_worker_that_cannot_share_a_batch_is_an_error_not_a_wait(split, monkeypatch) -> None:
    def fail(tensor: torch.Tensor) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(RuntimeError) as caught:
        next(iter(make(split, workers=1, multiprocessing_context="fork")))
    error = utils.worker_error(caught.value)
    assert "/dev/shm" in str(error) and "--workers 0" in str(error) and "\n" not in str(error)
    assert utils.worker_error(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert utils.worker_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
