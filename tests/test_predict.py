"""predict.py: which files are found and how they are read; the logits of testing; output; bounded memory."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from cifar.dataset import Split
from core.cli import run_main
from core.errors import RunError
from helpers.tiny_checkpoint import CLASSES, SUPERCLASSES, save_tiny_checkpoint
from predict import Result, find_images, read_image
from training.checkpoint import LoadedModel, load_model
from utils import make_test_batches


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny_best.pth")


@pytest.fixture(scope="module")
def trained(weights: Path) -> LoadedModel:
    return load_model(weights)


@pytest.fixture
def paths(tmp_path: Path, few_images: np.ndarray) -> list[Path]:
    """The files of `few_images`."""
    paths = [tmp_path / f"{number:02d}.png" for number in range(len(few_images))]
    for image, path in zip(few_images, paths, strict=True):
        Image.fromarray(image).save(path)
    return paths


Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(weights: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs predict.py: the exit code, and the lines on standard output and standard error."""

    def run(*argv: object) -> tuple[int, list[str], list[str]]:
        arguments = [str(argument) for argument in (*argv, "--weights", weights)]
        code = run_main(lambda: predict.main(arguments), "predict.py")
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


# --- finding --------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_are_searched_to_the_bottom_in_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/z.webp", "sub/deep/y.png", ".git/x.png"
    )
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    found = [os.path.relpath(item.path, tmp_path) for item in find_images([str(tmp_path)])]
    assert found == ["a.JPG", "b.png", "sub/z.webp", "sub/deep/y.png"]


def test_patterns_and_files_with_names_like_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "[a].png", "sub/c.png")

    def names(pattern: str) -> list[str]:
        return [os.path.relpath(item.path, tmp_path) for item in find_images([f"{tmp_path}/{pattern}"])]

    assert names("[ab].png") == ["a.png", "b.png"]
    assert names("[a].png") == ["[a].png"]
    assert names("**/*.png") == ["[a].png", "a.png", "b.png", "sub/c.png"]
    errors = [item.error for item in find_images(["x\0y.png", f"{tmp_path}/q*"])]
    assert errors == [None, "no file matches this pattern"]


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


def test_decompression_bombs_and_odd_files_are_refused(tmp_path, monkeypatch) -> None:
    path = str(tmp_path / "x.png")
    Image.new("1", (1000, 1000)).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "MAX_PIXELS", 999_999)
        assert "million pixels" in read_image(path).error
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)  # Pillow's own limit, at twice as much
        assert "million pixels" in read_image(path).error
    os.mkfifo(tmp_path / "pipe.png")
    assert read_image(str(tmp_path / "pipe.png")).error == "not a regular file"
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "not an image" in read_image(str(tmp_path / "x.eps")).error  # Pillow alone would start Ghostscript
    Image.fromarray(np.full((9, 9), 1e6, np.float32)).save(tmp_path / "x.tiff")
    assert "floating-point" in read_image(str(tmp_path / "x.tiff")).error


# --- the same answer as testing -------------------------------------------------------------------


def test_images_of_32x32_give_the_logits_of_testing_to_the_bit(paths, trained, few_images) -> None:
    read = np.stack([read_image(str(path)).pixels for path in paths])
    np.testing.assert_array_equal(read, few_images)
    [(batch, _)] = make_test_batches(Split(few_images, np.zeros(20, np.int64)), 20, "cpu")
    with torch.inference_mode():
        expected = trained.model(batch).softmax(1).sort(dim=1, descending=True, stable=True)
    labels, probabilities = predict.classify(trained, read, 100, "fp32")
    assert torch.equal(labels, expected.indices) and torch.equal(probabilities, expected.values)
    # other batches: other last bits at most
    alone = torch.cat([predict.classify(trained, read[n : n + 1], 100, "fp32")[1] for n in range(20)])
    torch.testing.assert_close(alone, expected.values, rtol=0, atol=1e-5)


def test_json_gives_probabilities_of_the_logits(paths, run, trained, few_images) -> None:
    code, out, _ = run(*paths, "--json", "--topk", 3)
    lines = [json.loads(line) for line in out]
    assert code == 0 and [line["path"] for line in lines] == [str(path) for path in paths]
    expected = zip(*predict.classify(trained, few_images, 3, "fp32"), strict=True)
    assert len({line["predictions"][0]["label"] for line in lines}) > 1  # else the test shows little
    for line, (labels, values) in zip(lines, expected, strict=True):
        rows = line["predictions"]
        assert [row["label"] for row in rows] == labels.tolist()
        np.testing.assert_allclose([row["probability"] for row in rows], values, rtol=1e-5)
        assert [row["class"] for row in rows] == [CLASSES[label] for label in labels]
        assert [row["superclass"] for row in rows] == [SUPERCLASSES[label % 20] for label in labels]


