"""Image files as a network trained on 32x32 images takes them: found one by one, read whatever their form."""

import functools
import glob
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from core.errors import RunError

SIZE = 32  # pixels, of the square that the network sees
# What is read. Pillow knows more, but among those are kinds that start other programs (EPS), and none that
# photographs come in. What this build of Pillow lacks is left out.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI")
FORMATS += ("TGA", "TIFF", "WEBP")
# Pillow's limit against decompression bombs: a quarter of a gigabyte of RGB. Pillow itself only warns there,
# and refuses at twice as much. Here it holds for what is unpacked: JPEG files are unpacked at a reduced size.
MAX_PIXELS = 89_478_485
# A JPEG file is unpacked at 1/2, 1/4 or 1/8 of its size, which is several times faster, as long as its sides
# stay this many times those of the result: the rest of the reduction is still an antialiased one.
DRAFT_MARGIN = 4
LONGEST_LINE = 65_536  # bytes of a path on standard input


class Found(NamedTuple):
    """A file to read, or a place where there is none, with the reason."""

    path: str
    error: str | None = None


class Picture(NamedTuple):
    """What was read: `pixels` uint8 [32, 32, 3] RGB for the network, and `preview` uint8 [H, W, 3], the whole
    upright image at most `preview_px` high and wide, for people (None where none was asked for)."""

    pixels: np.ndarray
    preview: np.ndarray | None


def find_images(arguments: Iterable[str], lines: Iterable[bytes] = ()) -> Iterator[Found]:
    """The files that the arguments mean, in order, found only as they are asked for.

    An argument is a file of any name; a folder, for all files in it and below it that are called like images
    (hidden ones and links to folders left out), sorted by name; a pattern with *, ? or [...] (** for folders
    of any depth), where no file has that very name, for the files that match; or "-" for the files and
    folders that `lines` name, one a line.
    """
    for argument in arguments:
        if argument == "-":
            for line in lines:
                if name := os.fsdecode(line.rstrip(b"\r\n")):
                    yield from _file_or_folder(name)
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            yield from _matches(argument)
        else:
            yield from _file_or_folder(argument)


def lines_of(stream: object) -> Iterator[bytes]:
    """The lines of a text stream such as sys.stdin, as bytes, since a path need not be text.

    Raises:
        RunError: there is no such stream, or it cannot be read.
    """
    source = getattr(stream, "buffer", None)
    if source is None:
        raise RunError("'-' reads paths from standard input, which is closed")
    try:
        yield from iter(lambda: source.readline(LONGEST_LINE), b"")
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read paths from standard input: {error}") from None


def _matches(pattern: str) -> Iterator[Found]:
    found = False
    for name in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isfile(name):
            found = True
            yield Found(name)
    if not found:
        yield Found(pattern, "no file matches this pattern")


def _file_or_folder(name: str) -> Iterator[Found]:
    if not os.path.isdir(name):
        yield Found(name)
        return
    found = False
    for item in _in_folder(name):
        found = True
        yield item
    if not found:
        yield Found(name, "no image files in this folder")


def _in_folder(folder: str) -> Iterator[Found]:
    """The image files in and below `folder`; of each folder the names are held, never more."""
    pending = [folder]
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as entries:
                listing = sorted(
                    (entry.name, entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries
                )
        except OSError as error:
            yield Found(here, error.strerror or str(error))
            continue
        below = []
        for name, path, is_folder in listing:
            if name.startswith("."):  # macOS leaves ._photo.jpg beside photo.jpg on foreign disks
                continue
            if is_folder:
                below.append(path)
            elif os.path.splitext(name)[1].lower() in _endings():
                yield Found(path)
        pending += reversed(below)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in Image.ID if name in FORMATS)


@functools.cache
def _endings() -> frozenset[str]:
    """The endings of their files: .jpg, .png, ..."""
    endings = Image.registered_extensions()
    return frozenset(ending for ending, name in endings.items() if name in _formats())


def read_image(path: str, preview_px: int = 0) -> Picture:
    """The image file at `path`, upright, with transparent parts over white, the centre of it at 32x32.

    White, since that is what a browser or a viewer shows behind them. The largest square around the centre is
    resized by Pillow's bicubic filter: it averages over all pixels that fall into one of the result, so it
    antialiases, at every ratio (its box filter does so for whole ratios only, Lanczos draws halos), and it
    enlarges smoothly too. A 32x32 image comes through as it is. Of 16-bit grey levels the high byte counts,
    as Pillow has it for 16-bit colour; of an animation the first frame. Colour profiles are not applied.

    Raises:
        RunError: why the file cannot be read, in a few words, without its name.
    """
    if not os.path.isfile(path):
        # a pipe or a device could keep a read waiting for ever
        raise RunError("no regular file" if os.path.lexists(path) else "no such file")
    try:
        with Image.open(path, formats=_formats()) as image:
            return _picture(image, preview_px)
    except RunError:
        raise
    except Image.UnidentifiedImageError:
        raise RunError("not an image that can be read (JPEG, PNG, WebP, TIFF, BMP, GIF, ...)") from None
    except Image.DecompressionBombError:
        raise RunError(f"more than {2 * MAX_PIXELS // 10**6} million pixels: refused") from None
    except MemoryError:
        raise RunError("too large for the memory at hand") from None
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"cannot be read: {reason}") from None


def _picture(image: Image.Image, preview_px: int) -> Picture:
    side = max(DRAFT_MARGIN * SIZE, preview_px)
    image.draft(None, (side, side))  # for other kinds than JPEG this does nothing
    if image.width * image.height > MAX_PIXELS:
        raise RunError(f"more than {MAX_PIXELS // 10**6} million pixels: refused")
    ImageOps.exif_transpose(image, in_place=True)
    upright = _over_white(_eight_bit(image))
    width, height = upright.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # reducing_gap: by whole factors to 3 times the size first, then the filter: faster, to the eye the same
    square = upright.resize(
        (SIZE, SIZE),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    preview = None
    if preview_px:
        upright.thumbnail((preview_px, preview_px), Image.Resampling.BICUBIC)
        preview = np.array(upright)
    return Picture(np.array(square), preview)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits as mode L; other images as they are.

    Raises:
        RunError: the levels are floating-point numbers in no range that images have.
    """
    if image.mode.startswith("I"):  # Pillow's modes I;16, I;16B, ..., and I for the same in older versions
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode == "F":
        levels = np.asarray(image)
        if not np.isfinite(levels).all() or levels.min() < 0 or levels.max() > 255:
            raise RunError("floating-point levels outside 0 to 1 and 0 to 255")
        scale = 255 if levels.max() <= 1 else 1
        return Image.fromarray(np.rint(levels * scale).astype(np.uint8))
    return image


def _over_white(image: Image.Image) -> Image.Image:
    """The image as RGB; what is transparent lets white through."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    background = Image.new("RGB", layer.size, "white")
    background.paste(layer, mask=layer.getchannel("A"))
    return background
