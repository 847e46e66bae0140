"""The synthetic images: the same bytes everywhere, balanced, varied, and named synthetic."""

import hashlib

import numpy as np
import pytest

from cifar import synthetic
from cifar.dataset import load_dataset

# Pinned: results on these images are comparable between versions only while they stay the same.
SHA256 = {
    "train": "b5cbc9af2a589aa3c4edc843180871d76182ae85b65e0e60ebb7d31d64d8f0f6",
    "test": "94b240ee4c74f9737302bf8631d434979394b5bb101c9935cbde0bdabf585782",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data = load_dataset("synthetic", folder)
    assert list(folder.iterdir()) == []
    return data


def test_bytes_sizes_types_and_balance(data):
    for name, per_class in (("train", 100), ("test", 20)):
        split = getattr(data, name)
        assert hashlib.sha256(split.images.tobytes()).hexdigest() == SHA256[name]
        assert split.images.shape == (100 * per_class, 32, 32, 3)
        assert split.images.dtype == np.uint8 and split.images.flags.c_contiguous
        assert split.labels.dtype == np.int64
        assert np.bincount(split.labels).tolist() == [per_class] * 100
    assert np.bincount(data.train.labels[:1000]).tolist() == [10] * 100, "not sorted by class"


def test_every_name_says_synthetic_and_a_class_is_named_after_its_family(data):
    assert data.name == "synthetic"
    assert len(set(data.classes)) == 100 and len(set(data.superclasses)) == 20
    assert all(name.startswith("synthetic-") for name in data.classes + data.superclasses)
    assert data.superclass_of.dtype == np.int64
    for name, group in zip(data.classes, data.superclass_of, strict=True):
        assert name.rpartition("-")[0] == data.superclasses[group]
    assert np.bincount(data.superclass_of).tolist() == [5] * 20


def test_no_image_occurs_twice_and_one_class_alone_gives_the_same_images(data):
    images = np.concatenate([data.train.images, data.test.images])
    assert len({image.tobytes() for image in images}) == 12_000
    alone = synthetic.draw_class(37, synthetic.TEST_PER_CLASS, split=1)
    assert np.array_equal(alone, data.test.images[data.test.labels == 37])


def test_colour_and_brightness_give_no_class_away(data):
    """The classes' mean colours differ by little beside the spread within a class."""
    means = data.train.images.mean(axis=(1, 2))  # [10000, 3]
    centres = np.stack([means[data.train.labels == label].mean(axis=0) for label in range(100)])
    guesses = np.argmin(((data.test.images.mean(axis=(1, 2))[:, None] - centres) ** 2).sum(axis=-1), axis=1)
    assert (guesses == data.test.labels).mean() < 0.04


def test_shapes_differ_between_the_classes_of_a_family():
    """Without distortions, each shape differs from every other in at least 3 % of the area."""
    grid = (np.arange(64) + 0.5) / 32 - 1
    u, v = np.broadcast_to(grid, (64, 64)).copy(), np.broadcast_to(grid[:, None], (64, 64)).copy()
    shapes = np.stack([draw(u, v, k) for draw in synthetic.FAMILIES.values() for k in range(5)])
    assert shapes.min() >= 0 and shapes.max() <= 1
    assert (shapes.mean(axis=(1, 2)) > 0.1).all(), "a shape is nearly empty"
    apart = abs(shapes[:, None] - shapes[None]).mean(axis=(2, 3)) + np.eye(100)
    assert apart.min() > 0.03
