"""Loaders: the order of images, independent and repeatable draws, ranks, resuming, normalisation."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

import utils
from cifar.dataset import CIFAR100_MEAN, CIFAR100_STD, Split
from core.errors import UsageError

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


def draws(loader, epoch: int) -> list[bytes]:
    """Each augmented image of one epoch."""
    loader.batch_sampler.set_epoch(epoch)
    return [image.numpy().tobytes() for images, _ in loader for image in images]


def joined(lists) -> list:
    """The lists' items in one list."""
    return list(itertools.chain.from_iterable(lists))


# Form


def test_batches_have_the_promised_form(split):
    loader = make(split, augment="none")
    loader.batch_sampler.set_epoch(1)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 16, 6] and len(loader) == 5
    for images, labels in batches:
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 32, 32, 3)
        assert labels.dtype == torch.int64 and images.is_contiguous()
        np.testing.assert_array_equal(images.numpy(), split.images[labels.numpy()])


def test_the_split_is_not_written_to(split):
    before = split.images.copy()
    list(make(split))
    np.testing.assert_array_equal(split.images, before)


def test_iterating_leaves_the_global_random_state(split):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    list(make(split))
    assert state() == before


# Order


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own(split):
    loader = make(split, augment="none")
    orders = [joined(labels for _, labels in epoch_of(loader, epoch)) for epoch in (1, 2, 3)]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_seed_and_epoch_do_not_run_into_each_other(one_image):
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
    runs = [
        draws(make(one_image), 1),
        draws(make(one_image), 2),
        draws(make(one_image, seed=4), 1),
        draws(make(one_image, rank=0, world_size=2), 1),
        draws(make(one_image, rank=1, world_size=2), 1),
    ]
    plain = one_image.images[0]
    ordinary = {plain.tobytes(), plain[:, ::-1].tobytes()}
    # Rank 0 of two shares its stream's start with rank 0 of one: the same seed, epoch, batch and rank.
    separate = [run for number, run in enumerate(runs) if number != 3]
    for results in (joined(separate), joined(runs[3:])):
        augmented = [result for result in results if result not in ordinary]
        assert len(augmented) > 0.8 * len(results)
        assert len(set(augmented)) > 0.95 * len(augmented)  # holes alone can coincide: 17 x 17 places


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("context", "counts"), [("fork", (1, 3)), ("spawn", (3,))])
def test_workers_do_not_change_a_byte(one_image, context, counts):
    alone = make(one_image)
    expected = {epoch: epoch_of(alone, epoch) for epoch in (1, 2)}
    expected_tail = epoch_of(alone, 3, 2)
    for workers in counts:
        loader = make(one_image, workers=workers, multiprocessing_context=context)
        assert epoch_of(loader, 1) == expected[1]
        assert epoch_of(loader, 2) == expected[2]
        assert epoch_of(loader, 3, 2) == expected_tail


# Ranks


@pytest.mark.parametrize(("world_size", "last"), [(2, [3, 3]), (4, [1, 2, 1, 2])])
def test_ranks_share_out_each_global_batch(split, world_size, last):
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
    loaders = [make(split, rank=rank, world_size=8) for rank in range(8)]
    assert [len(loader) for loader in loaders] == [4] * 8  # six images do not suffice for eight ranks
    assert [len(epoch_of(loader, 1)) for loader in loaders] == [4] * 8


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
    """A dataset that tells its worker's number, process and reaction to Ctrl-C in place of a batch."""

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


def test_workers_end_when_the_training_process_is_killed(tmp_path):
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(utils.__file__).parent)!r})
import numpy as np
from cifar.dataset import Split
from utils import make_train_loader
split = Split(images=np.zeros((64, 32, 32, 3), np.uint8), labels=np.arange(64))
loader = make_train_loader(split, batch_size=4, seed=0, workers=1, multiprocessing_context="fork")
batches = iter(loader)
next(batches)
print(batches._workers[0].pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    worker = int(parent.stdout.readline())
    assert is_running(worker)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20  # torch's workers look for their parent every 5 s
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.stdout.close()
    assert not is_running(worker)


def is_running(process: int) -> bool:
    """Whether the process exists and is not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Normalisation and test batches


def test_normalisation_equals_albumentations(split):
    assert CIFAR100_MEAN == (0.5071, 0.4867, 0.4408) and CIFAR100_STD == (0.2675, 0.2565, 0.2761)
    library = A.Normalize(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
    expected = np.stack([library(image=image)["image"] for image in split.images]).transpose(0, 3, 1, 2)
    found = utils.normalize(torch.from_numpy(split.images))
    assert found.dtype == torch.float32 and found.shape == (COUNT, 3, 32, 32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (0, 32, 32, 3), (2, 24, 28, 3)])
def test_normalisation_of_other_shapes(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(CIFAR100_MEAN), torch.tensor(CIFAR100_STD)
    expected = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(utils.normalize(images), expected, atol=1e-5, rtol=0)


def test_test_batches_are_the_split_in_order_normalised_once(split):
    batches = utils.make_test_batches(split, 32, torch.device("cpu"))
    assert [len(labels) for _, labels in batches] == [32, 32, 6]
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)
    assert torch.cat([labels for _, labels in batches]).tolist() == split.labels.tolist()
    whole = utils.normalize(torch.from_numpy(split.images))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), whole)
    batches[0][1].fill_(-1)  # a copy: the split's labels stay
    assert split.labels.min() == 0