def test_ties_come_in_the_order_of_labels_and_corrupt_weights_are_an_error(trained: LoadedModel) -> None:
    def classify(logit: float) -> torch.Tensor:
        """The labels from a network with this logit for every class."""
        forward = {"forward": lambda self, x: torch.full((len(x), 100), logit)}
        model = type("Constant", (torch.nn.Linear,), forward)(1, 1)
        constant = dataclasses.replace(trained, model=model, path=Path("x.pth"))
        return predict.classify(constant, np.zeros((1, 32, 32, 3), np.uint8), 5, "fp32")[0]

    assert classify(0.0).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(RunError, match=r"x\.pth gives NaN"):
        classify(float("nan"))


# --- what comes out -------------------------------------------------------------------------------


def test_table_names_class_and_superclass_by_the_best_run(tmp_path, weights, paths, capsys) -> None:
    shutil.copy(weights, tmp_path)
    assert predict.main([str(paths[0]), "--output-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"resnet20 from {tmp_path}/tiny_best.pth, trained on CIFAR-100"
    assert lines[1] == str(paths[0]) and len(lines) == 7
    rank, percent, sign, name, superclass = lines[2].split()
    assert (rank, sign) == ("1", "%") and 1 <= float(percent) <= 100
    assert superclass == SUPERCLASSES[CLASSES.index(name) % 20]


def test_weights_of_another_program_need_the_networks_name(tmp_path, weights, paths, capsys) -> None:
    mine = tmp_path / "mine.pth"
    torch.save(load_model(weights).model.state_dict(), mine)
    assert predict.main([str(paths[0]), "--weights", str(mine), "--model", "resnet20"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"resnet20 from {mine}"
    assert run_main(lambda: predict.main([str(paths[0]), "--weights", str(mine)]), "predict.py") == 1
    assert "load them with --model NAME" in capsys.readouterr().err


def test_unreadable_files_are_reported_and_the_others_classified(tmp_path, run, paths) -> None:
    broken, missing, empty, notes = (tmp_path / name for name in ("broken", "missing", "empty", "notes"))
    broken.write_bytes(paths[0].read_bytes()[:200])
    empty.mkdir()
    notes.write_text("no image")
    pattern = f"{tmp_path}/*.jpg"
    code, out, err = run(paths[0], broken, missing, empty, notes, pattern, paths[1], "--json")
    assert code == 1 and [json.loads(line)["path"] for line in out] == [str(path) for path in paths[:2]]
    *errors, last = err
    assert "5 of 7" in last
    reasons = ("truncated", "no such file", "no image files", "not an image", "no file matches")
    for line, path, reason in zip(errors, (broken, missing, empty, notes, pattern), reasons, strict=True):
        assert str(path) in line and reason in line


def test_paths_on_standard_input(tmp_path, run, paths, monkeypatch) -> None:
    odd = tmp_path / os.fsdecode(b"na\xefve [1]*.png")  # not UTF-8, and a pattern if it were an argument
    paths[0].rename(odd)
    stdin = type("Stdin", (), {"buffer": io.BytesIO(os.fsencode(odd) + b"\n\r\n\nnone.png\n")})
    monkeypatch.setattr(sys, "stdin", stdin)
    code, [line], err = run("-", "--json")
    assert code == 1 and json.loads(line)["path"] == str(odd)
    assert "none.png: no such file" in err[0] and "1 of 2" in err[1]


@pytest.mark.parametrize(
    ("stdin", "message"), [(io.TextIOWrapper(io.BytesIO(b"")), "no image was named"), (None, "closed")]
)
def test_an_empty_list_is_an_error(run, monkeypatch, stdin, message) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    code, _, [line] = run("-")
    assert code == 1 and message in line


def test_save_draws_each_image_under_a_name_of_its_own(tmp_path, run, few_images) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(few_images[0]).resize((900, 600)).save(tmp_path / folder / "same name.png")
    out = tmp_path / "deep" / "out"
    assert run(tmp_path / "a", tmp_path / "b", "--save", out)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["00001_same_name.png", "00002_same_name.png"]
    with Image.open(out / "00001_same_name.png") as drawing:
        assert drawing.width > 900


def test_wrong_usage_is_one_line(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    for argv, code, message in (
        (["--topk", 101], 2, "the network has 100 classes"),
        (["--save", tmp_path / "file"], 1, "cannot make the folder"),
    ):
        found, _, [line] = run("x.png", *argv)
        assert found == code and message in line


# --- bounded memory -------------------------------------------------------------------------------


def test_files_are_looked_for_and_read_a_batch_at_a_time(trained, monkeypatch) -> None:
    found, read = [], []

    def endless() -> Iterator[Result]:
        while True:
            found.append(f"{len(found)}.png")
            yield Result(found[-1])

    def fake_read(path: str, preview_px: int) -> Result:
        read.append(path)
        return Result(path, pixels=np.zeros((32, 32, 3), np.uint8))

    monkeypatch.setattr(predict, "read_image", fake_read)
    results = predict.predict(trained, endless(), batch_size=4)
    assert not found
    for number in (1, 2, 3):
        batch = list(itertools.islice(results, 4))
        assert [item.path for item in batch] == found[-4:]
        assert len(found) == len(read) == 4 * number
