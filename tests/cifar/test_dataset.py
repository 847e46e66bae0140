"""CIFAR-100 on disk: intact files are read, others refused before unpickling; subsets and hold-outs."""

import errno
import functools
import hashlib
import os
import pickle
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from cifar import dataset
from cifar.dataset import (
    DatasetUnavailable,
    Split,
    balanced_subset,
    find_folder,
    load_dataset,
    train_val_split,
)
from core.cli import DATA_DIR
from core.errors import RunError, UsageError
from helpers.tiny_cifar import tiny_split


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test here may ask for anything outside this machine."""
    urlopen = urllib.request.urlopen

    def refuse(request, **options):
        if request.type == "file":
            return urlopen(request, **options)
        raise OSError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


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


def test_archive_put_beside_the_folder_is_used(tiny_cifar, tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(tiny_cifar.archive)
    assert len(load_dataset("cifar100", tmp_path).train) == 200
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cifar-100-python", "cifar-100-python.tar.gz"]


@pytest.mark.parametrize("way", ["argument", "environment", "built in"])
def test_own_archive_is_tried_first_and_the_built_in_sources_after_it(tiny_cifar, tmp_path, monkeypatch, way):
    good = tmp_path / "good.tar.gz"
    good.write_bytes(tiny_cifar.archive)
    if way == "environment":
        monkeypatch.setenv("CIFAR100_URL", str(good))
    sources = ("http://unused.invalid/a",) if way != "built in" else (str(good),)
    monkeypatch.setattr(dataset, "SOURCES", sources)
    url = {"argument": str(good), "built in": "/nowhere"}.get(way)
    assert len(load_dataset("cifar100", tmp_path / "data", url=url).test) == 100


def test_unavailable_gives_each_reason_and_says_what_to_do(tiny_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SOURCES", ("http://one.invalid/a", "http://two.invalid/b"))
    with pytest.raises(DatasetUnavailable) as failure:
        load_dataset("cifar100", tmp_path, url="http://own.invalid/c")
    assert str(failure.value).splitlines() == [
        "CIFAR-100 could not be downloaded:",
        "  http://own.invalid/c: no network in this test",
        "  http://one.invalid/a: no network in this test",
        "  http://two.invalid/b: no network in this test",
        "To download it manually: get http://one.invalid/a or http://two.invalid/b",
        f"  ({len(tiny_cifar.archive):,} bytes, md5 {tiny_cifar.md5}), save it as "
        f"{tmp_path / dataset.ARCHIVE}, and run again;",
        "  or pass your own copy (URL or path) with --data-url or CIFAR100_URL.",
        "To train without it, on built-in synthetic images: --dataset synthetic",
    ]
    assert failure.value.exit_code == 1
    assert not (tmp_path / dataset.FOLDER).exists()


def test_the_inner_folder_stands_for_its_parent(tiny_cifar, tmp_path, monkeypatch):
    folder = tiny_cifar.lay(tmp_path / "data")
    renamed = tmp_path / "mine"
    monkeypatch.chdir(folder)
    for data_dir in (folder, Path("."), renamed):
        if data_dir == renamed:
            folder.rename(renamed)
        assert find_folder(data_dir) == data_dir.absolute()
        assert len(load_dataset("cifar100", data_dir).train) == 200
    # with nothing there, the archive beside it fills that folder
    (tmp_path / "data" / dataset.ARCHIVE).write_bytes(tiny_cifar.archive)
    assert len(load_dataset("cifar100", folder).train) == 200
    assert sorted(path.name for path in folder.iterdir()) == ["meta", "test", "train"]


def test_scripts_in_another_folder_read_the_repositorys_data(tiny_cifar, tmp_path, monkeypatch, caplog):
    repository, here = tmp_path / "repository", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(dataset, "REPOSITORY_DATA", repository)
    tiny_cifar.lay(repository)
    assert find_folder(DATA_DIR) == repository / dataset.FOLDER
    assert find_folder(here) is None  # a folder that was named is the only one
    assert len(load_dataset("cifar100", "data").train) == 200
    assert caplog.messages == [f"CIFAR-100 is not in {here / 'data'}: reading it from {repository}"]
    assert list(here.iterdir()) == []

    caplog.clear()
    tiny_cifar.lay(here / "data")
    assert find_folder(DATA_DIR) == DATA_DIR / dataset.FOLDER  # the nearer one comes first
    assert len(load_dataset("cifar100", "data").train) == 200
    assert caplog.messages == []


def test_a_download_says_first_where_the_data_was_looked_for(tiny_cifar, tmp_path, monkeypatch, caplog):
    archive = tmp_path / "good.tar.gz"
    archive.write_bytes(tiny_cifar.archive)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "REPOSITORY_DATA", tmp_path / "repository")
    assert len(load_dataset("cifar100", "data", url=str(archive)).train) == 200
    here = tmp_path / "data"
    assert caplog.messages == [
        f"CIFAR-100 is not in {here} or {tmp_path / 'repository'}: downloading it to {here}"
    ]
    assert (here / dataset.FOLDER / "train").is_file() and not (tmp_path / "repository").exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_train_and_test(folder: Path) -> None:
    for old, new in (("train", "x"), ("test", "train"), ("x", "test")):
        (folder / old).rename(folder / new)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def break_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


HARM = {
    "flipped byte in train": (lambda f: flip_a_byte(f / "train"), "train is damaged"),
    "flipped byte in meta": (lambda f: flip_a_byte(f / "meta"), "meta is damaged"),
    "swapped": (swap_train_and_test, "train is the test file under a wrong name"),
    "short": (lambda f: os.truncate(f / "test", 1000), "test is damaged (1,000 bytes"),
    "empty": (lambda f: (f / "meta").write_bytes(b""), "meta is damaged (0 bytes"),
    "missing": (lambda f: (f / "test").unlink(), "test is missing"),
    "broken link": (lambda f: break_link(f / "meta"), "meta is a broken link to gone"),
    "folder": (lambda f: make_a_folder(f / "train"), "train cannot be read"),
}


@pytest.mark.parametrize("harm", HARM)
def test_damaged_file_is_refused_and_kept(harm, tiny_cifar, tmp_path):
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


def test_what_a_broken_link_or_no_permission_hides_is_not_downloaded(tiny_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "fetch", lambda *_, **__: pytest.fail("downloaded"))
    link = tmp_path / "link"
    link.symlink_to("gone")
    with pytest.raises(RunError, match=r"link is a broken link to gone; correct that, or pass another"):
        load_dataset("cifar100", link)
    (tmp_path / dataset.ARCHIVE).symlink_to("gone")
    with pytest.raises(RunError, match=r"tar\.gz is a broken link to gone; correct that, or delete it"):
        load_dataset("cifar100", tmp_path)

    locked = tmp_path / "locked"
    real = {name: getattr(Path, name) for name in ("stat", "read_bytes")}

    def refuse(name: str, path: Path, **options: object) -> object:  # not by chmod: root may read everything
        if path.is_relative_to(locked):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real[name](path, **options)

    for name in real:
        monkeypatch.setattr(Path, name, functools.partialmethod(functools.partial(refuse, name)))
    with pytest.raises(RunError, match=r"train cannot be read \(Permission denied\); correct that, or pass"):
        load_dataset("cifar100", locked)


def test_a_broken_link_as_source_is_named(tiny_cifar, tmp_path, monkeypatch):
    link = tmp_path / "link.tar.gz"
    link.symlink_to("gone")
    monkeypatch.setattr(dataset, "SOURCES", ("http://one.invalid/a",))
    with pytest.raises(DatasetUnavailable, match=re.escape(f"  {link}: {link} is a broken link to gone\n")):
        load_dataset("cifar100", tmp_path / "data", url=str(link))


@pytest.mark.parametrize("harm", [name for name in HARM if name != "folder"])
def test_damaged_file_is_replaced_from_the_archive_beside_it(harm, tiny_cifar, tmp_path):
    HARM[harm][0](tiny_cifar.lay(tmp_path))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(tiny_cifar.archive)
    assert len(load_dataset("cifar100", tmp_path).train) == 200


def test_a_file_that_is_replaced_after_its_check_is_not_unpickled(tiny_cifar, tmp_path, monkeypatch):
    folder, md5 = tiny_cifar.lay(tmp_path), hashlib.md5
    names = {content: name for name, content in tiny_cifar.members.items()}

    def check_then_replace(content=b"", **options):
        (folder / names[content]).write_bytes(b"hostile")
        return md5(content, **options)

    monkeypatch.setattr(hashlib, "md5", check_then_replace)
    assert len(load_dataset("cifar100", tmp_path).train) == 200
    assert {path.read_bytes() for path in folder.iterdir()} == {b"hostile"}


@pytest.mark.parametrize("name", dataset.MEMBER_MD5)
def test_hostile_pickle_is_never_unpickled(name, tiny_cifar, tmp_path):
    trap = tmp_path / "pwned"
    hostile = f"cos\nmkdir\n(V{trap}\ntR.".encode()
    (tiny_cifar.lay(tmp_path) / name).write_bytes(hostile)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        load_dataset("cifar100", tmp_path)
    assert not trap.exists()
    pickle.loads(hostile)
    assert trap.exists(), "the trap works"


def test_wrong_archive_beside_the_folder_is_refused_and_kept(tiny_cifar, tmp_path):
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
    with pytest.raises(RunError, match=r"meta is damaged .* is intact; is the disk failing"):
        load_dataset("cifar100", tmp_path)


def test_unknown_name_is_a_usage_error_that_lists_the_known(tmp_path):
    with pytest.raises(UsageError, match="'cifar10': choose one of cifar100, synthetic"):
        load_dataset("cifar10", tmp_path)


def test_md5s_equal_torchvisions():
    from torchvision.datasets import CIFAR100

    (train,), (test,) = CIFAR100.train_list, CIFAR100.test_list
    pinned = {train[0]: train[1], test[0]: test[1], "meta": CIFAR100.meta["md5"]}
    assert pinned == dataset.MEMBER_MD5
    assert CIFAR100.tgz_md5 == dataset.ARCHIVE_MD5
    assert CIFAR100.base_folder == dataset.FOLDER


# Subsets and hold-outs


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
def test_subset_is_balanced_and_in_order_with_its_labels(count):
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


def test_other_classes_make_up_for_a_small_one():
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
    for function in (balanced_subset, train_val_split):
        with pytest.raises(UsageError, match=f"cannot take {count} of 300 images"):
            function(EVEN, count, seed=0)
    with pytest.raises(UsageError, match="leaves none"):
        train_val_split(EVEN, 300, seed=0)


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
    for channel, exact in enumerate([(0.5071, 0.2673), (0.4865, 0.2564), (0.4409, 0.2762)]):
        counts = np.bincount(data.train.images[..., channel].ravel(), minlength=256)
        mean = np.average(values, weights=counts)
        std = np.average((values - mean) ** 2, weights=counts) ** 0.5
        assert (round(mean, 4), round(std, 4)) == exact
        used = dataset.CIFAR100_MEAN[channel], dataset.CIFAR100_STD[channel]
        assert (mean, std) == pytest.approx(used, abs=2e-4)
