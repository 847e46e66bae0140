"""CIFAR-100 on disk: what is right is read, what is not is refused before it is unpickled."""

import builtins
import hashlib
import io
import os
import pickle
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cifar import dataset
from cifar.dataset import DatasetUnavailable, checked_split, load_dataset, superclass_map
from conftest import install_tiny_cifar, tar_gz, tiny_split
from core.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test here may ask for anything outside this machine."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def no_unpickling(monkeypatch):
    """Fails the test when anything is unpickled."""

    def refuse(*_, **__):
        raise AssertionError("unpickled before the md5 was right")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)


def test_laid_out_files_are_read_without_network(tiny_cifar, tmp_path):
    tiny_cifar.lay(tmp_path)
    data = load_dataset("cifar100", tmp_path)
    stored = tiny_split(2, seed=1)
    planes = stored["data"].reshape(-1, 3, 32, 32)
    assert data.name == "cifar100"
    assert (len(data.train), len(data.test)) == (200, 100)
    assert data.train.images.dtype == np.uint8 and data.train.labels.dtype == np.int64
    assert data.train.images.flags.c_contiguous
    assert data.train.images[7, 5, 9].tolist() == planes[7, :, 5, 9].tolist()
    assert data.train.labels.tolist() == stored["fine_labels"]
    assert data.classes[42] == "class42" and data.superclasses[19] == "group19"
    assert data.superclass_of.tolist() == [label % 20 for label in range(100)]
    assert data.superclass_of.dtype == np.int64


