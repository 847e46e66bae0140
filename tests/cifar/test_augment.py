"""The named augmentations: fast paths against the library, seeding, bounds, the published policies."""

import math
import pickle
import random
from collections import Counter

import albumentations as A
import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cifar import augment
from cifar import fast_transforms as fast
from core.errors import UsageError

NAMES = [*augment.AUGMENTATIONS, "randaugment:1,2"]


def only(name: str, index: int, p: float | None = None) -> fast.Pipeline:
    """Transform number `index` of an augmentation alone, with probability `p` (None: its own)."""
    pipeline = fast.Pipeline([augment.train_transform(name).transforms[index]])
    pipeline.transforms[0].p = pipeline.transforms[0].p if p is None else p
    pipeline.set_random_seed(1)
    return pipeline


# The fast path


def as_the_library_draws(pipeline: A.Compose, seed: int) -> None:
    """Seed a plain Compose as Pipeline.set_random_seed does."""
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))


@pytest.mark.parametrize("name", NAMES)
def test_fast_path_returns_the_bytes_of_the_library_and_leaves_the_input_alone(name, bright_images):
    pipeline, library = augment.train_transform(name), augment.train_transform(name)
    plain = A.Compose(library.transforms)
    pipeline.set_random_seed(7)
    as_the_library_draws(plain, 7)
    for image in bright_images:
        before = image.copy()
        after = pipeline.augment(image)
        assert after.dtype == np.uint8 and after.shape == (32, 32, 3)
        np.testing.assert_array_equal(after, plain(image=image)["image"])
        np.testing.assert_array_equal(image, before)
        assert name != "none" or (after == before).all()


def test_reference_returns_the_bytes_of_plain_albumentations_transforms(bright_images):
    plain = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5),
            A.CoarseDropout((1, 1), hole_height_range=(16, 16), hole_width_range=(16, 16), p=0.5),
            A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, p=0.5),
        ]
    )
    pipeline = augment.train_transform("reference")
    pipeline.set_random_seed(0)
    as_the_library_draws(plain, 0)
    for image in np.repeat(bright_images, 4, axis=0):
        np.testing.assert_array_equal(pipeline.augment(image), plain(image=image)["image"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Affine", {"shear": (-20, 20), "translate_percent": 0.2, "rotate": 90, "fill": (1, 2, 3)}),
        ("Affine", {"scale": (0.5, 2), "fit_output": True}),
        ("Affine", {"scale": (0.5, 2), "keep_ratio": True, "translate_percent": 0.1, "fill": 9}),
        ("Affine", {"translate_px": 3, "border_mode": cv2.BORDER_REFLECT_101}),
        ("CoarseDropout", {"num_holes_range": (1, 4), "fill": (1, 2, 3)}),
        ("CoarseDropout", {"hole_height_range": (3, 3), "hole_width_range": (5, 5)}),
        ("CoarseDropout", {"hole_height_range": (3, 9), "hole_width_range": (5, 8)}),
        ("CoarseDropout", {"hole_height_range": (32, 32), "hole_width_range": (5, 5)}),
        ("CoarseDropout", {"fill": "random"}),
        ("ColorJitter", {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5}),
    ],
)
def test_each_fast_path_equals_the_library_with_other_settings(name, settings, bright_images):
    ours = fast.Pipeline([getattr(fast, name)(**settings, p=0.7)])
    theirs = A.Compose([getattr(A, name)(**settings, p=0.7)])
    ours.set_random_seed(3)
    as_the_library_draws(theirs, 3)
    for image in bright_images[:100]:
        np.testing.assert_array_equal(ours.augment(image), theirs(image=image)["image"])


# Seeding


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_the_seed_determines_all_draws_at_any_depth(name, bright_images):
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


def test_transforms_are_applied_independently_right_after_seeding(bright_images):
    """The library's own seeding fails this: a first image gets all transforms of one probability or none."""
    pipeline = fast.Pipeline([fast.HorizontalFlip(p=0.5), A.InvertImg(p=0.5)])
    image, counts = bright_images[0], Counter()
    for seed in range(400):
        pipeline.set_random_seed(seed)
        counts[pipeline.augment(image).tobytes()] += 1
    assert len(counts) == 4
    assert min(counts.values()) > 60  # 100 expected, standard deviation 8.7


# The unpublished augmentations


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
    pipeline = only("noise", -1)
    deviations = np.array([pipeline.augment(gray).std() for _ in range(800)])
    noisy = deviations[deviations > 0]
    assert 150 < len(noisy) < 250  # 200 expected, standard deviation 12
    assert 4.5 < noisy.min() < 6 and 12 < noisy.max() < 13.5  # 0.02 and 0.05 of 255


def test_dropout_makes_up_to_three_holes(bright_images):
    pipeline = only("dropout", 2)
    areas = np.array(
        [(pipeline.augment(image) == 0).all(axis=2).sum() for image in np.repeat(bright_images, 3, axis=0)]
    )
    assert 0.7 < (areas > 0).mean() < 0.8
    assert areas[areas > 0].min() == 256 and 512 < areas.max() <= 768


# The published policies


def results_of(name: str, fraction: float, image: np.ndarray) -> list[np.ndarray]:
    """The different results of 60 draws of one operation."""
    pipeline = fast.Pipeline([augment._operation(name, fraction, fraction, augment.STRENGTHS, p=1)])
    pipeline.set_random_seed(0)
    results = {pipeline.augment(image).tobytes() for _ in range(60)}
    return [np.frombuffer(result, np.uint8).reshape(image.shape) for result in results]


