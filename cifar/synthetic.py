"""The built-in synthetic images: 100 classes in 20 families, computed from formulas.

They replace CIFAR-100 where it is not available: the same shapes and number of classes, but accuracies on
them say nothing about CIFAR-100, so every name says "synthetic".

A family (superclass) is a shape or a texture; its five classes differ in one parameter (corners, rings,
frequency, ...). Position, size, tilt, colours, shading, an occluding bar and noise vary at random. The bytes
are the same on every platform: only +, -, *, /, floor, comparisons and gathers on float64 are used, no
transcendental functions (their last bit differs between processors) and no long sums.
"""

import math
from collections.abc import Callable

import numpy as np

SIDE = 32
CLASSES_PER_FAMILY = 5
TRAIN_PER_CLASS = 100
TEST_PER_CLASS = 20
SEED = 20_240_229
# Chosen by trial: a ResNet-20 (SGD, learning rate 0.1, batch 128, no augmentation) reaches a test accuracy
# of 14 % after epoch 1 and 43 % after epoch 2; chance is 1 %.
NOISE = 0.06
CONTRAST = (0.55, 0.95)

Array = np.ndarray
Draw = Callable[[Array, Array, int], Array]


def _edge(distance: Array) -> Array:
    """1 inside (distance < 0), 0 outside, with a ramp about 1.5 pixels wide between."""
    return np.clip(0.5 - distance * 10.0, 0.0, 1.0)


def _fold(x: Array) -> Array:
    """A triangle wave of period 1 and range 0..1 (0 at integers)."""
    return abs(2.0 * (x - np.floor(x)) - 1.0) * -1.0 + 1.0


def _wave(x: Array) -> Array:
    """Stripes of period 1: 1 on one half of each period, 0 on the other, with soft edges."""
    return np.clip((_fold(x) - 0.5) * 4.0 + 0.5, 0.0, 1.0)


def _turn(u: Array, v: Array) -> Array:
    """The angle of (u, v) in turns, 0..1, measured along a diamond, which needs no arctangent."""
    quarter = v / (abs(u) + abs(v) + 1e-9)
    return np.where(u >= 0, quarter, 2.0 - quarter) * 0.25 + 0.25


def _direction(turns: float) -> tuple[float, float]:
    """Cosine and sine, rounded so that every platform's library gives the same numbers."""
    angle = 2 * math.pi * turns
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def _polygon(u: Array, v: Array, corners: int) -> Array:
    """A signed distance: below 0 inside a regular polygon of inner radius 1."""
    farthest = np.full_like(u, -9.0)
    for corner in range(corners):
        cosine, sine = _direction(corner / corners)
        farthest = np.maximum(farthest, cosine * u + sine * v)
    return farthest - 1.0


def _rings(u: Array, v: Array, k: int) -> Array:
    radius2 = u * u + v * v
    return _edge(radius2 - 1.0) * _wave(radius2 * (1.0 + 0.6 * k) + 0.25)


def _crosses(u: Array, v: Array, k: int) -> Array:
    thin = 0.1 + 0.1 * k
    arms = np.minimum(np.maximum(abs(u) - thin, abs(v)), np.maximum(abs(u), abs(v) - thin))
    return _edge(np.maximum(np.minimum(abs(u), abs(v)) - thin, np.maximum(arms, 0.0) - 0.95))


def _crescents(u: Array, v: Array, k: int) -> Array:
    shift = 0.3 + 0.2 * k
    bite = 0.75 - (u - shift) * (u - shift) - v * v
    return _edge(np.maximum(u * u + v * v - 0.9, bite))


def _wedges(u: Array, v: Array, k: int) -> Array:
    missing = _turn(-u, -v)
    return _edge(u * u + v * v - 0.9) * (abs(missing - 0.5) > 0.06 + 0.08 * k)


