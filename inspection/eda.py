"""Data analysis for the notebook: statistics, outliers, duplicates, similar classes, augmentations.

NumPy arrays in and out. Images are uint8 [N, 32, 32, 3], RGB, with levels from 0 to 255.

    python -m inspection.eda     list the near-duplicates again, in cifar/near_duplicates.txt
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifar import dataset
from cifar.augment import AUGMENTATIONS, OPERATIONS, train_transform
from cifar.dataset import NUM_CLASSES, DatasetUnavailable, ImageData, Split, balanced_subset, load_dataset
from cifar.fast_transforms import A, Pipeline
from core.cli import LOG, Parser, add_data_dir, run_main, start_log
from core.errors import UsageError
from core.files import atomic_write_text

NEAR_DUPLICATE = 0.7  # similarity: by eye, most pairs above it are copies; the notebook shows them
POOLED = 16  # side, in pixels, of the shrunk images that are compared
COMPONENTS = 256  # of the 16 * 16 * 3 = 768 that these have
Progress = Callable[[int], Iterable[int]]  # `range`, or a progress bar that counts like it


def load_images(name: str, data_dir: str | Path, count: int | None = None) -> ImageData:
    """The data set `name`, or the synthetic one (as its `name` says) if CIFAR-100 is unavailable.

    Args:
        count: size of a class-balanced training subset, with a fifth as many test images; None: all.

    Raises:
        UsageError: unknown name, or a count too small for every class or greater than the data set.
        RunError: the files in `data_dir` are damaged.
    """
    try:
        data = load_dataset(name, data_dir)
    except DatasetUnavailable:
        data = load_dataset("synthetic", data_dir)
    if count is None:
        return data
    if count < 5 * NUM_CLASSES:
        raise UsageError(f"{count} images are too few: give {5 * NUM_CLASSES} or more")
    test = balanced_subset(data.test, min(count // 5, len(data.test)), seed=0)
    return replace(data, train=balanced_subset(data.train, count, seed=0), test=test)


def level_histogram(images: np.ndarray) -> np.ndarray:
    """The number of pixels of each level, by channel: int64 [3, 256]."""
    return np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])


def channel_statistics(
    histogram: np.ndarray, values: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float64 [3] each, exactly, from `level_histogram`.

    Args:
        values: [3, 256], the value of each level; None: level / 255.
    """
    values = np.arange(256) / 255 if values is None else values
    pixels = histogram.sum(axis=1)
    mean = (histogram * values).sum(axis=1) / pixels
    variance = (histogram * (values - mean[:, None]) ** 2).sum(axis=1) / pixels
    return mean, np.sqrt(variance)


