"""Albumentations' own transforms with a fast path for a small RGB image.

On 32x32 images the library's bookkeeping (keyword dictionaries, shape checks, matrices for bounding boxes)
takes several times as long as the pixels. Each class here is the library's class with one more method,
`augment(image) -> image`, which draws the same numbers from the same generators in the same order and returns
the same bytes as `transform(image=image)["image"]`; the tests compare the two. Settings that the fast path
does not support use the library's code. No `augment` modifies its input.

It pays where the loader limits training, as on a GPU. `python benchmark.py --quick` measured a loader 6.6
times as fast as one that calls the library for each image and normalises there (31,761 and 4,846 images/s in
one process; README, Speed). A CPU trains a ResNet-56 on a few hundred images/s: there it saves some percent.
"""

import functools
import math
import os
import random

# Before the import: without it, albumentations looks up its newest version on PyPI, in every worker.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # [H, W, 3], RGB

_LEVELS = np.arange(256, dtype=np.float32)


class Pipeline(A.Compose):
    """`A.Compose` for single uint8 images, with one random stream and without per-call shape checks.

    Calling it (`pipeline(image=image)["image"]`) runs the library's code; `augment` is the fast path.
    """

    def __init__(self, transforms: list[A.BasicTransform | A.BaseCompose]) -> None:
        super().__init__(transforms, is_check_shapes=False)

    def set_random_seed(self, seed: int | None) -> None:
        """Seed the one stream from which this pipeline and all transforms in it, at any depth, draw.

        Albumentations 2.0 gives each transform a generator of its own, all with the same seed: their first
        draws are then equal, so that the first image after each seeding gets either all transforms of equal
        probability or none of them. Drawing in turn from one shared stream keeps them independent.
        """
        self.seed = seed
        self.set_random_state(np.random.default_rng(seed), random.Random(seed))

    def augment(self, image: Image) -> Image:
        """The augmented image, as `self(image=image)["image"]`; `image` itself if nothing was applied."""
        self.py_random.random()  # Compose draws for its own probability, even where that is 1
        for transform in self.transforms:
            fast_path = getattr(transform, "augment", None)
            image = fast_path(image) if fast_path else transform(image=image)["image"]
        return image


class HorizontalFlip(A.HorizontalFlip):
    """`A.HorizontalFlip` with the fast path."""

    def augment(self, image: Image) -> Image:
        """Mirror left and right, with probability p."""
        return cv2.flip(image, 1) if self.should_apply() else image


class Affine(A.Affine):
    """`A.Affine` with the fast path, for `translate_percent`, `scale`, `rotate` and `shear` ranges."""

    def augment(self, image: Image) -> Image:
        """Warp by a random matrix, with probability p."""
        if self.translate_percent is None or self.fit_output or self.keep_ratio or self.balanced_scale:
            return self(image=image)["image"]
        if not self.should_apply():
            return image
        height, width, channels = image.shape
        fill = (self.fill,) * channels if isinstance(self.fill, int | float) else self.fill
        matrix, size = self._draw_matrix(height, width), (width, height)
        return cv2.warpAffine(image, matrix, size, None, self.interpolation, self.border_mode, fill)

    def _draw_matrix(self, height: int, width: int) -> NDArray[np.float64]:
        """A random 2x3 matrix: scale, rotate and shear about the image's centre, then translate."""
        uniform = self.py_random.uniform
        shift_x = int(uniform(*self.translate_percent["x"]) * width)  # whole pixels, as the library
        shift_y = int(uniform(*self.translate_percent["y"]) * height)
        shear_x = math.tan(math.radians(-uniform(*self.shear["x"])))
        shear_y = math.tan(math.radians(-uniform(*self.shear["y"])))
        scale_x, scale_y = uniform(*self.scale["x"]), uniform(*self.scale["y"])
        angle = math.radians(uniform(*self.rotate))
        cos, sin = math.cos(angle), math.sin(angle)
        a, b = (cos - shear_x * sin) * scale_x, (sin + shear_x * cos) * scale_y
        c, d = (shear_y * cos - sin) * scale_x, (shear_y * sin + cos) * scale_y
        x, y = width / 2 - 0.5, height / 2 - 0.5
        return np.array([[a, b, x + shift_x - a * x - b * y], [c, d, y + shift_y - c * x - d * y]])


class CoarseDropout(A.CoarseDropout):
    """`A.CoarseDropout` with the fast path, for holes of one size in pixels and a numeric fill."""

    def augment(self, image: Image) -> Image:
        """Fill the holes, with probability p. They lie entirely inside the image and may overlap."""
        (hole_height, max_height), (hole_width, max_width) = self.hole_height_range, self.hole_width_range
        height, width = image.shape[:2]
        one_size = (hole_height, hole_width) == (max_height, max_width)
        fits = 1 < hole_height <= height and 1 < hole_width <= width
        if not (one_size and fits) or isinstance(self.fill, str):
            return self(image=image)["image"]
        if not self.should_apply():
            return image
        holes = range(self.py_random.randint(*self.num_holes_range))
        integers = self.random_generator.integers
        tops = [integers(0, height - hole_height + 1) for _ in holes]
        lefts = [integers(0, width - hole_width + 1) for _ in holes]
        integers(0, 2**32 - 1)  # the library's seed for random fills: unused, drawn to stay in step
        image = image.copy()
        for top, left in zip(tops, lefts, strict=True):
            image[top : top + hole_height, left : left + hole_width] = self.fill
        return image


class ColorJitter(A.ColorJitter):
    """`A.ColorJitter` with the fast path: brightness, contrast, saturation and hue in random order."""

    def augment(self, image: Image) -> Image:
        """Apply the four adjustments, with probability p."""
        if not self.should_apply():
            return image
        limits = self.brightness, self.contrast, self.saturation, self.hue
        factors = [self.py_random.uniform(*limit) for limit in limits]
        order = [0, 1, 2, 3]
        self.random_generator.shuffle(order)
        for adjustment in order:
            image = _ADJUSTMENTS[adjustment](image, factors[adjustment])
        return image


def _table(factor: float, offset: float) -> NDArray[np.uint8]:
    """The 256 values of `level * factor + offset`, clipped to 0-255 and truncated (not rounded)."""
    table = _LEVELS * factor + offset  # float32
    return np.minimum(np.maximum(table, 0, out=table), 255, out=table).astype(np.uint8)


def _adjust_brightness(image: Image, factor: float) -> Image:
    return cv2.LUT(image, _table(factor, 0.0))


def _adjust_contrast(image: Image, factor: float) -> Image:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    mean = cv2.sumElems(gray)[0] / gray.size
    return cv2.LUT(image, _table(factor, mean * (1 - factor)))


def _adjust_saturation(image: Image, factor: float) -> Image:
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1 - factor, 0)


def _adjust_hue(image: Image, factor: float) -> Image:
    """Rotate the hue by `factor` of the full circle, which is 180 levels in OpenCV's 8-bit HSV."""
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), _hue_tables()[math.floor(180 * factor) % 180])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


_ADJUSTMENTS = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _adjust_hue)


@functools.cache
def _hue_tables() -> NDArray[np.uint8]:
    """[180, 1, 256, 3]: a look-up table of HSV for each hue rotation; saturation and value are unchanged."""
    levels = np.arange(256)
    hues = (levels + np.arange(180)[:, None]) % 180
    same = np.broadcast_to(levels, hues.shape)
    return np.stack([hues, same, same], axis=-1)[:, None].astype(np.uint8)