def _dice(u: Array, v: Array, k: int) -> Array:
    """2 to 6 dots on a ring."""
    nearest = np.full_like(u, 9.0)
    for dot in range(2 + k):
        cosine, sine = _direction(dot / (2 + k))
        x, y = u - 0.65 * cosine, v - 0.65 * sine
        nearest = np.minimum(nearest, x * x + y * y)
    return _edge((nearest - 0.07) * 2.0)


def _bitmap(u: Array, v: Array, rows: tuple[str, ...]) -> Array:
    """A picture of '#' and '.' over -1..1, nearest neighbour."""
    picture = np.array([[c == "#" for c in row] for row in rows], dtype=np.float64)
    height, width = picture.shape
    x = np.floor((u + 1.0) * 0.5 * width).astype(np.int64)
    y = np.floor((v + 1.0) * 0.5 * height).astype(np.int64)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return picture[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)] * inside


_LETTERS = (
    ("####", "#...", "###.", "#...", "####"),
    ("####", "#...", "###.", "#...", "#..."),
    ("#...", "#...", "#...", "#...", "####"),
    ("####", "..#.", "..#.", "..#.", "..#."),
    ("#..#", "#..#", "####", "#..#", "#..#"),
)
_BLOCKS = (("##.", ".##"), ("###", ".#."), ("###", "#.."), ("##.", "##."), ("###", "#.#"))
_SIGNS = (
    ("..#..", ".###.", "#####", "..#..", "..#.."),
    ("..#..", ".#.#.", "#...#", ".#.#.", "..#.."),
    ("..#..", ".#.#.", "#...#", ".....", "....."),
    ("..#..", ".###.", "..#..", ".###.", "..#.."),
    ("#...#", ".#.#.", "..#..", "..#..", "..#.."),
)


def _checks(u: Array, v: Array, k: int) -> Array:
    scale = 0.6 + 0.3 * k
    a, b = _wave(u * scale), _wave(v * scale)
    return a + b - 2.0 * a * b


def _dots(u: Array, v: Array, k: int) -> Array:
    scale = 0.8 + 0.3 * k
    x, y = _fold(u * scale) - 0.5, _fold(v * scale) - 0.5
    return _edge((x * x + y * y - 0.12) * 2.0)


def _bricks(u: Array, v: Array, k: int) -> Array:
    row = v * 1.5
    shift = (np.floor(row) - 2.0 * np.floor(row * 0.5)) * 0.5
    return np.maximum(_fold(row) < 0.3, _fold(u * (0.4 + 0.25 * k) + shift) < 0.15).astype(u.dtype)


# (u, v, k): coordinates in the object's own frame, mostly within -1..1, and the class in the family, 0 to 4;
# returns the foreground's opacity, 0..1.
FAMILIES: dict[str, Draw] = {
    "polygons": lambda u, v, k: _edge(_polygon(u * 1.5, v * 1.5, 3 + k)),
    "frames": lambda u, v, k: _edge(abs(_polygon(u * 1.4, v * 1.4, 3 + k) + 0.15) - 0.15),
    "stars": lambda u, v, k: _edge(abs(u) + abs(v) - 0.45 - 0.75 * _fold(_turn(u, v) * (3 + k))),
    "rings": _rings,
    "crosses": _crosses,
    "ellipses": lambda u, v, k: _edge(u * u + v * v * (1.0 + 0.55 * k) * (1.0 + 0.55 * k) - 0.9),
    "crescents": _crescents,
    "wedges": _wedges,
    "dice": _dice,
    "letters": lambda u, v, k: _bitmap(u * 1.2, v, _LETTERS[k]),
    "blocks": lambda u, v, k: _bitmap(u, v * 1.3, _BLOCKS[k]),
    "signs": lambda u, v, k: _bitmap(u, v, _SIGNS[k]),
    "stripes": lambda u, v, k: _wave(u * (0.7 + 0.35 * k)),
    "checks": _checks,
    "zigzags": lambda u, v, k: _wave(u * 1.3 + _fold(v * 0.8) * (0.25 + 0.25 * k)),
    "dots": _dots,
    "rays": lambda u, v, k: _wave(_turn(u, v) * (3 + k)),
    "spirals": lambda u, v, k: _wave(_turn(u, v) * (1 + k) + (abs(u) + abs(v)) * 0.8),
    "plaids": lambda u, v, k: 0.6 * _wave(u * 1.1) + 0.4 * _wave(v * (0.6 + 0.45 * k)),
    "bricks": _bricks,
}
SUPERCLASSES = tuple(f"synthetic-{family}" for family in FAMILIES)
CLASSES = tuple(f"{name}-{k + 1}" for name in SUPERCLASSES for k in range(CLASSES_PER_FAMILY))