def mean_images(images: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """The mean image of each group 0..count-1 (none is empty): float64 [count, 32, 32, 3], in levels."""
    # uint64 sums are exact, and a group at a time needs no float copy of all images
    sums = np.stack([images[groups == group].sum(axis=0, dtype=np.uint64) for group in range(count)])
    return sums / np.bincount(groups, minlength=count)[:, None, None, None]


class ImageStatistics(NamedTuple):
    """Per image, float32 [N] each, in levels.

    `brightness` is the mean over all pixels, `contrast` the standard deviation of the pixels' brightness,
    `colour` the mean difference between a pixel's largest and smallest channel (0 for a grey image).
    """

    brightness: np.ndarray
    contrast: np.ndarray
    colour: np.ndarray


def image_statistics(images: np.ndarray, block: int = 2000) -> ImageStatistics:
    """Brightness, contrast and colour of every image, `block` images at a time to bound the memory."""
    parts = []
    for start in range(0, len(images), block):
        part = images[start : start + block]
        grey = part.mean(axis=3, dtype=np.float32)
        # subtracting uint8 from a larger uint8 cannot wrap around
        colour = (part.max(axis=3) - part.min(axis=3)).mean(axis=(1, 2), dtype=np.float32)
        parts.append((grey.mean(axis=(1, 2)), grey.std(axis=(1, 2)), colour))
    return ImageStatistics(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def extremes(statistics: ImageStatistics, count: int) -> dict[str, np.ndarray]:
    """The indices of the `count` most extreme images in each direction, most extreme first: int64 [count]."""
    brightness, contrast, colour = statistics
    orders = {"darkest": brightness, "brightest": -brightness, "least contrast": contrast,
              "most contrast": -contrast, "most colourful": -colour}  # fmt: skip
    return {name: np.argsort(key, kind="stable")[:count] for name, key in orders.items()}


def identical(queries: np.ndarray, gallery: np.ndarray | None = None) -> np.ndarray:
    """The index of the first gallery image with exactly the query's bytes, or -1: int64 [N].

    Without a gallery, each image is compared with those before it: every copy but the first is found.
    """
    first: dict[bytes, int] = {}
    for index, image in enumerate(queries if gallery is None else gallery):
        first.setdefault(image.tobytes(), index)
    found = np.array([first.get(image.tobytes(), -1) for image in queries])
    return np.where(found == np.arange(len(found)), -1, found) if gallery is None else found


@dataclass(frozen=True, eq=False)
class Whitening:
    """Whitened unit vectors of images; the dot product of two is their similarity, from -1 to 1.

    Images are shrunk to 16x16; each channel's mean and the image's contrast are removed, so that a change of
    colour or exposure counts little. The principal components over the training images then get equal
    weight. Plain correlation would match any two seas, or plates on white, since a few broad patterns (light
    above dark, an object in the middle) hold most of the variance; whitened, they are a few of 256 numbers.
    """

    mean: np.ndarray  # float32 [768]
    projection: np.ndarray  # float32 [768, K]

    @classmethod
    def fit(cls, images: np.ndarray, components: int = COMPONENTS) -> "Whitening":
        """Compute up to `components` components from `images`, at least two of which differ."""
        vectors = _pooled(images)
        mean = vectors.mean(axis=0)
        centred = vectors - mean
        values, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64) / len(images))
        values, directions = values[::-1][:components], directions[:, ::-1][:, :components]
        kept = values > 1e-6 * values[0]
        return cls(mean, (directions[:, kept] / np.sqrt(values[kept])).astype(np.float32))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, K], each of length 1 (0 for the mean image itself)."""
        vectors = (_pooled(images) - self.mean) @ self.projection
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _pooled(images: np.ndarray, block: int = 2000) -> np.ndarray:
    """16x16 images without mean and contrast: float32 [N, 768], each of length 1 (0 if uniform)."""
    vectors = np.empty((len(images), POOLED * POOLED * 3), dtype=np.float32)
    side = images.shape[1] // POOLED
    for start in range(0, len(images), block):
        part = images[start : start + block]
        pools = part.reshape(-1, POOLED, side, POOLED, side, 3).mean(axis=(2, 4), dtype=np.float32)
        flat = (pools - pools.mean(axis=(1, 2), keepdims=True)).reshape(len(part), -1)
        vectors[start : start + block] = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return vectors


def nearest(
    queries: np.ndarray, gallery: np.ndarray | None = None, *, block: int = 500, progress: Progress = range
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar gallery vector of each query: similarity float32 [N] (-1 to 1), index int64 [N].

    Args:
        queries: float32 [N, K], each of length 1, from a `Whitening`.
        gallery: the same, [M, K]; None: each query is compared with all the others.
        block: queries at a time; 500 against 50,000 take 100 MB.
        progress: called with the number of blocks; iterated over to count them.
    """
    others = queries if gallery is None else gallery
    similarity = np.empty(len(queries), dtype=np.float32)
    index = np.empty(len(queries), dtype=np.int64)
    for number in progress(-(-len(queries) // block)):
        rows = np.arange(number * block, min((number + 1) * block, len(queries)))
        products = queries[rows] @ others.T
        if gallery is None:
            products[np.arange(len(rows)), rows] = -np.inf  # itself
        index[rows] = products.argmax(axis=1)
        similarity[rows] = products[np.arange(len(rows)), index[rows]]
    return similarity, index


def near_duplicates(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The query images that have a near-duplicate in the gallery, as they are or mirrored: int64, increasing.

    Args:
        gallery: images, to which the whitening is fitted.
    """
    whiten = Whitening.fit(gallery)
    vectors = whiten(gallery)
    plain, mirrored = (nearest(whiten(images), vectors)[0] for images in (queries, queries[:, :, ::-1]))
    return np.flatnonzero(np.maximum(plain, mirrored) >= NEAR_DUPLICATE)


def agreement_by_band(
    similarity: np.ndarray, agrees: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in each band of similarity (int64 [B]) and the percentage with equal labels (NaN if empty).

    Args:
        similarity: [N].
        agrees: bool [N], whether the pair's labels are equal.
        edges: [B + 1] increasing; a band includes its lower edge, the last one also its upper.
    """
    counts, _ = np.histogram(similarity, bins=edges)
    equal, _ = np.histogram(similarity[agrees], bins=edges)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return counts, 100 * equal / counts


def spread_over(similarity: np.ndarray, low: float, high: float, count: int) -> np.ndarray:
    """The indices of at most `count` pairs in [low, high), evenly spread by rank, most similar first."""
    order = np.argsort(-similarity, kind="stable")
    inside = order[(similarity[order] >= low) & (similarity[order] < high)]
    return inside[np.linspace(0, len(inside) - 1, min(count, len(inside))).round().astype(np.int64)]


def stack_pairs(upper: np.ndarray, lower: np.ndarray, count: int) -> np.ndarray:
    """Images above their partners, padded with white ones to `count`: uint8 [count, 2 * H + 2, W, 3]."""
    size, height, width = upper.shape[:3]
    stacked = np.full((count, 2 * height + 2, width, 3), 255, dtype=np.uint8)
    stacked[:size, :height], stacked[:size, height + 2 :] = upper, lower
    return stacked


def pair_caption(name: str, other: str) -> str:
    """One name where two are equal, else both, the first one above."""
    return name if name == other else f"{name}\n/ {other}"


def pair_rows(
    chosen: Sequence[np.ndarray],
    upper: Split,
    lower: Split,
    partner: np.ndarray,
    names: Sequence[str],
    count: int,
) -> tuple[np.ndarray, list[list[str]]]:
    """Rows of at most `count` images of `upper` above their partners in `lower`, and a caption for each.

    Args:
        chosen: the indices of the images, int64 [<= count] for each of R rows.
        partner: the index of each image's partner, int64 [N].
        names: those of the labels.

    Returns:
        uint8 [R, count, 2 * H + 2, W, 3], and R lists of `count` captions, "" where there is no image.
    """
    tiles, captions = [], []
    for above in chosen:
        below = partner[above]
        tiles.append(stack_pairs(upper.images[above], lower.images[below], count))
        labels = zip(upper.labels[above], lower.labels[below], strict=True)
        texts = [pair_caption(names[a], names[b]) for a, b in labels]
        captions.append(texts + [""] * (count - len(texts)))
    return np.stack(tiles), captions


def class_distances(means: np.ndarray) -> np.ndarray:
    """Root mean square difference of every two mean images: float64 [K, K], in levels (diagonal: inf)."""
    flat = means.reshape(len(means), -1)
    squares = ((flat[:, None] - flat[None]) ** 2).mean(axis=2)
    np.fill_diagonal(squares, np.inf)
    return np.sqrt(squares)


def most_alike(distances: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """(lower class, higher class, distance) of the `count` pairs of the smallest distance, nearest first."""
    rows, columns = np.triu_indices(len(distances), k=1)
    pairs = zip(rows.tolist(), columns.tolist(), distances[rows, columns].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: pair[2])[:count]


def nearest_mean(images: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The class with the nearest mean image, for each image: int64 [N]; a very simple classifier."""
    flat = means.reshape(len(means), -1)
    # |x - m|^2 without |x|^2, which is the same for all classes
    products = images.reshape(len(images), -1).astype(np.float32) @ flat.T.astype(np.float32)
    return ((flat**2).sum(axis=1) - 2 * products).argmin(axis=1)


def augmented(pipeline: Pipeline, images: np.ndarray, seed: int) -> np.ndarray:
    """Each image augmented with its own seed (`seed` + its index): uint8, of the shape of `images`."""
    results = np.empty_like(images)
    for number, image in enumerate(images):
        pipeline.set_random_seed(seed + number)
        results[number] = pipeline.augment(image)
    return results


def single_transforms() -> dict[str, Pipeline]:
    """The transforms of the simple pipelines, each alone and always applied; last, the reference's together.

    Pad and RandomCrop stay a pair: only together do they keep 32x32 pixels.
    """
    singles = [*train_transform("reference").transforms, train_transform("noise").transforms[-1]]
    parts = [[transform] for transform in singles]
    parts.insert(4, list(train_transform("standard").transforms[:2]))
    named = {" + ".join(type(transform).__name__ for transform in part): part for part in parts}
    named["the first four together"] = list(train_transform("reference").transforms)
    for transform in itertools.chain(*named.values()):
        transform.p = 1.0
    return {name: Pipeline(part) for name, part in named.items()}


def policy_operations() -> dict[str, Pipeline]:
    """The 14 operations of RandAugment and TrivialAugment, each alone, at RandAugment's full strength."""
    steps = train_transform("randaugment:1,30").transforms
    policy = next(step for step in steps if isinstance(step, A.BaseCompose))
    return {name: Pipeline([part]) for name, part in zip(OPERATIONS, policy.transforms, strict=True)}


def named_pipelines() -> dict[str, Pipeline]:
    """Every pipeline that `--augment` knows by name."""
    return {name: train_transform(name) for name in AUGMENTATIONS}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; columns of numbers, percentages and empty cells only are aligned right."""
    columns = zip(*rows, strict=True)
    numeric = [all(re.fullmatch(r"[-+]?[\d.,]*( %)?", str(cell)) for cell in column) for column in columns]
    lines = [header, ["--:" if right else ":--" for right in numeric], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Write the list that `dataset.near_duplicates` reads."""
    text = "List CIFAR-100's test images that have a near-duplicate among the training images."
    parser = Parser(prog="python -m inspection.eda", description=text, allow_abbrev=False)
    add_data_dir(parser)
    args = parser.parse_args(argv)
    start_log(None)
    data = load_dataset("cifar100", args.data_dir, url=args.data_url)
    found = near_duplicates(data.test.images, data.train.images)
    head = (
        f"# Test images, counted from 0, with a similarity of {NEAR_DUPLICATE} or more to a training image,\n"
        "# as they are or mirrored. Made by: python -m inspection.eda\n"
    )
    lines = "".join(f"{index}\n" for index in found)
    atomic_write_text(dataset.NEAR_DUPLICATES, head + lines)
    LOG.info(f"{len(found):,} of {len(data.test):,} test images: {dataset.NEAR_DUPLICATES}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "python -m inspection.eda"))
