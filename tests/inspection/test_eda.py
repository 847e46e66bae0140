"""Data analysis: exact statistics, planted outliers and duplicates, augmented examples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cifar import dataset
from cifar.augment import OPERATIONS, train_transform
from cifar.dataset import DatasetUnavailable, ImageData, Split, load_dataset
from core.errors import UsageError
from helpers.tiny_cifar import install_tiny_cifar, tiny_contents
from inspection import eda


def noise(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 32, 32, 3]: blocks of 4x4 pixels of random colour, which shrinking to 16x16 keeps."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def test_synthetic_images_stand_in_under_their_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.tile(np.arange(100, dtype=np.int64), 8)
    split = Split(np.zeros((800, 32, 32, 3), np.uint8), labels)
    names = tuple(str(label) for label in range(100))

    def load(name: str, _data_dir: object) -> ImageData:
        if name == "cifar100":
            raise DatasetUnavailable("no source")
        return ImageData(name, split, split, names, names[:20], np.arange(100) // 5)

    monkeypatch.setattr(eda, "load_dataset", load)
    data = eda.load_images("cifar100", "nowhere")
    assert (data.name, len(data.train), len(data.test)) == ("synthetic", 800, 800)
    data = eda.load_images("cifar100", "nowhere", 500)
    assert np.bincount(data.train.labels).tolist() == [5] * 100
    assert np.bincount(data.test.labels).tolist() == [1] * 100, "a fifth as many"
    for count in (0, 499, 801):
        with pytest.raises(UsageError):
            eda.load_images("synthetic", "nowhere", count)


def test_channel_statistics_are_those_of_the_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    images[..., 1] //= 2  # so that swapped channels show
    histogram = eda.level_histogram(images)
    mean, std = eda.channel_statistics(histogram)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12)
    values = 1 + 2 * np.arange(256) / 255
    mean, std = eda.channel_statistics(histogram, np.stack([values] * 3))
    np.testing.assert_allclose(mean, (1 + images / 255 * 2).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255 * 2).std(axis=(0, 1, 2)), rtol=1e-12)


def test_mean_images_are_per_group() -> None:
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (10, 255, 20, 254)])
    means = eda.mean_images(images, np.array([1, 0, 1, 0]), 2)
    assert means[0].min() == means[0].max() == 254.5
    assert means[1].min() == means[1].max() == 15


def test_image_statistics_of_known_images() -> None:
    grey, red, split = np.full((3, 32, 32, 3), 0, np.uint8)
    grey[...] = 100
    red[..., 0] = 240
    split[:16] = 200
    found = eda.image_statistics(np.stack([grey, red, split]), block=2)
    np.testing.assert_allclose(found.brightness, [100, 80, 100])
    np.testing.assert_allclose(found.contrast, [0, 0, 100])
    np.testing.assert_allclose(found.colour, [0, 240, 0])
    first = {name: indices.tolist() for name, indices in eda.extremes(found, 2).items()}
    assert first == {"darkest": [1, 0], "brightest": [0, 2], "least contrast": [0, 1],
                     "most contrast": [2, 0], "most colourful": [1, 0]}  # fmt: skip


def test_identical_images_are_found_and_one_level_more_is_another_image() -> None:
    gallery = noise(5)
    queries = gallery[[3, 1, 4]].copy()
    queries[1, 0, 0, 0] ^= 1
    assert eda.identical(queries, gallery).tolist() == [3, -1, 4]
    assert eda.identical(gallery[[0, 1, 0, 2, 1, 0]]).tolist() == [-1, -1, 0, -1, 1, 0]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nothing": lambda images: images,
    "darker": lambda images: (images * 0.6).astype(np.uint8),
    "a colour cast": lambda images: (images * 0.6 + [60, 0, 30]).astype(np.uint8),
    "noise": lambda images: np.clip(
        images + np.random.default_rng(1).normal(0, 8, images.shape), 0, 255
    ).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_planted_near_duplicates_are_found(change: str) -> None:
    train, unrelated = noise(400), noise(20, seed=9)
    queries = np.concatenate([CHANGES[change](train[50:60]), unrelated])
    whiten = eda.Whitening.fit(train, components=64)
    similarity, index = eda.nearest(whiten(queries), whiten(train), block=7)
    assert index[:10].tolist() == list(range(50, 60))
    assert similarity[:10].min() > 0.8 and similarity[10:].max() < 0.6


def test_whitening_tells_images_apart_that_share_a_strong_pattern() -> None:
    """Light above dark, as in any landscape: plain correlation is nearly 1, and means nothing."""
    images = (noise(400) // 8).astype(np.int64)
    images[:, :16] += 200
    images = images.astype(np.uint8)
    pooled = eda._pooled(images[:2])
    assert pooled[0] @ pooled[1] > 0.95
    images[0] = 7  # a uniform image is no error
    vectors = eda.Whitening.fit(images, components=64)(images)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)
    similarity, _ = eda.nearest(vectors)
    assert similarity.max() < 0.7


@pytest.mark.parametrize("block", [1, 4, 100])
def test_nearest_among_themselves_leaves_the_image_itself_out(block: int) -> None:
    vectors, blocks = np.eye(5, dtype=np.float32)[[0, 1, 0, 2]], []
    similarity, index = eda.nearest(vectors, block=block, progress=lambda n: blocks.append(n) or range(n))
    assert index[[0, 2]].tolist() == [2, 0]
    assert similarity.tolist() == [1, 0, 1, 0]
    assert blocks == [-(-4 // block)]


def test_the_command_lists_copies_as_they_are_and_mirrored(monkeypatch, tmp_path: Path, capsys) -> None:
    contents = tiny_contents()
    train, test = (contents[name]["data"].reshape(-1, 3, 32, 32) for name in ("train", "test"))
    test[90], test[7] = train[3] // 2, train[150, :, :, ::-1]
    install_tiny_cifar(monkeypatch, contents).lay(tmp_path)
    monkeypatch.setattr(dataset, "NEAR_DUPLICATES", tmp_path / "list.txt")
    assert eda.main(["--data-dir", str(tmp_path)]) == 0
    assert dataset.near_duplicates().tolist() == [7, 90]
    assert "2 of 100 test images" in capsys.readouterr().out


def test_the_list_of_near_duplicates_is_sorted_and_of_the_test_images() -> None:
    found = dataset.near_duplicates()
    assert (found.dtype, found.shape) == (np.int64, (418,))
    assert found[0] >= 0 and found[-1] < 10_000 and (np.diff(found) > 0).all()


@pytest.mark.real_data
def test_a_sample_of_the_list_is_what_the_search_finds(real_data_dir: Path) -> None:
    data, listed = load_dataset("cifar100", real_data_dir), dataset.near_duplicates()
    others = np.setdiff1d(np.arange(10_000), listed)
    sample = np.concatenate([listed[::10], others[::100]])
    found = sample[eda.near_duplicates(data.test.images[sample], data.train.images)]
    # a similarity within rounding of the threshold may fall on either side
    assert len(np.setxor1d(found, listed[::10])) <= 1


def test_bands_count_pairs_and_examples_spread_from_the_top_of_a_band_to_its_end() -> None:
    similarity, agrees = np.array([0.1, 0.5, 0.6, 1.0]), np.array([True, True, False, False])
    counts, percent = eda.agreement_by_band(similarity, agrees, np.array([0, 0.5, 0.75, 0.9, 1.0]))
    assert counts.tolist() == [1, 2, 0, 1]
    np.testing.assert_array_equal(percent, [100, 50, np.nan, 0])
    similarity = np.array([0.9, 0.1, 0.5, 0.7, 0.6, 0.8])
    assert eda.spread_over(similarity, 0.5, 0.9, 10).tolist() == [5, 3, 4, 2]
    assert eda.spread_over(similarity, 0.5, 0.9, 2).tolist() == [5, 2]
    assert eda.spread_over(similarity, 0.95, 1.0, 2).tolist() == []


def test_pairs_are_stacked_and_filled_up_with_white() -> None:
    upper, lower = noise(2), noise(2, seed=1)
    pairs = eda.stack_pairs(upper, lower, 3)
    assert pairs.shape == (3, 66, 32, 3)
    np.testing.assert_array_equal(pairs[:2, :32], upper)
    np.testing.assert_array_equal(pairs[:2, 34:], lower)
    assert (pairs[2] == 255).all() and (pairs[:, 32:34] == 255).all()


def test_rows_of_pairs_have_the_partner_below_and_name_both_labels_where_they_differ() -> None:
    upper, lower = Split(noise(3), np.array([0, 1, 2])), Split(noise(2, seed=1), np.array([1, 2]))
    chosen, partner = [np.array([1, 0]), np.array([2])], np.array([0, 0, 1])
    tiles, captions = eda.pair_rows(chosen, upper, lower, partner, ("a", "b", "c"), 2)
    np.testing.assert_array_equal(tiles[0], eda.stack_pairs(upper.images[[1, 0]], lower.images[[0, 0]], 2))
    np.testing.assert_array_equal(tiles[1], eda.stack_pairs(upper.images[[2]], lower.images[[1]], 2))
    assert captions == [["b", "a\n/ b"], ["c", ""]]


def test_most_alike_means_and_the_nearest_mean() -> None:
    means = np.stack([np.full((32, 32, 3), level, float) for level in (0, 100, 110, 250)])
    distances = eda.class_distances(means)
    assert distances[0, 3] == distances[3, 0] == 250 and np.isinf(np.diag(distances)).all()
    assert eda.most_alike(distances, 2) == [(1, 2, 10.0), (0, 1, 100.0)]
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (3, 104, 106, 200)])
    assert eda.nearest_mean(images, means).tolist() == [0, 1, 2, 3]


def test_an_image_is_augmented_by_its_number_alone() -> None:
    images, pipeline = noise(3), train_transform("reference")
    first = eda.augmented(pipeline, images, seed=5)
    assert first.dtype == np.uint8 and first.shape == images.shape
    np.testing.assert_array_equal(first, eda.augmented(pipeline, images, seed=5))
    np.testing.assert_array_equal(first[1:], eda.augmented(pipeline, images[1:], seed=6))
    same = eda.augmented(pipeline, np.stack([images[0]] * 8), seed=0)
    assert len(np.unique(same, axis=0)) > 2


def test_single_transforms_are_always_applied() -> None:
    transforms = eda.single_transforms()
    assert list(transforms)[:4] == ["HorizontalFlip", "Affine", "CoarseDropout", "ColorJitter"]
    images = np.maximum(noise(20), 1)
    results = {name: eda.augmented(pipeline, images, seed=0) for name, pipeline in transforms.items()}
    for name, result in results.items():
        assert result.shape == images.shape
        assert (result != images).any(axis=(1, 2, 3)).all(), name
    np.testing.assert_array_equal(results["HorizontalFlip"], images[:, :, ::-1])
    holes = (results["CoarseDropout"] == 0).all(axis=3).sum(axis=(1, 2))
    assert (holes == 16 * 16).all()
    named = train_transform("reference").transforms
    assert [transform.p for transform in named] == [0.5] * 4, "the named pipeline is left as it is"


def test_policy_operations_do_what_they_are_called() -> None:
    operations = eda.policy_operations()
    assert tuple(operations) == OPERATIONS
    images = noise(4)
    done = {name: eda.augmented(pipeline, images, seed=0) for name, pipeline in operations.items()}
    np.testing.assert_array_equal(done["Identity"], images)
    assert (done["Posterize"] % 16 == 0).all()  # 4 of 8 bits are left
    np.testing.assert_array_equal(done["Solarize"], 255 - images)
    assert (done["TranslateX"] != images).any() and (done["Rotate"] != images).any()


def test_markdown_table_aligns_numbers_right() -> None:
    table = eda.markdown_table(("name", "count", "percent"), [("a", "1,000", "2.5 %"), ("b", 3, "")])
    head = ["| name | count | percent |", "| :-- | --: | --: |"]
    assert table.splitlines() == [*head, "| a | 1,000 | 2.5 % |", "| b | 3 |  |"]