def generate(split: int) -> tuple[Array, Array]:
    """The training (`split` 0) or test (1) images uint8 [N, 32, 32, 3] and labels int64 [N].

    Always the same bytes; N is 10,000 or 2,000, and image i is of class i % 100. Takes seconds on one core.
    """
    per_class = (TRAIN_PER_CLASS, TEST_PER_CLASS)[split]
    images = np.stack([draw_class(label, per_class, split) for label in range(len(CLASSES))], axis=1)
    return images.reshape(-1, SIDE, SIDE, 3), np.tile(np.arange(len(CLASSES), dtype=np.int64), per_class)


def draw_class(label: int, count: int, split: int) -> Array:
    """`count` images of class `label`, uint8 [count, 32, 32, 3]; `split` 0 is train, 1 is test."""
    rng = np.random.Generator(np.random.PCG64([SEED, split, label]))
    family, k = divmod(label, CLASSES_PER_FAMILY)

    def uniform(low: float, high: float, *shape: int) -> Array:
        return low + (high - low) * rng.random((count, *shape))

    # Pixel centres in the object's own frame: shifted, scaled, tilted.
    grid = (np.arange(SIDE) + 0.5) / (SIDE / 2) - 1.0
    x = grid[None, None, :] - uniform(-0.15, 0.15, 1, 1)
    y = grid[None, :, None] - uniform(-0.15, 0.15, 1, 1)
    # The tangent of half the angle gives cosine and sine as fractions; 0.08 is 9 degrees.
    half = uniform(-0.08, 0.08, 1, 1)
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    zoom = 1.0 / uniform(0.7, 0.95, 1, 1)
    shape = list(FAMILIES.values())[family]((cosine * x + sine * y) * zoom, (cosine * y - sine * x) * zoom, k)

    # Colours: a background, and a foreground that differs from it by a random amount and hue.
    back = uniform(0.2, 0.8, 1, 1, 3)
    step = uniform(-1.0, 1.0, 1, 1, 3)
    step = step / (abs(step).max(axis=-1, keepdims=True) + 1e-9) * uniform(*CONTRAST, 1, 1, 1)
    image = back + shape[..., None] * step

    # Shading: a coarse random colour field, smoothed over the image.
    image = image + _smooth(uniform(-0.12, 0.12, 5, 5, 3))
    # An occluding bar of random position and colour, horizontal or vertical.
    across = (rng.random((count, 1, 1, 1)) < 0.5).astype(np.float64)
    along = across * grid[None, :, None, None] + (1 - across) * grid[None, None, :, None]
    bar = abs(along - uniform(-1.2, 1.2, 1, 1, 1)) < uniform(0.02, 0.1, 1, 1, 1)
    image = np.where(bar, uniform(0.0, 1.0, 1, 1, 3), image)
    image = image + uniform(-NOISE, NOISE, SIDE, SIDE, 3)
    return np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _smooth(coarse: Array) -> Array:
    """Bilinear enlargement of [n, 5, 5, 3] to [n, 32, 32, 3]."""
    position = np.arange(SIDE) * (4.0 / SIDE)
    low = np.floor(position).astype(np.int64)
    for axis, weight in ((1, (position - low)[:, None, None]), (2, (position - low)[:, None])):
        coarse = coarse.take(low, axis) * (1 - weight) + coarse.take(low + 1, axis) * weight
    return coarse
