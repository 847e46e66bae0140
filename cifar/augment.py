"""The named augmentations, as Albumentations pipelines: uint8 RGB [32, 32, 3] in and out.

Normalisation is not part of them: it runs on the device, on whole batches. Three operations of the published
policies (equalize, auto-contrast, sharpness) are implemented here, since Albumentations' transforms of those
names differ from Pillow's, which the papers used; everything else is the library's.
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from cifar import fast_transforms as fast
from cifar.fast_transforms import A, Image, Pipeline
from core.errors import UsageError

SIZE = 32  # image width and height in pixels

# The mean colour of CIFAR-100's training images: 255 * (0.5071, 0.4867, 0.4408). The policies' original code
# fills uncovered pixels with 0 after normalisation, which is this colour before it.
MEAN_COLOUR = (129, 124, 112)

# Cubuk et al. 2019 (arXiv:1805.09501), table 7: CIFAR-10's 25 sub-policies; each is two operations with
# probability and magnitude (0-9; None where the operation has none).
AUTOAUGMENT_CIFAR10 = AutoAugment(AutoAugmentPolicy.CIFAR10).policies

# The 14 operations of RandAugment and TrivialAugment.
OPERATIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
              "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")  # fmt: skip

# The maximum strength of each operation that has one, for AutoAugment (table 6) and RandAugment, and for
# TrivialAugment's wide space (Mueller & Hutter 2021, arXiv:2103.10158, table 1). Shear: tangent of the angle;
# translation: pixels (150/331 of the width in AutoAugment); rotation: degrees; color, contrast, brightness,
# sharpness: distance of the factor from 1; posterize: bits dropped. Solarize inverts up to the whole range.
STRENGTHS = {"Shear": 0.3, "Translate": SIZE * 150 / 331, "Rotate": 30.0, "Enhance": 0.9, "Posterize": 4}
WIDE_STRENGTHS = {"Shear": 0.99, "Translate": 32, "Rotate": 135.0, "Enhance": 0.99, "Posterize": 6}

Transforms = list[A.BasicTransform | A.BaseCompose]


def train_transform(name: str = "reference") -> Pipeline:
    """The augmentation called `name`; uint8 RGB [32, 32, 3] in, the same out.

    All random numbers come from the pipeline's own stream: `set_random_seed` determines everything that
    follows. `randaugment` takes its two numbers after a colon: `randaugment:2,14`.

    Raises:
        UsageError: the name is unknown; the message lists the known ones.
    """
    base, _, numbers = name.partition(":")
    if base == "randaugment" and numbers:
        try:
            n, m = map(int, numbers.split(","))
        except ValueError:
            n, m = 0, 0
        if not (1 <= n <= 10 and 0 <= m <= 30):
            raise UsageError(f"{name!r} is not randaugment:N,M with N from 1 to 10 and M from 0 to 30")
        return Pipeline(_randaugment(n, m))
    if name not in AUGMENTATIONS:
        raise UsageError(f"unknown augmentation {name!r}: choose one of {', '.join(AUGMENTATIONS)}")
    return Pipeline(AUGMENTATIONS[name]())


def _reference() -> Transforms:
    """Flip, affine, one 16x16 hole, colour jitter: each with probability 0.5.

    Horizontal and vertical scale are drawn independently, translations are whole pixels, and the pixels that
    the affine uncovers are black, as are the holes: Albumentations' defaults, since the reference names no
    others. Black is -1.9 (red), -1.9 (green), -1.6 (blue) standard deviations after normalisation.
    """
    return [
        fast.HorizontalFlip(p=0.5),
        fast.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5),
        _holes(1, p=0.5),
        fast.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, p=0.5),
    ]


def _holes(max_holes: int, p: float, fill: float | tuple[int, ...] = 0) -> A.BasicTransform:
    """1 to `max_holes` holes of 16x16 pixels, entirely inside the image."""
    size = (16, 16)
    return fast.CoarseDropout((1, max_holes), hole_height_range=size, hole_width_range=size, fill=fill, p=p)


def _standard() -> Transforms:
    """Pad by 4 black pixels, random 32x32 crop, flip: He et al. 2015 (arXiv:1512.03385), section 4.2."""
    return [A.Pad(padding=4, fill=0, p=1), A.RandomCrop(SIZE, SIZE, p=1), fast.HorizontalFlip(p=0.5)]


def _noise() -> Transforms:
    """The reference, then Gaussian noise (standard deviation 2 to 5 % of the range), probability 0.25."""
    return [*_reference(), A.GaussNoise(std_range=(0.02, 0.05), p=0.25)]


def _dropout() -> Transforms:
    """The reference with stronger dropout: one to three 16x16 holes, with probability 0.75."""
    flip, affine, _, jitter = _reference()
    return [flip, affine, _holes(3, p=0.75), jitter]


def _around(policy: A.BasicTransform | A.BaseCompose) -> Transforms:
    """Pad, crop and flip, then `policy`, then one hole: the order of the three papers' CIFAR experiments.

    Their cutout may extend beyond the border; this one lies inside, so it hides somewhat more.
    """
    return [*_standard(), policy, _holes(1, p=1.0, fill=MEAN_COLOUR)]


def _autoaugment() -> Transforms:
    """One of CIFAR-10's 25 published sub-policies for each image."""
    sub_policies = [
        A.Sequential(
            [_operation(name, (m or 0) / 9, (m or 0) / 9, STRENGTHS, p=p) for name, p, m in pair], p=1
        )
        for pair in AUTOAUGMENT_CIFAR10
    ]
    return _around(A.OneOf(sub_policies, p=1))


