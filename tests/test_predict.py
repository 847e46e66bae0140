"""predict.py: the answers of testing, what is said of what cannot be read, in bounded memory."""

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import image_files
import predict
from cifar.dataset import Split
from core.cli import run_main
from core.errors import RunError, UsageError
from helpers.tiny_checkpoint import CLASSES, SUPERCLASSES, save_tiny_checkpoint
from image_files import Found, read_image
from training.checkpoint import LoadedModel, load_model
from utils import make_test_batches


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny_best.pth")


@pytest.fixture(scope="module")
def trained(weights: Path) -> LoadedModel:
    return load_model(weights)


def save_all(images: np.ndarray, folder: Path) -> list[Path]:
    paths = [folder / f"{number:02d}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    return paths


def run(argv: list[object], weights: Path) -> int:
    arguments = [str(argument) for argument in argv]
    return run_main(lambda: predict.main([*arguments, "--weights", str(weights)]), "predict.py")


# --- the same answer as testing -------------------------------------------------------------------


def test_images_of_32x32_give_the_logits_of_testing_to_the_bit(
    tmp_path: Path, trained: LoadedModel, few_images: np.ndarray
) -> None:
    read = np.stack([read_image(str(path)).pixels for path in save_all(few_images, tmp_path)])
    np.testing.assert_array_equal(read, few_images)
    [(batch, _)] = make_test_batches(Split(few_images, np.zeros(20, np.int64)), 20, "cpu")
    with torch.inference_mode():
        expected = trained.model(batch)
    assert torch.equal(predict.compute_logits(trained, read, "fp32"), expected)
    # other batches: other last bits at most
    alone = torch.cat([predict.compute_logits(trained, read[n : n + 1], "fp32") for n in range(20)])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)


def test_json_gives_probabilities_of_the_logits(
    tmp_path: Path,
    weights: Path,
    trained: LoadedModel,
    few_images: np.ndarray,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = save_all(few_images, tmp_path)
    assert run([*paths, "--json", "--topk", 3], weights) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in paths]
    expected = predict.compute_logits(trained, few_images, "fp32").softmax(1)
    assert len({line["predictions"][0]["label"] for line in lines}) > 1  # else the test shows little
    for line, probabilities in zip(lines, expected, strict=True):
        values, labels = probabilities.topk(3)
        rows = line["predictions"]
        assert [row["label"] for row in rows] == labels.tolist()
        np.testing.assert_allclose([row["probability"] for row in rows], values, rtol=1e-5)
        assert [row["class"] for row in rows] == [CLASSES[label] for label in labels]
        assert [row["superclass"] for row in rows] == [SUPERCLASSES[label % 20] for label in labels]


def test_equal_probabilities_come_in_the_order_of_labels(trained: LoadedModel) -> None:
    model = type("Flat", (torch.nn.Linear,), {"forward": lambda self, x: torch.zeros(len(x), 100)})(1, 1)
    flat = LoadedModel(model, trained.recipe, CLASSES, SUPERCLASSES, (), Path("flat.pth"), {})
    [(labels, _)] = predict.classify(flat, np.zeros((1, 32, 32, 3), np.uint8), 5, "fp32")
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_spoilt_weights_are_an_error(trained: LoadedModel) -> None:
    model = type("Nan", (torch.nn.Linear,), {"forward": lambda self, x: torch.full((len(x), 100), torch.nan)})
    spoilt = LoadedModel(model(1, 1), trained.recipe, CLASSES, SUPERCLASSES, (), Path("x.pth"), {})
    with pytest.raises(RunError, match=r"x\.pth gives NaN"):
        list(predict.classify(spoilt, np.zeros((1, 32, 32, 3), np.uint8), 5, "fp32"))


# --- what comes out -------------------------------------------------------------------------------


