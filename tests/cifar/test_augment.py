"""The named augmentations: bounds, probabilities, seeding; the short path gives the library's bytes."""

import pickle
import random

import albumentations as A
import cv2
import numpy as np
import pytest

from cifar import augment
from cifar import fast_transforms as fast
from core.errors import UsageError

NAMES = [*augment.AUGMENTATIONS, "randaugment:1,2"]
FIRST, AFFINE, HOLE, JITTER = range(4)  # the reference's transforms


def only(index: int, p: float = 1.0) -> fast.Pipeline:
    """The reference's transform number `index` alone, applied with probability `p`."""
    pipeline = fast.Pipeline([augment.train_transform("reference").transforms[index]])
    pipeline.transforms[0].p = p
    pipeline.set_random_seed(1)
    return pipeline


# The short path


def as_the_library_draws(pipeline: A.Compose, seed: int) -> None:
    """Seed a plain Compose as Pipeline.set_random_seed does."""
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))


@pytest.mark.parametrize("name", NAMES)
def test_short_path_gives_the_bytes_of_the_library(name, bright_images):
    pipeline, library = augment.train_transform(name), augment.train_transform(name)
    plain = A.Compose(library.transforms)
    pipeline.set_random_seed(7)
    as_the_library_draws(plain, 7)
    for image in bright_images:
        np.testing.assert_array_equal(pipeline.augment(image), plain(image=image)["image"])


def test_reference_gives_the_bytes_of_plain_albumentations_transforms(bright_images):
    plain = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5),
            A.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=(16, 16), hole_width_range=(16, 16), p=0.5
            ),
            A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, p=0.5),
        ]
    )
    pipeline = augment.train_transform("reference")
    for seed in range(5):
        pipeline.set_random_seed(seed)
        as_the_library_draws(plain, seed)
        for image in bright_images:
            np.testing.assert_array_equal(pipeline.augment(image), plain(image=image)["image"])


@pytest.mark.parametrize(
    ("quick", "plain", "settings"),
    [
        (
            fast.Affine,
            A.Affine,
            {"shear": (-20, 20), "translate_percent": 0.2, "rotate": 90, "fill": (1, 2, 3)},
        ),
        (fast.Affine, A.Affine, {"scale": (0.5, 2), "fit_output": True}),
        (fast.Affine, A.Affine, {"scale": (0.5, 2), "keep_ratio": True, "translate_percent": 0.1, "fill": 9}),
        (fast.Affine, A.Affine, {"translate_px": 3, "border_mode": cv2.BORDER_REFLECT_101}),
        (fast.CoarseDropout, A.CoarseDropout, {"num_holes_range": (1, 4), "fill": (1, 2, 3)}),
        (fast.CoarseDropout, A.CoarseDropout, {"hole_height_range": (3, 3), "hole_width_range": (5, 5)}),
        (fast.CoarseDropout, A.CoarseDropout, {"hole_height_range": (3, 9), "hole_width_range": (5, 8)}),
        (fast.CoarseDropout, A.CoarseDropout, {"hole_height_range": (32, 32), "hole_width_range": (5, 5)}),
        (fast.CoarseDropout, A.CoarseDropout, {"fill": "random"}),
        (
            fast.ColorJitter,
            A.ColorJitter,
            {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5},
        ),
    ],
)
def test_each_short_path_equals_the_library_with_other_settings(quick, plain, settings, bright_images):
    ours, theirs = fast.Pipeline([quick(**settings, p=0.7)]), A.Compose([plain(**settings, p=0.7)])
    ours.set_random_seed(3)
    as_the_library_draws(theirs, 3)
    for image in bright_images[:100]:
        np.testing.assert_array_equal(ours.augment(image), theirs(image=image)["image"])


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone_and_the_form_kept(name, bright_images):
    pipeline = augment.train_transform(name)
    pipeline.set_random_seed(0)
    for image in bright_images[:100]:
        before = image.copy()
        after = pipeline.augment(image)
        np.testing.assert_array_equal(image, before)
        assert after.dtype == np.uint8 and after.shape == (32, 32, 3)