def test_archive_laid_by_hand_is_used(tiny_cifar, tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(tiny_cifar.archive)
    assert len(load_dataset("cifar100", tmp_path).train) == 200
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cifar-100-python", "cifar-100-python.tar.gz"]


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_archive_of_the_users_own_is_fetched(tiny_cifar, tmp_path, monkeypatch, way):
    own = tmp_path / "own.tar.gz"
    own.write_bytes(tiny_cifar.archive)
    if way == "environment":
        monkeypatch.setenv("CIFAR100_URL", str(own))
    url = str(own) if way == "argument" else None
    assert len(load_dataset("cifar100", tmp_path / "data", url=url).test) == 100


def test_own_source_is_asked_first_and_the_others_after_it(tiny_cifar, tmp_path, monkeypatch):
    good, wrong = tmp_path / "good.tar.gz", tmp_path / "wrong.tar.gz"
    good.write_bytes(tiny_cifar.archive)
    wrong.write_bytes(bytes(len(tiny_cifar.archive)))
    monkeypatch.setattr(dataset, "SOURCES", (str(good),))
    assert len(load_dataset("cifar100", tmp_path / "data", url=str(wrong)).test) == 100
    monkeypatch.setattr(dataset, "SOURCES", (str(wrong),))
    with pytest.raises(DatasetUnavailable) as failure:
        load_dataset("cifar100", tmp_path / "other", url="/nowhere")
    assert [source for source, _ in failure.value.reasons] == ["/nowhere", str(wrong)]


def test_unavailable_says_each_reason_and_what_to_do(tiny_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SOURCES", ("http://one.invalid/a", "http://two.invalid/b"))
    with pytest.raises(DatasetUnavailable) as failure:
        load_dataset("cifar100", tmp_path, url=str(tmp_path / "own.tar.gz"))
    message = str(failure.value)
    assert f"  {tmp_path / 'own.tar.gz'}: no such file\n" in message
    assert "  http://one.invalid/a: no network in this test\n" in message
    assert "  http://two.invalid/b: no network in this test\n" in message
    for hint in ("http://one.invalid/a or http://two.invalid/b", str(tmp_path / dataset.ARCHIVE)):
        assert hint in message
    for hint in (dataset.ARCHIVE_MD5, "--data-url", "CIFAR100_URL", "--dataset synthetic"):
        assert hint in message
    assert failure.value.exit_code == 1
    assert not (tmp_path / dataset.FOLDER).exists()


def flip_a_byte(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def swap_train_and_test(folder: Path) -> None:
    (folder / "train").rename(folder / "x")
    (folder / "test").rename(folder / "train")
    (folder / "x").rename(folder / "test")


def shorten(folder: Path) -> None:
    os.truncate(folder / "test", 1000)


def make_a_folder(folder: Path) -> None:
    (folder / "train").unlink()
    (folder / "train").mkdir()


HARM = {
    "flipped byte in train": (lambda f: flip_a_byte(f, "train"), "train is damaged"),
    "flipped byte in test": (lambda f: flip_a_byte(f, "test"), "test is damaged"),
    "flipped byte in meta": (lambda f: flip_a_byte(f, "meta"), "meta is damaged"),
    "swapped": (swap_train_and_test, "train is the test file under a wrong name"),
    "short": (shorten, "test is damaged (1,000 bytes"),
    "empty": (lambda f: (f / "meta").write_bytes(b""), "meta is damaged (0 bytes"),
    "missing": (lambda f: (f / "test").unlink(), "test is missing"),
    "folder": (make_a_folder, "train cannot be read"),
}


@pytest.mark.parametrize("harm", HARM)
def test_damaged_file_is_refused_unread_and_kept(harm, tiny_cifar, tmp_path, no_unpickling):
    folder = tiny_cifar.lay(tmp_path)
    damage, reason = HARM[harm]
    damage(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(RunError) as failure:
        load_dataset("cifar100", tmp_path, url=str(tmp_path / "unused"))
    message = str(failure.value)
    assert not isinstance(failure.value, DatasetUnavailable), "it must not fetch unasked"
    assert reason in message and "\n" not in message
    assert f"delete the folder {folder}" in message
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("harm", [name for name in HARM if name != "folder"])
def test_damaged_file_is_renewed_from_the_archive_beside_it(harm, tiny_cifar, tmp_path):
    HARM[harm][0](tiny_cifar.lay(tmp_path))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(tiny_cifar.archive)
    assert len(load_dataset("cifar100", tmp_path).train) == 200


def test_each_file_is_read_and_verified_once(tiny_cifar, tmp_path, monkeypatch):
    """What is unpickled are the very bytes that were verified: a file cannot change in between."""
    folder, opened, hashed, unpickled = tiny_cifar.lay(tmp_path), Counter(), [], []
    real_open = open

    def opening(path, *arguments, **options):
        opened[str(path)] += 1
        return real_open(path, *arguments, **options)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", opening)
    md5, loads = hashlib.md5, pickle.loads

    def hashing(content=b"", **options):
        hashed.append(content)
        return md5(content, **options)

    def loading(content, **options):
        unpickled.append(content)
        return loads(content, **options)

    monkeypatch.setattr(hashlib, "md5", hashing)
    monkeypatch.setattr(pickle, "loads", loading)
    load_dataset("cifar100", tmp_path)
    members = list(tiny_cifar.members.values())
    assert [opened[str(folder / name)] for name in tiny_cifar.members] == [1, 1, 1]
    assert hashed == unpickled == members
    assert all(a is b for a, b in zip(hashed, unpickled, strict=True))


class Exploit:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_hostile_pickle_is_never_unpickled(tiny_cifar, tmp_path):
    trap = tmp_path / "pwned"
    hostile = pickle.dumps(Exploit(trap))
    for name in tiny_cifar.members:
        folder = tiny_cifar.lay(tmp_path / name)
        (folder / name).write_bytes(hostile)
        with pytest.raises(RunError, match=f"{name} is damaged"):
            load_dataset("cifar100", tmp_path / name)
    archive = tar_gz([(f"cifar-100-python/{name}", hostile) for name in tiny_cifar.members])
    data = tmp_path / "archived"
    data.mkdir()
    (data / "cifar-100-python.tar.gz").write_bytes(archive)
    with pytest.raises(RunError, match=r"tar\.gz is damaged"):
        load_dataset("cifar100", data)
    assert not trap.exists()
    pickle.loads(hostile)
    assert trap.exists(), "the trap works"


def test_wrong_archive_laid_by_hand_is_refused_and_kept(tiny_cifar, tmp_path, no_unpickling):
    archive = tmp_path / "cifar-100-python.tar.gz"
    flipped = tiny_cifar.archive[:-9] + bytes([tiny_cifar.archive[-9] ^ 1])
    for content in (flipped + tiny_cifar.archive[-8:], tiny_cifar.archive[:-1], b""):
        archive.write_bytes(content)
        with pytest.raises(RunError, match=r"tar\.gz is damaged .*: delete it and run again") as e:
            load_dataset("cifar100", tmp_path)
        assert "\n" not in str(e.value)
        assert archive.read_bytes() == content


def test_right_archive_with_wrong_members_is_refused(tiny_cifar, tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.MEMBER_MD5, "meta", "0" * 32)
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(tiny_cifar.archive)
    with pytest.raises(RunError, match=r"meta is damaged .* is right; is the disk failing"):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("wrong", [100, -1])
def test_label_out_of_range_in_the_file_is_refused(wrong, monkeypatch, tmp_path):
    train = tiny_split(2, seed=1)
    train["fine_labels"][17] = wrong
    meta = {"fine_label_names": ["a"] * 100, "coarse_label_names": ["b"] * 20}
    contents = {"train": train, "test": tiny_split(1, seed=2), "meta": meta}
    install_tiny_cifar(monkeypatch, contents).lay(tmp_path)
    with pytest.raises(RunError, match=f"train: labels from .*{wrong}.*should be 0 to 99"):
        load_dataset("cifar100", tmp_path)


IMAGES = np.zeros((4, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 99])


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (IMAGES, LABELS + 1, "labels from 1 to 100"),
        (IMAGES, LABELS - 1, "labels from -1 to 98"),
        (IMAGES, LABELS[:3], "4 images but 3 labels"),
        (IMAGES, LABELS / 2, "labels should be integers"),
        (IMAGES, LABELS[:, None], "labels should be integers"),
        (IMAGES.astype(np.float32), LABELS, "images should be uint8"),
        (IMAGES.transpose(0, 3, 1, 2), LABELS, "images should be uint8"),
        (IMAGES[:, :28, :28], LABELS, "images should be uint8"),
        (IMAGES[..., :1], LABELS, "images should be uint8"),
        (IMAGES.reshape(4, -1), LABELS, "images should be uint8"),
        (IMAGES[:0], LABELS[:0], "0 images"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, reason):
    with pytest.raises(RunError, match=f"here: .*{reason}"):
        checked_split(images, labels, "here")
    assert len(checked_split(IMAGES, LABELS, "here")) == 4


def test_checked_split_is_contiguous_and_int64():
    planes = np.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).astype(np.uint8)
    split = checked_split(planes.transpose(0, 2, 3, 1), np.array([1, 2], dtype=np.int32), "here")
    assert split.images.flags.c_contiguous and split.labels.dtype == np.int64
    assert split.images[1, 2, 3].tolist() == planes[1, :, 2, 3].tolist()


def test_class_in_two_superclasses_or_in_none_is_refused():
    fine = list(range(100))
    coarse = [label // 5 for label in fine]
    assert superclass_map(fine, coarse).tolist() == coarse
    with pytest.raises(RunError, match="exactly one superclass"):
        superclass_map([*fine, 3], [*coarse, 19])
    with pytest.raises(RunError, match="exactly one superclass"):
        superclass_map(fine[:-1], coarse[:-1])


def test_unknown_name_is_a_usage_error_that_lists_the_known(tmp_path):
    with pytest.raises(UsageError, match="'cifar10': choose one of cifar100, synthetic"):
        load_dataset("cifar10", tmp_path)


def test_sources_are_of_the_right_file_and_the_official_one_is_last():
    assert all(source.startswith("https://") for source in dataset.SOURCES)
    assert all(source.endswith("/cifar-100-python.tar.gz") for source in dataset.SOURCES)
    assert "cs.toronto.edu" in dataset.SOURCES[-1]
    assert len(set(dataset.SOURCES)) == 6


def test_sums_equal_those_torchvision_pins():
    from torchvision.datasets import CIFAR100

    (train,), (test,) = CIFAR100.train_list, CIFAR100.test_list
    pinned = {train[0]: train[1], test[0]: test[1], "meta": CIFAR100.meta["md5"]}
    assert pinned == dataset.MEMBER_MD5
    assert CIFAR100.tgz_md5 == dataset.ARCHIVE_MD5
    assert CIFAR100.base_folder == dataset.FOLDER


@pytest.mark.real_data
def test_real_data_and_the_constants_of_its_pixels(real_data_dir):
    data = load_dataset("cifar100", real_data_dir)
    assert np.bincount(data.train.labels).tolist() == [500] * 100
    assert np.bincount(data.test.labels).tolist() == [100] * 100
    assert data.classes[:2] == ("apple", "aquarium_fish") and data.classes[99] == "worm"
    groups = [data.superclasses[group] for group in data.superclass_of]
    assert (groups[0], groups[1]) == ("fruit_and_vegetables", "fish")
    assert np.bincount(data.superclass_of).tolist() == [5] * 20
    # Exact sums of 8-bit values: from the histogram of each channel.
    values = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(dataset.CIFAR100_MEAN, dataset.CIFAR100_STD, strict=True)):
        share = np.bincount(data.train.images[..., channel].ravel(), minlength=256)
        share = share / share.sum()
        true_mean = (share * values).sum()
        true_std = (share * (values - true_mean) ** 2).sum() ** 0.5
        exact = [(0.5071, 0.2673), (0.4865, 0.2564), (0.4409, 0.2762)][channel]
        assert (round(true_mean, 4), round(true_std, 4)) == exact
        assert abs(true_mean - mean) < 2e-4 and abs(true_std - std) < 2e-4