def test_table_names_class_and_superclass(
    tmp_path: Path, weights: Path, few_images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = save_all(few_images[:1], tmp_path)
    assert run([path], weights) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "resnet20" in lines[0] and "CIFAR-100" in lines[0]
    assert lines[1] == str(path) and len(lines) == 7
    rank, percent, sign, name, superclass = lines[2].split()
    assert (rank, sign) == ("1", "%") and 1 <= float(percent) <= 100
    assert superclass == SUPERCLASSES[CLASSES.index(name) % 20]


def test_what_cannot_be_read_is_reported_and_the_rest_goes_on(
    tmp_path: Path, weights: Path, few_images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = save_all(few_images[:2], tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(first.read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    missing = tmp_path / "missing.png"
    argv = [first, broken, missing, tmp_path / "empty", notes, f"{tmp_path}/*.jpg", second, "--json"]
    assert run(argv, weights) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["path"] for line in out.splitlines()] == [str(first), str(second)]
    errors = err.splitlines()
    assert len(errors) == 6 and "5 of 7" in errors[5]
    for line, path, reason in zip(
        errors,
        (broken, missing, tmp_path / "empty", notes, f"{tmp_path}/*.jpg"),
        ("truncated", "no such file", "no image files", "not an image", "no file matches"),
        strict=False,
    ):
        assert str(path) in line and reason in line


def test_paths_on_standard_input(
    tmp_path: Path,
    weights: Path,
    few_images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = tmp_path / os.fsdecode(b"na\xefve [1]*.png")  # no UTF-8, and a pattern if it were an argument
    with odd.open("wb") as file:
        Image.fromarray(few_images[0]).save(file, format="PNG")
    stdin = type("Stdin", (), {"buffer": io.BytesIO(os.fsencode(odd) + b"\n\r\n\nnone.png\n")})
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(["-", "--json"], weights) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["path"] == str(odd)
    assert "none.png: no such file" in err and "1 of 2" in err


def test_an_empty_list_is_an_error(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run(["-"], weights) == 1
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["-"], weights) == 1
    err = capsys.readouterr().err.splitlines()
    assert "no image was named" in err[0] and "closed" in err[1]


def test_save_draws_each_image_under_a_name_of_its_own(
    tmp_path: Path, weights: Path, few_images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(few_images[0]).resize((900, 600)).save(tmp_path / folder / "same name.png")
    out = tmp_path / "deep" / "out"
    assert run([tmp_path / "a", tmp_path / "b", "--save", out], weights) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00001_same_name.png", "00002_same_name.png"]
    with Image.open(out / "00001_same_name.png") as drawing:
        assert drawing.width > 900
    (tmp_path / "file").write_text("")
    assert run([tmp_path / "a", "--save", tmp_path / "file"], weights) == 1
    assert "cannot make the folder" in capsys.readouterr().err


def test_wrong_usage(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="knows 100 classes"):
        predict.main(["x.png", "--topk", "101", "--weights", str(weights)])
    with pytest.raises(RunError, match="does not exist"):
        predict.main(["x.png", "--weights", str(tmp_path / "none.pth")])


def test_weights_default_to_the_best_run(
    tmp_path: Path, few_images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_checkpoint(tmp_path / "tiny_best.pth")
    [path] = save_all(few_images[:1], tmp_path)
    assert predict.main([str(path), "--output-dir", str(tmp_path)]) == 0
    assert f"{tmp_path}/tiny_best.pth" in capsys.readouterr().out


# --- bounded memory -------------------------------------------------------------------------------


def test_files_are_looked_for_and_read_a_batch_at_a_time(
    trained: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_for, read = 0, []

    def endless() -> Iterator[Found]:
        nonlocal looked_for
        while True:
            looked_for += 1
            yield Found(f"{looked_for}.png")

    def fake_read(path: str, preview_px: int) -> image_files.Picture:
        read.append(path)
        return image_files.Picture(np.zeros((32, 32, 3), np.uint8), None)

    monkeypatch.setattr(predict, "read_image", fake_read)
    batches = predict.predict(trained, endless(), batch_size=4)
    assert looked_for == 0
    for number in (1, 2, 3):
        batch = next(batches)
        assert [item.path for item in batch] == [f"{4 * number - 3 + k}.png" for k in range(4)]
        assert looked_for == len(read) == 4 * number