# Seeding


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_the_seed_fixes_all_draws_at_any_depth(name, bright_images):
    pipeline = augment.train_transform(name)
    copy = pickle.loads(pickle.dumps(pipeline))  # as a spawned worker gets it

    def run(transform, seed):
        transform.set_random_seed(seed)
        return np.stack([transform.augment(image) for image in bright_images])

    first = run(pipeline, 5)
    np.random.seed(9)  # the global generators must not matter
    random.seed(9)
    np.testing.assert_array_equal(run(pipeline, 5), first)
    np.testing.assert_array_equal(run(copy, 5), first)
    assert (run(pipeline, 6) != first).any(axis=(1, 2, 3)).mean() > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_one_generator_reaches_every_transform(name):
    pipeline = augment.train_transform(name)
    pipeline.set_random_seed(1)

    def walk(transforms):
        for transform in transforms:
            yield transform
            yield from walk(
                getattr(transform, "transforms", []) if isinstance(transform, A.BaseCompose) else []
            )

    for transform in walk(pipeline.transforms):
        assert transform.random_generator is pipeline.random_generator
        assert transform.py_random is pipeline.py_random


def test_transforms_are_applied_independently_right_after_seeding(bright_images):
    """The library's own seeding fails this: all of one probability are applied to a first image, or none."""
    pipeline = fast.Pipeline([fast.HorizontalFlip(p=0.5), A.InvertImg(p=0.5)])
    counts = {(flipped, inverted): 0 for flipped in (False, True) for inverted in (False, True)}
    image = bright_images[0]
    variants = {
        (flipped, inverted): (255 - image if inverted else image)[:, :: -1 if flipped else 1].tobytes()
        for flipped, inverted in counts
    }
    for seed in range(400):
        pipeline.set_random_seed(seed)
        result = pipeline.augment(image).tobytes()
        counts[next(key for key, bytes_ in variants.items() if bytes_ == result)] += 1
    assert min(counts.values()) > 60  # 100 expected, standard deviation 8.7


# The reference's transforms


def test_flip_is_exact(bright_images):
    np.testing.assert_array_equal(only(FIRST).augment(bright_images[0]), bright_images[0][:, ::-1])


def test_affine_stays_within_its_bounds():
    transform = only(AFFINE).transforms[0]
    matrices = np.stack([transform._draw_matrix(32, 32) for _ in range(2000)])
    linear = matrices[:, :, :2]
    scales = np.linalg.norm(linear, axis=1)  # length of each column: scale in x, in y
    angles = np.degrees(np.arctan2(linear[:, 0, 1], linear[:, 1, 1]))
    centre = np.array([15.5, 15.5])
    shifts = linear @ centre + matrices[:, :, 2] - centre
    for values, low, high in ((scales, 0.9, 1.1), (angles, -15, 15), (shifts, -3, 3)):
        margin = 0.02 * (high - low)
        assert low - 1e-9 <= values.min() < low + margin  # never outside, and nearly reached
        assert high - margin < values.max() <= high + 1e-9
    np.testing.assert_allclose(shifts, np.round(shifts), atol=1e-9)  # whole pixels, at most int(3.2)
    np.testing.assert_allclose((linear[:, :, 0] * linear[:, :, 1]).sum(axis=1), 0, atol=1e-12)  # no shear
    assert abs(np.corrcoef(scales.T)[0, 1]) < 0.1  # x and y are scaled independently


def test_affine_moves_a_white_image_within_black(bright_images):
    white = np.full((32, 32, 3), 255, np.uint8)
    pipeline = only(AFFINE)
    uncovered = [(pipeline.augment(white) == 0).all(axis=2).mean() for _ in range(200)]
    assert 0 < np.mean(uncovered) < 0.2 and max(uncovered) < 0.45


def test_hole_is_one_black_square_anywhere_inside(bright_images):
    pipeline = only(HOLE)
    corners = set()
    for image in np.repeat(bright_images, 5, axis=0):
        result = pipeline.augment(image)
        hole = (result == 0).all(axis=2)
        top, left = np.argwhere(hole)[0]
        assert hole.sum() == 16 * 16 and hole[top : top + 16, left : left + 16].all()
        np.testing.assert_array_equal(result[~hole], image[~hole])
        corners.add((int(top), int(left)))
    tops, lefts = zip(*corners, strict=True)
    assert {min(tops), min(lefts)} == {0} and {max(tops), max(lefts)} == {16}


