"""The published augmentation policies, against their tables and Pillow's operations."""

import math

import albumentations as A
import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from cifar import augment
from cifar import fast_transforms as fast


def test_autoaugment_is_the_published_table():
    published = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    named = [
        tuple((name, p, None if name in ("AutoContrast", "Equalize", "Invert") else m) for name, p, m in pair)
        for pair in published
    ]
    assert list(augment.AUTOAUGMENT_CIFAR10) == named


def signed_levels(
    name: str, low: float, high: float, strengths: dict[str, float], image: np.ndarray
) -> set[bytes]:
    """The results of 60 draws of one operation."""
    pipeline = fast.Pipeline([augment._operation(name, low, high, strengths, p=1)])
    pipeline.set_random_seed(0)
    return {pipeline.augment(image).tobytes() for _ in range(60)}


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("Brightness", ImageEnhance.Brightness),
        ("Contrast", ImageEnhance.Contrast),
        ("Color", ImageEnhance.Color),
        ("Sharpness", ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_pillows_to_rounding(name, enhancer, bright_images):
    for image in bright_images[:20]:
        results = signed_levels(name, 6 / 9, 6 / 9, augment.STRENGTHS, image)
        expected = [
            np.asarray(enhancer(Image.fromarray(image)).enhance(factor), int) for factor in (0.4, 1.6)
        ]
        assert len(results) == 2  # both signs
        for result in results:
            found = np.frombuffer(result, np.uint8).reshape(image.shape).astype(int)
            assert min(np.abs(found - other).max() for other in expected) <= 2


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
    bright = np.where(bright_images[0] > 150, 255, bright_images[0] // 2).astype(
        np.uint8
    )  # many pixels at the upper end
    for image in (*bright_images[:20], flat, bright):
        (result,) = signed_levels(name, fraction, fraction, augment.STRENGTHS, image)
        found = np.frombuffer(result, np.uint8).reshape(image.shape)
        np.testing.assert_array_equal(found, np.asarray(expected(Image.fromarray(image))))


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
        if not name.startswith("Translate"):
            np.testing.assert_allclose(shift, 0, atol=1e-9)
        else:
            np.testing.assert_allclose(matrix, np.eye(2))
        assert transform.interpolation == cv2.INTER_NEAREST and transform.fill == augment.MEAN_COLOUR
    np.testing.assert_allclose(sorted(found), [-value, value], atol=1e-9)


def test_policies_apply_one_hole_of_the_mean_colour_to_every_image(bright_images):
    for name in ("autoaugment", "randaugment", "trivialaugment"):
        pipeline = augment.train_transform(name)
        pipeline.set_random_seed(0)
        for image in bright_images[:50]:
            filled = (pipeline.augment(image) == augment.MEAN_COLOUR).all(axis=2)
            squares = cv2.erode(np.pad(filled, 8).astype(np.uint8), np.ones((16, 16), np.uint8))
            assert squares.any()


@pytest.mark.parametrize(
    ("name", "operations"), [("randaugment:3,9", 3), ("trivialaugment", 1), ("autoaugment", 2)]
)
def test_policies_have_their_number_of_operations(name, operations):
    policy = augment.train_transform(name).transforms[3]
    if isinstance(policy, A.RandomOrder):
        assert (policy.n, policy.replace, len(policy.transforms)) == (operations, True, 14)
    elif operations == 1:
        assert len(policy.transforms) == 14
    else:
        assert [len(pair.transforms) for pair in policy.transforms] == [2] * 25


def test_trivialaugment_reaches_its_wide_range(bright_images):
    rotate = augment._operation("Rotate", 0.0, 1.0, augment.WIDE_STRENGTHS, p=1)
    angles = [
        t.get_params_dependent_on_data({"shape": (32, 32)}, {})["rotate"] for t in rotate.transforms * 200
    ]
    assert -135 <= min(angles) < -130 and 130 < max(angles) <= 135
    posterize = augment._operation("Posterize", 0.0, 1.0, augment.WIDE_STRENGTHS, p=1)
    assert {posterize.get_params()["num_bits"] for _ in range(200)} == set(range(2, 9))
