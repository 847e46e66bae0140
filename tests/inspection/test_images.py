"""Image files: every depth, sign, polarity and transparency gives the same picture or is refused."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from core.errors import RunError
from inspection import images
from inspection.images import read_image


def pixels_of(path: Path) -> np.ndarray:
    return read_image(str(path))[0]


def reason(path: Path) -> str:
    """The one line that says why the file is not read."""
    with pytest.raises(RunError, match=r"\A[^\n]+\Z") as caught:
        read_image(str(path))
    return str(caught.value)


# --- what Pillow writes ---------------------------------------------------------------------------

COLOUR = (200, 120, 40)
HALVES = np.zeros((64, 64, 3), np.uint8)
HALVES[:32], HALVES[32:] = COLOUR, (10, 60, 220)


def as_mode(mode: str) -> Image.Image:
    image = Image.fromarray(HALVES)
    if mode == "I;16":
        return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 256 + 17)
    if mode == "F":
        return Image.fromarray(np.array(image.convert("L")).astype(np.float32) / 255)
    if mode == "P":
        return image.quantize(2)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("RGB", "png"), ("RGB", "bmp"), ("RGB", "jpg"), ("RGB", "tiff"), ("RGBA", "webp"), ("P", "gif"),
        ("P", "png"), ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("I;16", "png"), ("I;16", "tiff"),
        ("F", "tiff"), ("CMYK", "jpg"), ("CMYK", "tiff"), ("1", "png"), ("YCbCr", "jpg"),
    ],
)  # fmt: skip
def test_every_mode_becomes_the_same_picture(tmp_path: Path, mode: str, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    image = as_mode(mode)
    image.save(path, **({"lossless": True} if ending == "webp" else {}))
    pixels = pixels_of(path)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    grey = mode in ("L", "LA", "I;16", "F")
    expected = np.array(Image.fromarray(HALVES).convert("L" if grey else "RGB").convert("RGB"))
    if mode == "1":  # dithered: the halves differ, and more cannot be said
        assert pixels[:14].mean() > pixels[18:].mean() + 10
        return
    for rows in (slice(0, 14), slice(18, 32)):  # clear of the filter's overshoot at the edge
        difference = pixels[rows].astype(int) - expected[::2, ::2][rows]
        assert np.abs(difference).max() <= (6 if ending in ("jpg", "gif") or mode == "P" else 1)


def test_exif_rotation_is_undone(tmp_path: Path, few_images: np.ndarray) -> None:
    upright = Image.fromarray(few_images[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    for ending in ("png", "webp", "tiff"):
        path = tmp_path / f"x.{ending}"
        turned.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
        np.testing.assert_array_equal(pixels_of(path), few_images[0])
    turned.resize((3 * 512, 2 * 512)).save(tmp_path / "x.jpg", exif=exif, quality=95)
    _, preview = read_image(str(tmp_path / "x.jpg"), preview_px=384)
    assert preview.shape == (384, 256, 3)
    whole = np.asarray(upright.resize((256, 384)), dtype=int)
    assert np.abs(preview.astype(int) - whole).mean() < 4
    for ending in ("png", "webp", "jpg"):
        upright.save(tmp_path / f"x.{ending}", exif=b"Exif\0\0damaged")
        assert np.abs(pixels_of(tmp_path / f"x.{ending}").astype(int) - few_images[0]).mean() < 9


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[16:, :, 3] = 255  # black, the upper half transparent
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray((pixels[..., 3] > 0).astype(np.uint8))
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.save(tmp_path / "x.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "x.png")
    read = pixels_of(tmp_path / "x.png")
    assert (read[:16] == 255).all() and (read[16:] == 0).all()


def test_the_square_at_the_centre_is_taken_and_antialiased(tmp_path: Path) -> None:
    wide = np.full((320, 640, 3), 255, np.uint8)
    wide[:, 160:480] = 0  # the square at the centre ...
    wide[::2, 160:480] = 200  # ... has stripes of one pixel, which must become grey, not black or light
    for name, array in (("wide.png", wide), ("high.png", wide.transpose(1, 0, 2))):
        Image.fromarray(np.ascontiguousarray(array)).save(tmp_path / name)
        inner = pixels_of(tmp_path / name)[2:-2, 2:-2]
        assert np.abs(inner.astype(int) - 100).max() <= 3
    for size in ((1, 1), (1, 500), (5, 3), (33, 32)):
        Image.new("RGB", size, COLOUR).save(tmp_path / "x.png")
        assert (pixels_of(tmp_path / "x.png") == COLOUR).all()


# --- depth, sign, polarity and transparency: what the file says -----------------------------------

ROWS, COLUMNS = np.mgrid[0:32, 0:32]
GREY = (20 + 5 * COLUMNS + 2 * ROWS).astype(np.uint8)  # 20 to 237
RGB = np.stack([GREY, GREY[::-1], GREY.T], axis=2)
TOP = ROWS < 8


def pack(levels: np.ndarray, bits: int, order: str = ">") -> bytes:
    """`levels` [H, ...] as the rows of an image with so many bits per sample."""
    if bits % 8 == 0 or levels.dtype.kind == "f":
        return levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    high_first = levels.reshape(len(levels), -1, 1) >> np.arange(bits)[::-1] & 1
    return np.packbits(high_first.reshape(len(levels), -1).astype(np.uint8), axis=1).tobytes()


def tiff(levels: np.ndarray, bits: int, order: str = "<", deflate: bool = False, **more: int) -> bytes:
    """A TIFF file of grey or RGB levels [32, 32(, 3)], in the byte order "<" or ">"."""
    data = pack(levels, bits, order)
    samples = 1 if levels.ndim == 2 else levels.shape[2]
    tags = {"width": 32, "height": 32, "bits": bits, "compression": 8 if deflate else 1, "photometric": 1}
    tags |= {"samples": samples, "rows": 32, "format": {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]} | more
    numbers = {
        "width": 256,
        "height": 257,
        "bits": 258,
        "compression": 259,
        "photometric": 262,
        "samples": 277,
    }
    numbers |= {"rows": 278, "planar": 284, "extra": 338, "format": 339, "offset": 273, "size": 279}
    data = zlib.compress(data) if deflate else data
    tags |= {"offset": 8 + 2 + 12 * (len(tags) + 2) + 4, "size": len(data)}
    rows = (
        struct.pack(order + "HHII", numbers[name], 4, 1, tags[name]) for name in sorted(tags, key=numbers.get)
    )
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return header + b"".join(rows) + bytes(4) + data


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def idat(levels: np.ndarray, bits: int) -> bytes:
    rows = (b"\0" + pack(row[None], bits) for row in levels)
    return zlib.compress(b"".join(rows))


def png(levels: np.ndarray, colour_type: int, bits: int, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG file of levels [H, W(, C)], with other chunks before and after those of the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *levels.shape[1::-1], bits, colour_type, 0, 0, 0))
    chunks = [header, *before, chunk(b"IDAT", idat(levels, bits)), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def scaled(bits: int) -> np.ndarray:
    """GREY in so many bits, unsigned."""
    levels = np.rint(GREY / 255 * (2**bits - 1))
    return levels.astype(np.uint8 if bits <= 8 else np.uint16)


def check(path: Path, content: bytes, expected: np.ndarray) -> None:
    path.write_bytes(content)
    pixels = pixels_of(path).astype(int)
    np.testing.assert_array_equal(
        pixels, expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    )


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_is_read_by_its_tags(tmp_path: Path, order: str, deflate: bool) -> None:
    path = tmp_path / "x.tif"
    for bits in (1, 2, 4, 8):
        levels, white = scaled(bits), 2**bits - 1
        expected = levels.astype(int) * (255 // white)
        check(path, tiff(levels, bits, order, deflate), expected)
        check(path, tiff(white - levels, bits, order, deflate, photometric=0), expected)
    check(path, tiff(scaled(16), 16, order, deflate), GREY)
    for kind in ("i2", "i4", "f4"):
        check(path, tiff(GREY.astype(kind), 8 * int(kind[1]), order, deflate), GREY)
    check(path, tiff(GREY.astype("f4") / 255, 32, order, deflate), GREY)
    check(path, tiff(1 - GREY.astype("f4") / 255, 32, order, deflate, photometric=0), GREY)
    if order == "<":  # the other order Pillow does not read
        check(path, tiff(scaled(12), 12, order, deflate), GREY)
        check(path, tiff(scaled(12) // 16, 12, order, deflate), GREY // 16)  # dark, but its range is stated
        check(path, tiff(65535 - scaled(16), 16, order, deflate, photometric=0), GREY)
        check(path, tiff(GREY.astype("u4"), 32, order, deflate), GREY)
    # a transparent upper part, once as alpha and once as a sample that means nothing
    alpha = np.where(TOP, 0, 255).astype(np.uint8)
    for levels, photometric in ((RGB, 2), (GREY[..., None], 1)):
        expected = np.where(TOP[..., None], 255, levels.repeat(3 // levels.shape[2], 2))
        options = {"order": order, "deflate": deflate, "photometric": photometric}
        check(path, tiff(np.dstack([levels, alpha]), 8, **options, extra=2), expected)
        if photometric == 2 or PIL.__version__ >= "13":  # earlier ones refuse the others
            premultiplied = np.dstack([levels * (alpha > 0)[..., None], alpha])
            check(path, tiff(premultiplied, 8, **options, extra=1), expected)
            check(
                path,
                tiff(np.dstack([levels, alpha]), 8, **options, extra=0),
                levels.repeat(3 // levels.shape[2], 2),
            )


DARK = scaled(12)  # 321 to 3806: in 16 bits nearly black


@pytest.mark.parametrize(
    "content",
    [
        tiff(DARK, 16),
        tiff(DARK, 16, photometric=0),
        tiff(GREY.astype("i4") - 128, 32),
        tiff(GREY.astype("i2") * 16, 16),
        tiff(GREY.astype("u4") * 2**24, 32),
        tiff((GREY.astype(int) - 128).astype("i1"), 8),
        tiff(GREY.astype("f4") / 25, 32),  # up to 9.5
        tiff(GREY.astype("f4") - 100, 32),
        tiff(np.where(TOP, np.nan, GREY).astype("f4"), 32),
        png(DARK, 0, 16),
        png(np.stack([DARK, DARK.T, DARK], axis=2), 2, 16),
        png(np.dstack([DARK, np.full_like(DARK, 65535)]), 4, 16),
        png(RGB.astype(np.uint16), 2, 16),
        b"Pf\n32 32\n-1.0\n" + (GREY.astype("<f4") * 9).tobytes(),
    ],
)
def test_levels_of_unknown_range_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert "does not say which of its levels is white" in reason(tmp_path / "x")


def test_tiffs_that_pillow_would_read_wrongly_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(RGB.astype(np.uint16) * 257, 16, photometric=2, planar=2))
    assert "separate planes" in reason(path)
    path.write_bytes(tiff(RGB, 8, photometric=6))  # by default the colours have half the resolution
    assert "reduced resolution" in reason(path)
    path.write_bytes(tiff(scaled(10), 10))
    assert "convert it" in reason(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_level_of_a_png_is_white(tmp_path: Path, bits: int) -> None:
    levels = scaled(bits)
    for level in np.unique(levels)[:: 1 if bits < 8 else 60].tolist():
        expected = np.where(levels == level, 255, levels.astype(int) * 255 // (2**bits - 1))
        check(tmp_path / "x", png(levels, 0, bits, chunk(b"tRNS", struct.pack(">H", level))), expected)


def test_a_transparent_colour_of_a_png_is_white_and_no_similar_one(tmp_path: Path) -> None:
    colour = np.array([513, 770, 60000], np.uint16)
    levels = RGB.astype(np.uint16) * 257
    levels[:8], levels[8:16] = colour, colour - 1  # the same high bytes
    expected = np.where(TOP[..., None], 255, levels >> 8)
    check(tmp_path / "x", png(levels, 2, 16, chunk(b"tRNS", colour.astype(">u2").tobytes())), expected)
    levels = (levels >> 8).astype(np.uint8)
    levels[:8] = 0
    check(tmp_path / "x", png(levels, 2, 8, chunk(b"tRNS", bytes(6))), expected)


@pytest.mark.filterwarnings("ignore:Palette images")
def test_alpha_of_palettes_and_of_16_bits(tmp_path: Path) -> None:
    palette = np.array([[0, 0, 0], [90, 90, 90], [200, 200, 200], [255, 0, 0]], np.uint8)
    index = (COLUMNS // 8).astype(np.uint8)
    for alpha in ([0], [255, 0], [128, 255, 255, 0]):
        share = np.array(alpha + [255] * (4 - len(alpha)))[index][..., None] / 255
        expected = np.rint(palette[index] * share + 255 * (1 - share)).astype(int)
        chunks = chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", bytes(alpha))
        for bits in (2, 4, 8):
            check(tmp_path / "x", png(index, 3, bits, *chunks), expected)
    alpha = np.where(TOP, 0, 65535).astype(np.uint16)
    check(tmp_path / "x", png(np.dstack([scaled(16), alpha]), 4, 16), np.where(TOP, 255, GREY))
    deep = np.dstack([RGB.astype(np.uint16) * 257, alpha])
    check(tmp_path / "x", png(deep, 6, 16), np.where(TOP[..., None], 255, RGB))


def test_significant_bits_tell_the_range_of_a_png(tmp_path: Path) -> None:
    twelve = chunk(b"sBIT", b"\x0c")
    check(tmp_path / "x", png(DARK, 0, 16, twelve), GREY)
    check(tmp_path / "x", png(DARK << 4 | DARK >> 8, 0, 16, twelve), GREY)  # scaled, as PNG prescribes
    check(tmp_path / "x", png(DARK >> 4 << 4, 0, 16, twelve), DARK >> 8)  # scaled, and really dark


@pytest.mark.parametrize("maximum", [255, 1023, 65535])
def test_a_pgm_is_scaled_by_its_largest_level(tmp_path: Path, maximum: int) -> None:
    levels = np.rint(GREY / 255 * maximum).astype(int)
    binary = levels.astype(np.uint8 if maximum < 256 else ">u2").tobytes()
    check(tmp_path / "x", b"P5 32 32 %d\n" % maximum + binary, GREY)
    check(tmp_path / "x", b"P2 32 32 %d\n" % maximum + " ".join(map(str, levels.flat)).encode(), GREY)


def test_a_fourth_channel_of_zeros_is_padding_where_it_may_be(tmp_path: Path) -> None:
    image = Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)]))
    for ending in ("tga", "bmp", "tiff"):
        image.save(tmp_path / f"x.{ending}")
        np.testing.assert_array_equal(pixels_of(tmp_path / f"x.{ending}"), RGB)
    image.save(tmp_path / "x.png")
    assert (pixels_of(tmp_path / "x.png") == 255).all()


# --- more that can be read ------------------------------------------------------------------------

ZEROS = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    "long",
    [
        chunk(b"zTXt", b"Comment\0\0" + ZEROS),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + ZEROS),
        chunk(b"iCCP", b"profile\0\0" + ZEROS),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000))) * 70,
    ],
)
def test_long_texts_and_profiles_of_a_png_are_skipped(tmp_path: Path, long: bytes) -> None:
    check(tmp_path / "x.png", png(RGB, 2, 8, long), RGB)
    if b"iCCP" not in long:
        check(tmp_path / "x.png", png(RGB, 2, 8, after=long), RGB)


def test_a_large_jpeg_is_read_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 400_000
    )  # Pillow refuses twice as many when it opens a file
    large = Image.fromarray(RGB).resize((1000, 1000))
    large.save(tmp_path / "x.jpg", quality=95)
    assert np.abs(pixels_of(tmp_path / "x.jpg").astype(int) - RGB).max() <= 8
    large.save(tmp_path / "x.jpg", progressive=True)  # all of it would have to be in memory
    assert "million pixels" in reason(tmp_path / "x.jpg")
    large.save(tmp_path / "x.png")
    assert "million pixels" in reason(tmp_path / "x.png")


def test_of_an_animated_png_the_first_frame_is_read(tmp_path: Path) -> None:
    red, blue, green = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime"))
    for mode in ("RGB", "RGBA", "P"):
        frames = [image.convert(mode) for image in (red, blue, green)]
        for separate, expected in ((False, (255, 0, 0)), (True, (0, 0, 255))):
            options = {"save_all": True, "append_images": frames[1:], "default_image": separate, "blend": 1}
            frames[0].save(tmp_path / "x.png", **options)
            assert (pixels_of(tmp_path / "x.png") == expected).all()
    # a frame of half the height, its left half transparent: nothing is above or below it
    alpha = np.where(COLUMNS < 16, 0, 255).astype(np.uint8)
    frame = np.dstack([RGB, alpha])[16:]
    box = struct.pack(">5IHHBB", 0, 32, 16, 0, 16, 1, 10, 0, 1)
    after = chunk(b"fcTL", box) + chunk(b"fdAT", struct.pack(">I", 1) + idat(frame, 8))
    separate = np.dstack([np.zeros_like(RGB), np.full_like(GREY, 255)])
    content = png(separate, 6, 8, chunk(b"acTL", struct.pack(">II", 1, 0)), after=after)
    seen = (ROWS >= 16) & (COLUMNS >= 16)
    check(tmp_path / "x.png", content, np.where(seen[..., None], RGB, 255))


# --- refused --------------------------------------------------------------------------------------


def test_decompression_bombs_and_odd_files_are_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.png"
    Image.new("1", (1000, 1000)).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 999_999)
        assert "million pixels" in reason(path)
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "not a regular file"
    for name, expected in (("x", "not an image"), ("x.eps", "EPS is not read: convert it to JPEG or PNG")):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
        assert expected in reason(tmp_path / name)  # Pillow alone would start Ghostscript


def test_a_heic_file_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "image_formats", lambda: {".png": "PNG"})  # pillow-heif may be installed
    (tmp_path / "x.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    expected = "HEIC is not read: convert it to JPEG or PNG, or install pillow-heif"
    assert reason(tmp_path / "x.HEIC") == expected
    Image.fromarray(RGB).save(tmp_path / "y.heic", "PNG")  # the content counts
    np.testing.assert_array_equal(pixels_of(tmp_path / "y.heic"), RGB)


def test_a_heic_file_is_read_with_pillow_heif(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    assert images.image_formats()[".heic"] == "HEIF"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture = Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90).resize((128, 128))
    picture.save(tmp_path / "x.heic", quality=95, exif=exif.tobytes())
    assert np.abs(pixels_of(tmp_path / "x.heic").astype(int) - RGB).mean() < 3


def test_what_keeps_a_file_from_being_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("gone.png")
    assert reason(tmp_path / "link") == "a link to a file that does not exist"
    assert reason(tmp_path / "gone.png") == "no such file"
    assert "null" in reason(Path("x\0y.png"))

    def denied(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", denied)  # a real one would not stop root
        assert reason(tmp_path / "x") == "permission denied"
