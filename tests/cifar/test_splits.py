"""Subsets and hold-outs: balanced, in order, from the seed alone."""

import numpy as np
import pytest

from cifar.dataset import Split, balanced_subset, train_val_split
from core.errors import UsageError


def numbered(sizes: dict[int, int]) -> Split:
    """A split with these class sizes, shuffled; image i holds i in its first two bytes."""
    labels = np.random.default_rng(5).permutation(np.repeat(list(sizes), list(sizes.values())))
    images = np.zeros((len(labels), 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(len(labels)), 256)
    return Split(images, labels)


def numbers(split: Split) -> list[int]:
    return (split.images[:, 0, 0, 0].astype(int) * 256 + split.images[:, 0, 0, 1]).tolist()


def counts(split: Split) -> list[int]:
    return np.bincount(split.labels).tolist()


EVEN = numbered(dict.fromkeys(range(10), 30))


@pytest.mark.parametrize("count", [1, 9, 10, 55, 100, 299, 300])
def test_subset_is_balanced_in_order_and_pairs_stay_together(count):
    subset = balanced_subset(EVEN, count, seed=3)
    assert len(subset) == len(subset.images) == count
    per_class = np.bincount(subset.labels, minlength=10)
    assert per_class.max() - per_class.min() <= (0 if count % 10 == 0 else 1)
    chosen = numbers(subset)
    assert chosen == sorted(set(chosen))
    assert subset.labels.tolist() == EVEN.labels[chosen].tolist()
    assert subset.images.flags.c_contiguous


def test_subset_depends_on_the_seed_alone_and_nests():
    first = numbers(balanced_subset(EVEN, 50, seed=3))
    assert first == numbers(balanced_subset(EVEN, 50, seed=3))
    assert first != numbers(balanced_subset(EVEN, 50, seed=4))
    assert set(first) < set(numbers(balanced_subset(EVEN, 100, seed=3)))
    extra = {tuple(counts(balanced_subset(EVEN, 55, seed))) for seed in range(5)}
    assert len(extra) > 1, "the remainder should not always go to the same classes"


def test_small_class_gives_its_share_to_the_others():
    uneven = numbered({0: 2, 1: 50, 2: 50, 3: 5})
    assert counts(balanced_subset(uneven, 87, seed=0)) == [2, 40, 40, 5]
    assert counts(balanced_subset(uneven, 107, seed=0)) == [2, 50, 50, 5]


def test_validation_hold_out_takes_each_image_once():
    train, held_out = train_val_split(EVEN, 50, seed=3)
    assert counts(held_out) == [5] * 10 and counts(train) == [25] * 10
    assert sorted(numbers(train) + numbers(held_out)) == list(range(300))
    assert numbers(train) == sorted(numbers(train))
    assert train.labels.tolist() == EVEN.labels[numbers(train)].tolist()


@pytest.mark.parametrize("count", [0, -1, 301])
def test_impossible_count_is_a_usage_error(count):
    with pytest.raises(UsageError, match=f"cannot take {count} of 300 images"):
        balanced_subset(EVEN, count, seed=0)
    with pytest.raises(UsageError):
        train_val_split(EVEN, count, seed=0)


def test_holding_out_all_is_a_usage_error():
    with pytest.raises(UsageError, match="leaves none"):
        train_val_split(EVEN, 300, seed=0)