def test_jitter_stays_within_its_bounds(bright_images):
    transform = only(JITTER).transforms[0]
    assert (transform.brightness, transform.contrast, transform.saturation) == ((0.8, 1.2),) * 3
    assert transform.hue == (-0.1, 0.1)
    gray = np.full((32, 32, 3), 100, np.uint8)  # contrast, saturation and hue leave it: brightness alone
    pipeline = only(JITTER)
    levels = [int(pipeline.augment(gray)[0, 0, 0]) for _ in range(500)]
    assert 79 <= min(levels) <= 82 and 118 <= max(levels) <= 120
    red = np.full((32, 32, 3), (200, 40, 40), np.uint8)
    hues = [cv2.cvtColor(pipeline.augment(red)[:1, :1], cv2.COLOR_RGB2HSV)[0, 0, 0] for _ in range(500)]
    signed = (np.array(hues, float) + 90) % 180 - 90
    assert -19.5 <= signed.min() < -16 and 16 < signed.max() <= 19.5  # 18 of 180, and rounding


@pytest.mark.parametrize("index", [FIRST, AFFINE, HOLE, JITTER])
def test_each_transform_is_applied_to_half_of_the_images(index, bright_images):
    probability = augment.train_transform("reference").transforms[index].p
    pipeline = only(index, probability)
    changed = sum((pipeline.augment(image) != image).any() for image in np.repeat(bright_images, 4, axis=0))
    assert 530 < changed < 670  # 600 expected, standard deviation 17; a few draws change nothing


# The other pipelines


def test_none_changes_nothing(bright_images):
    pipeline = augment.train_transform("none")
    assert all((pipeline.augment(image) == image).all() for image in bright_images[:20])


def test_standard_is_a_crop_of_the_padded_image_or_its_mirror(bright_images):
    pipeline = augment.train_transform("standard")
    pipeline.set_random_seed(2)
    seen = set()
    for image in np.repeat(bright_images[:30], 10, axis=0):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        crops = {
            padded[top : top + 32, left : left + 32][:, ::sign].tobytes(): (top, left, sign)
            for top in range(9)
            for left in range(9)
            for sign in (1, -1)
        }
        seen.add(crops[pipeline.augment(image).tobytes()])
    tops, lefts, signs = (set(values) for values in zip(*seen, strict=True))
    assert tops == lefts == set(range(9)) and signs == {1, -1}


def test_noise_adds_noise_to_a_quarter(bright_images):
    gray = np.full((32, 32, 3), 128, np.uint8)
    pipeline = fast.Pipeline([augment.train_transform("noise").transforms[-1]])
    pipeline.set_random_seed(0)
    deviations = np.array([pipeline.augment(gray).std() for _ in range(800)])
    noisy = deviations[deviations > 0]
    assert 150 < len(noisy) < 250  # 200 expected, standard deviation 12
    assert 4.5 < noisy.min() < 6 and 12 < noisy.max() < 13.5  # 0.02 and 0.05 of 255


def test_dropout_makes_up_to_three_holes(bright_images):
    pipeline = fast.Pipeline([augment.train_transform("dropout").transforms[HOLE]])
    pipeline.set_random_seed(0)
    areas = np.array(
        [(pipeline.augment(image) == 0).all(axis=2).sum() for image in np.repeat(bright_images, 3, axis=0)]
    )
    assert 0.7 < (areas > 0).mean() < 0.8
    assert areas[areas > 0].min() == 256 and 512 < areas.max() <= 768


# Wrong names


WRONG = ("", "Reference", "cutout", "standard:1,2")
WRONG_NUMBERS = ("", "0,5", "2,31", "two,3", "1", "1,2,3")


@pytest.mark.parametrize("name", [*WRONG, *(f"randaugment:{numbers}" for numbers in WRONG_NUMBERS)])
def test_wrong_names_are_refused_in_one_line(name):
    with pytest.raises(UsageError) as caught:
        augment.train_transform(name)
    assert "\n" not in str(caught.value) and "randaugment" in str(caught.value)
