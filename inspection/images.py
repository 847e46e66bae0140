"""Image files as the network takes them: upright 8-bit RGB, whatever levels and transparency they have."""

import contextlib
import functools
import os
import stat

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    YCBCRSUBSAMPLING,
)

from core.errors import RunError

SIZE = 32  # pixels, side of the square that the network takes
# Pillow reads more, but some of those start other programs (EPS), and photographs come in none of them.
# Formats that this build of Pillow lacks are left out; HEIF is read where pillow-heif is installed.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI")
FORMATS += ("SGI", "TGA", "TIFF", "WEBP")
# Other files that people call images: in a folder they are reported, not passed over.
OTHER_EXTENSIONS = {".ai", ".arw", ".avif", ".cr2", ".cr3", ".dds", ".dng", ".emf", ".eps", ".exr", ".fits"}
OTHER_EXTENSIONS |= {".hdr", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jxl", ".jxr", ".nef", ".orf", ".psd"}
OTHER_EXTENSIONS |= {".qoi", ".raf", ".raw", ".rw2", ".svg", ".webp", ".wmf", ".xcf"}
# Pillow's limit against decompression bombs: a quarter of a gigabyte of RGB. Pillow itself only warns there,
# and refuses twice as many. Here it holds for the decoded size: JPEG files are decoded at a reduced one.
MAX_PIXELS = 89_478_485
# A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster, as long as its sides
# stay this many times those of the result: the rest of the reduction is still antialiased.
DRAFT_MARGIN = 4
# In these formats a fourth channel of zeros is padding: as alpha it would leave nothing of the image.
MAYBE_PADDED = ("BMP", "DIB", "ICO", "TGA", "TIFF")
ORIENTATION = 0x0112  # Exif tag
UNKNOWN_RANGE = "the file does not say which of its levels is white ({}): convert it to 8 bits"


class _PngStream(PngImagePlugin.PngStream):
    """Pillow's reader of PNG chunks; it skips texts and colour profiles that Pillow refuses, for their length
    say, and keeps what Pillow loses: the number of significant bits, and a transparent level or colour."""

    def call(self, cid: bytes, pos: int, length: int) -> bytes:
        try:
            return super().call(cid, pos, length)
        except (ValueError, SyntaxError):
            if cid not in (b"iCCP", b"iTXt", b"tEXt", b"zTXt"):
                raise
            self.fp.seek(pos)
            return self.fp.read(length)

    def chunk_sBIT(self, pos: int, length: int) -> bytes:
        content = self.fp.read(length)
        self.im_info["significant_bits"] = (content or b"\0")[0]
        return content

    def chunk_tRNS(self, pos: int, length: int) -> bytes:
        content = super().chunk_tRNS(pos, length)
        if self.im_rawmode == "RGB;16B":
            self.im_info["transparent_16_bit"] = self.im_info.pop("transparency")
        elif self.im_rawmode in ("L;2", "L;4"):  # Pillow scales the pixels alone to 8 bits
            self.im_info["transparency"] *= {"L;2": 85, "L;4": 17}[self.im_rawmode]
        return content


PngImagePlugin.PngStream = _PngStream  # Pillow has no other way to exchange it


@functools.cache
def image_formats() -> dict[str, str]:
    """From extension (.jpg) to format, for those of FORMATS that can be read here."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    extensions = Image.registered_extensions()
    return {key: name for key, name in extensions.items() if name in FORMATS and name in Image.OPEN}


def read_image(path: str, preview_px: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """The image file at `path`, upright, with transparent parts over white: the square at its centre, uint8
    RGB [32, 32, 3], and with `preview_px` the whole image, uint8 [H, W, 3], at most that high and wide.

    White, since browsers and viewers show it behind transparent parts. The largest square at the centre is
    resized by Pillow's bicubic filter: it averages all pixels that fall into one of the result, so it
    antialiases at every ratio (the box filter does so for whole ratios only, Lanczos draws halos), and it
    enlarges smoothly too. A 32x32 image is unchanged. Of 16-bit levels the high byte is used; of an animation
    the first frame. Colour profiles are not applied.

    Raises:
        RunError: it cannot be read, or the file does not say which of its levels is white. The message gives
            the reason alone, without the path.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device might never end
            raise RunError("not a regular file")
        with _open(path) as image:
            return _square_and_preview(image, preview_px)
    except RunError:
        raise
    except FileNotFoundError:
        reason = "a link to a file that does not exist" if os.path.islink(path) else "no such file"
    except PermissionError:
        reason = "permission denied"
    except Image.UnidentifiedImageError:
        reason = "not an image, or of a kind that is not read: convert it to JPEG or to PNG of 8 bits"
        extension = os.path.splitext(path)[1].lower()
        if extension in OTHER_EXTENSIONS - image_formats().keys():
            reason = f"{extension[1:].upper()} is not read: convert it to JPEG or PNG"
            reason += ", or install pillow-heif" if extension in (".heic", ".heif", ".hif") else ""
    except Image.DecompressionBombError:
        reason = f"more than {2 * MAX_PIXELS // 10**6} million pixels: refused"
    except MemoryError:
        reason = "too large for the available memory"
    except Exception as error:  # Pillow's readers raise many types on a damaged file
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        reason = f"cannot be read: {reason}"
    raise RunError(reason)


def _open(path: str) -> Image.Image:
    """The image, not decoded yet; of an animation its first frame."""
    try:
        image = Image.open(path, formats=tuple(dict.fromkeys(image_formats().values())))
    except Image.DecompressionBombError:
        # a JPEG file can be decoded at a reduced size, unless it is progressive: that takes all in memory
        with contextlib.suppress(SyntaxError):
            image = JpegImageFile(path)
            if not image.info.get("progressive"):
                return image
            image.close()
        raise
    if getattr(image, "default_image", False):  # an animated PNG: an image for viewers that do not animate
        image.seek(1)
        image.blend_op = PngImagePlugin.Blend.OP_SOURCE  # nothing is below the first frame
    return image


def _square_and_preview(image: Image.Image, preview_px: int) -> tuple[np.ndarray, np.ndarray | None]:
    side = max(DRAFT_MARGIN * SIZE, preview_px)
    image.draft(None, (side, side))  # has an effect on JPEG alone
    if image.width * image.height > MAX_PIXELS:
        raise RunError(f"more than {MAX_PIXELS // 10**6} million pixels: refused")
    upright = _to_rgb(image)
    upright.info.clear()
    with contextlib.suppress(Exception):  # damaged Exif data: shown as stored, as viewers do
        upright.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    ImageOps.exif_transpose(upright, in_place=True)
    width, height = upright.size
    left, top = max(width - height, 0) / 2, max(height - width, 0) / 2
    box = (left, top, width - left, height - top)
    # reducing_gap: first by whole factors to 3 times the size, then the filter; faster, and looks the same
    square = upright.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    if not preview_px:
        return np.array(square), None
    upright.thumbnail((preview_px, preview_px), Image.Resampling.BICUBIC)
    return np.array(square), np.array(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, transparent parts over white, as the file stores it (not turned upright)."""
    tags = getattr(image, "tag_v2", {})  # of TIFF alone
    if tags:
        _correct_tiff(image)
    deep = any(";16" in str(tile.args) for tile in image.tile)
    if image.mode == "F" or image.mode.startswith("I"):  # I;16, I;16B, I (32 bits; in older versions 16 too)
        return _grey_to_8_bits(image).convert("RGB")
    if image.mode == "La":  # premultiplied by alpha
        image = image.convert("LA")
    if deep:  # Pillow has kept the high bytes
        highest = zip(image.getbands(), np.atleast_2d(image.getextrema())[:, 1], strict=True)
        if max(level for band, level in highest if band != "A") < 64:
            raise RunError(UNKNOWN_RANGE.format("16-bit colours below 16384"))
    result = image.convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        alpha = layer.getchannel("A")
        if alpha.getextrema()[1] or image.format not in MAYBE_PADDED:
            result.paste("white", (0, 0, *result.size))
            result.paste(layer, mask=alpha)
    if (colour := image.info.get("transparent_16_bit")) is not None:
        with _open(image.filename) as low:  # the low bytes, where Pillow reads the high ones
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            exact = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
        result.paste("white", mask=Image.fromarray((exact == colour).all(axis=2)))
    if getattr(image, "default_image", False):
        box = image.info["bbox"]  # the frame may be smaller than the image
        frame = result.crop(box)
        result.paste("white", (0, 0, *result.size))
        result.paste(frame, box)
    return result


def _correct_tiff(image: Image.Image) -> None:
    """Correct what Pillow makes of the tags, before it decodes the image."""
    tags = image.tag_v2
    bits, tile = tags.get(BITSPERSAMPLE, (1,))[0], image.tile[0]
    if image.mode == "L" and 2 in tags.get(SAMPLEFORMAT, ()):
        raise RunError(UNKNOWN_RANGE.format("signed ones of 8 bits"))
    if tags.get(PLANAR_CONFIGURATION) == 2 and bits == 16 and tile.codec_name == "raw":
        raise RunError("16-bit colours in separate planes are not read: convert it to 8 bits")
    subsampled = image.mode != "L" and tags.get(YCBCRSUBSAMPLING, (2, 2)) != (1, 1)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 6 and subsampled and tile.codec_name == "raw":
        raise RunError("uncompressed colours of reduced resolution are not read: convert it to RGB")
    if tile.codec_name == "libtiff":  # which gives levels in the processor's byte order (N), not the file's
        rawmode, *rest = tile.args
        image.tile = [tile._replace(args=(rawmode.replace("BS", "NS").replace("BF", "NF"), *rest))]


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """An image with grey levels of more than 8 bits in mode L.

    Black is 0. White is the largest level of unsigned ones, else 255, or 1 for floating-point levels up to 1.
    Where the file leaves doubt, the levels must reach a quarter of that: those of a 12-bit camera do not.
    """
    tags = getattr(image, "tag_v2", {})
    levels = np.asarray(image)
    low, high = levels.min().item(), levels.max().item()
    white, stated = 65535, True  # Pillow scales those of PPM and JPEG 2000, which state their range
    if image.mode == "F":
        white, stated = 1 if high <= 1 else 255, False
    elif tags:
        bits = tags[BITSPERSAMPLE][0]
        signed = 2 in tags.get(SAMPLEFORMAT, ())
        white, stated = (255, False) if signed or bits > 16 else (2**bits - 1, bits < 16)
    elif image.format == "PNG":
        # PNG prescribes levels scaled to 16 bits; some programs write those of a 12-bit camera as they are
        bits = image.info.get("significant_bits")
        bits = bits if bits in range(8, 16) else 16
        scaled = high >= 2**bits or not (levels & (2 ** (16 - bits) - 1)).any()
        white, stated = 65535 if scaled else 2**bits - 1, bits < 16
    if not 0 <= low <= high <= white or (not stated and 0 < high < white / 4):  # nor with NaN
        raise RunError(UNKNOWN_RANGE.format(f"grey ones from {low:g} to {high:g}"))
    if tags and tags.get(PHOTOMETRIC_INTERPRETATION, 0) == 0:  # 0 is white
        levels = white - levels
    grey = np.rint(levels * (255 / white)) if image.mode == "F" else levels >> (white.bit_length() - 8)
    grey = grey.astype(np.uint8)
    grey[levels == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)