def _randaugment(n: int = 2, m: int = 14) -> Transforms:
    """`n` operations drawn with replacement, each at strength `m` of 30.

    Cubuk et al. 2020 (arXiv:1909.13719). The defaults are the paper's for WideResNet-28-10 on CIFAR-100; for
    WideResNet-28-2 it has 1 and 2.
    """
    operations = [_operation(name, m / 30, m / 30, STRENGTHS, p=1) for name in OPERATIONS]
    return _around(A.RandomOrder(operations, n=n, replace=True, p=1))


def _trivialaugment() -> Transforms:
    """One operation, its strength drawn uniformly from the wide range (the paper draws one of 31 levels)."""
    operations = [_operation(name, 0.0, 1.0, WIDE_STRENGTHS, p=1) for name in OPERATIONS]
    return _around(A.OneOf(operations, p=1))


def _operation(
    name: str, low: float, high: float, strengths: dict[str, float], p: float
) -> A.BasicTransform | A.BaseCompose:
    """The policy operation `name` at a strength drawn from `low` to `high` (fractions of the maximum).

    The sign of a shear, translation, rotation or enhancement is random too, as in torchvision's versions.
    Shears and rotations are about the image's centre (Pillow shears about its corner), with nearest-neighbour
    interpolation.
    """
    if name == "Identity":
        return A.NoOp(p=p)
    if name == "Invert":
        return A.InvertImg(p=p)
    if name in ("AutoContrast", "Equalize"):
        return A.Lambda(image=auto_contrast if name == "AutoContrast" else equalize, p=p)
    if name == "Posterize":
        return A.Posterize(num_bits=tuple(8 - round(strengths["Posterize"] * x) for x in (high, low)), p=p)
    if name == "Solarize":  # half a level below the threshold, so that rounding cannot miss it
        thresholds = tuple(max(0.0, (round(255 * (1 - x)) - 0.5) / 255) for x in (high, low))
        return A.Solarize(threshold_range=thresholds, p=p)
    both_signs = [_signed_operation(name, *sorted((sign * low, sign * high)), strengths) for sign in (1, -1)]
    return A.OneOf(both_signs, p=p)


def _signed_operation(name: str, low: float, high: float, strengths: dict[str, float]) -> A.BasicTransform:
    """A geometric operation or enhancement at a strength drawn from `low` to `high`, both of one sign."""
    if name in ("Brightness", "Contrast", "Color", "Sharpness"):
        factors = (1 + strengths["Enhance"] * low, 1 + strengths["Enhance"] * high)
        if name == "Sharpness":
            return Sharpness(factors=factors, p=1)
        one = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
        return A.ColorJitter(**(one | {"saturation" if name == "Color" else name.lower(): factors}), p=1)
    affine = functools.partial(A.Affine, interpolation=cv2.INTER_NEAREST, fill=MEAN_COLOUR, p=1)
    if name == "Rotate":
        return affine(rotate=(strengths["Rotate"] * low, strengths["Rotate"] * high))
    axis = name[-1].lower()
    if name.startswith("Shear"):
        angles = (math.degrees(math.atan(strengths["Shear"] * x)) for x in (low, high))
        return affine(shear={axis: tuple(angles)})
    return affine(translate_px={axis: tuple(int(strengths["Translate"] * x) for x in (low, high))})


def auto_contrast(image: Image, **_params: object) -> Image:
    """Stretch each channel to 0-255, as Pillow's `ImageOps.autocontrast` (truncated, not rounded)."""
    low, high = image.min(axis=(0, 1)).astype(float), image.max(axis=(0, 1)).astype(float)
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1.0)
    offset = np.where(high > low, -low * scale, 0.0)  # a constant channel is unchanged
    tables = np.arange(256)[:, None] * scale + offset
    return cv2.LUT(image, np.clip(tables, 0, 255).astype(np.uint8)[None])


def equalize(image: Image, **_params: object) -> Image:
    """Flatten each channel's histogram, as Pillow's `ImageOps.equalize`."""
    tables = np.empty((1, 256, image.shape[2]), np.uint8)
    for channel in range(image.shape[2]):
        histogram = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (image[..., channel].size - histogram[image[..., channel].max()]) // 255
        before = np.cumsum(histogram) - histogram  # pixels darker than each level
        table = (step // 2 + before) // step if step else np.arange(256)
        tables[0, :, channel] = np.minimum(table, 255)
    return cv2.LUT(image, tables)


class Sharpness(A.ImageOnlyTransform):
    """Pillow's `ImageEnhance.Sharpness`: factor 0 is a 3x3 smoothing (not of the border), 1 the image."""

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """The arguments that Albumentations validates."""

        factors: tuple[float, float]

    def __init__(self, factors: tuple[float, float], p: float = 0.5) -> None:
        super().__init__(p=p)
        self.factors = factors

    def get_params(self) -> dict[str, float]:
        """Draw the factor."""
        return {"factor": self.py_random.uniform(*self.factors)}

    def apply(self, img: Image, factor: float, **_params: object) -> Image:
        """Blend the image with its smoothing."""
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
        smooth = img.copy()
        smooth[1:-1, 1:-1] = cv2.filter2D(img, -1, kernel)[1:-1, 1:-1]
        return cv2.addWeighted(img, factor, smooth, 1 - factor, 0)


AUGMENTATIONS: dict[str, Callable[[], Transforms]] = {
    "reference": _reference,
    "none": list,
    "standard": _standard,
    "autoaugment": _autoaugment,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
    "noise": _noise,
    "dropout": _dropout,
}
