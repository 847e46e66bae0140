"""Which image files are found, and what is read of them."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import image_files
from core.errors import RunError
from image_files import find_images, read_image

# --- finding --------------------------------------------------------------------------------------


def test_folders_are_searched_to_the_bottom_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/z.webp", "sub/deep/y.png", ".git/x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    found = [os.path.relpath(item.path, tmp_path) for item in find_images([str(tmp_path)])]
    assert found == ["a.JPG", "b.png", "sub/z.webp", "sub/deep/y.png"]


def test_patterns_and_files_with_names_like_patterns(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "[a].png", "sub/c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    def names(pattern: str) -> list[str]:
        return [os.path.relpath(item.path, tmp_path) for item in find_images([f"{tmp_path}/{pattern}"])]

    assert names("[ab].png") == ["a.png", "b.png"]
    assert names("[a].png") == ["[a].png"]
    assert names("**/*.png") == ["[a].png", "a.png", "b.png", "sub/c.png"]
    assert [item.error for item in find_images(["x\0y.png", f"{tmp_path}/q*"])] == [
        None,
        "no file matches this pattern",
    ]


# --- reading --------------------------------------------------------------------------------------

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
    pixels = read_image(str(path)).pixels
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    grey = mode in ("L", "LA", "I;16", "F")
    expected = np.array(
        Image.fromarray(HALVES).convert("L").convert("RGB") if grey else Image.fromarray(HALVES)
    )
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
        np.testing.assert_array_equal(read_image(str(path)).pixels, few_images[0])
    turned.resize((3 * 512, 2 * 512)).save(tmp_path / "x.jpg", exif=exif, quality=95)
    picture = read_image(str(tmp_path / "x.jpg"), preview_px=384)
    assert picture.preview.shape == (384, 256, 3)
    whole = np.asarray(upright.resize((256, 384)), dtype=int)
    assert np.abs(picture.preview.astype(int) - whole).mean() < 4


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
    read = read_image(str(tmp_path / "x.png")).pixels
    assert (read[:16] == 255).all() and (read[16:] == 0).all()


def test_the_square_at_the_centre_is_taken_and_antialiased(tmp_path: Path) -> None:
    wide = np.full((320, 640, 3), 255, np.uint8)
    wide[:, 160:480] = 0  # the square at the centre ...
    wide[::2, 160:480] = 200  # ... has stripes of one pixel, which must become grey, not black or light
    for name, array in (("wide.png", wide), ("high.png", wide.transpose(1, 0, 2))):
        Image.fromarray(np.ascontiguousarray(array)).save(tmp_path / name)
        inner = read_image(str(tmp_path / name)).pixels[2:-2, 2:-2]
        assert np.abs(inner.astype(int) - 100).max() <= 3
    for size in ((1, 1), (1, 500), (5, 3), (33, 32)):
        Image.new("RGB", size, COLOUR).save(tmp_path / "x.png")
        assert (read_image(str(tmp_path / "x.png")).pixels == COLOUR).all()


def test_decompression_bombs_and_odd_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (1000, 1000)).save(tmp_path / "x.png")
    monkeypatch.setattr(image_files, "MAX_PIXELS", 999_999)
    with pytest.raises(RunError, match="million pixels"):
        read_image(str(tmp_path / "x.png"))
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)  # Pillow's own limit, at twice as much
    with pytest.raises(RunError, match="million pixels"):
        read_image(str(tmp_path / "x.png"))
    monkeypatch.undo()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(RunError, match="no regular file"):
        read_image(str(tmp_path / "pipe.png"))
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(RunError, match="not an image"):  # Pillow alone would start Ghostscript
        read_image(str(tmp_path / "x.eps"))
    Image.fromarray(np.full((9, 9), 1e6, np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(RunError, match="floating-point"):
        read_image(str(tmp_path / "x.tiff"))