@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color", "Sharpness"])
def test_enhancements_are_pillows_to_rounding(name, bright_images):
    for image in bright_images[:20]:
        enhancer = getattr(ImageEnhance, name)(Image.fromarray(image))
        expected = [np.asarray(enhancer.enhance(factor), int) for factor in (0.4, 1.6)]
        results = results_of(name, 6 / 9, image)
        assert len(results) == 2  # both signs
        for result in results:
            assert min(np.abs(result.astype(int) - other).max() for other in expected) <= 2


@pytest.mark.parametrize(
    ("name", "fraction", "expected"),
    [
        ("AutoContrast", 0, ImageOps.autocontrast),
        ("Equalize", 0, ImageOps.equalize),
        ("Invert", 0, ImageOps.invert),
        ("Posterize", 7 / 9, lambda image: ImageOps.posterize(image, 5)),
        ("Solarize", 3 / 9, lambda image: ImageOps.solarize(image, 170)),
        ("Identity", 0, lambda image: image),
    ],
)
def test_tone_operations_are_pillows(name, fraction, expected, bright_images):
    flat = np.full((32, 32, 3), 200, np.uint8)
    saturated = np.where(bright_images[0] > 150, 255, bright_images[0] // 2).astype(np.uint8)
    for image in (*bright_images[:20], flat, saturated):
        (result,) = results_of(name, fraction, image)
        np.testing.assert_array_equal(result, np.asarray(expected(Image.fromarray(image))))


@pytest.mark.parametrize(
    ("name", "fraction", "value"),
    [
        ("ShearX", 8 / 9, 0.3 * 8 / 9),
        ("ShearY", 7 / 9, 0.3 * 7 / 9),
        ("TranslateX", 1.0, 14),
        ("TranslateY", 3 / 9, 4),
        ("Rotate", 2 / 9, 30 * 2 / 9),
    ],
)
def test_geometric_operations_move_by_their_strength_both_ways(name, fraction, value, bright_images):
    pipeline = augment._operation(name, fraction, fraction, augment.STRENGTHS, p=1)
    found = []
    for transform in pipeline.transforms:
        params = transform.get_params_dependent_on_data({"shape": (32, 32, 3)}, {})
        matrix, centre = params["matrix"][:2, :2], np.array([15.5, 15.5])
        shift = matrix @ centre + params["matrix"][:2, 2] - centre
        entry = {
            "ShearX": matrix[0, 1],
            "ShearY": matrix[1, 0],
            "TranslateX": shift[0],
            "TranslateY": shift[1],
            "Rotate": math.degrees(math.atan2(matrix[0, 1], matrix[0, 0])),
        }
        found.append(entry[name])
        unchanged, expected = (matrix, np.eye(2)) if name.startswith("Translate") else (shift, 0)
        np.testing.assert_allclose(unchanged, expected, atol=1e-9)
        assert transform.interpolation == cv2.INTER_NEAREST and transform.fill == augment.MEAN_COLOUR
    np.testing.assert_allclose(sorted(found), [-value, value], atol=1e-9)


@pytest.mark.parametrize("name", ["autoaugment", "randaugment", "trivialaugment"])
def test_policies_apply_one_hole_of_the_mean_colour_to_every_image(name, bright_images):
    pipeline = augment.train_transform(name)
    pipeline.set_random_seed(0)
    for image in bright_images[:50]:
        filled = (pipeline.augment(image) == augment.MEAN_COLOUR).all(axis=2)
        assert cv2.erode(np.pad(filled, 8).astype(np.uint8), np.ones((16, 16), np.uint8)).any()


def test_policies_have_their_number_of_operations():
    autoaugment, randaugment, trivialaugment = (
        augment.train_transform(name).transforms[3]
        for name in ("autoaugment", "randaugment:3,9", "trivialaugment")
    )
    assert [len(pair.transforms) for pair in autoaugment.transforms] == [2] * 25
    assert (randaugment.n, randaugment.replace, len(randaugment.transforms)) == (3, True, 14)
    assert len(trivialaugment.transforms) == 14


def test_trivialaugment_reaches_its_wide_range(bright_images):
    rotate = augment._operation("Rotate", 0.0, 1.0, augment.WIDE_STRENGTHS, p=1)
    angles = [
        t.get_params_dependent_on_data({"shape": (32, 32)}, {})["rotate"] for t in rotate.transforms * 200
    ]
    assert -135 <= min(angles) < -130 and 130 < max(angles) <= 135
    posterize = augment._operation("Posterize", 0.0, 1.0, augment.WIDE_STRENGTHS, p=1)
    assert {posterize.get_params()["num_bits"] for _ in range(200)} == set(range(2, 9))


# Wrong names


NUMBERS = ("", "0,5", "2,31", "two,3", "1", "1,2,3")


@pytest.mark.parametrize(
    "name", ["", "Reference", "cutout", "standard:1,2", *(f"randaugment:{numbers}" for numbers in NUMBERS)]
)
def test_wrong_names_are_refused_in_one_line(name):
    with pytest.raises(UsageError) as caught:
        augment.train_transform(name)
    assert "\n" not in str(caught.value) and "randaugment" in str(caught.value)
