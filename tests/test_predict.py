"""predict.py: which files are found and how they are read; the logits of testing; output; bounded memory."""

import copy
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
from inspection.images import read_image
from inspection.inference import averaged_log_probabilities
from predict import Result, find_images
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
    touch(tmp_path, "c.heic", "sub/raw.NEF")  # called images, though they are not read
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / "gone.png").symlink_to("nowhere")
    found = [os.path.relpath(item.path, tmp_path) for item in find_images([str(tmp_path)])]
    expected = ["a.JPG", "b.png", "c.heic", "sub/gone.png", "sub/raw.NEF", "sub/z.webp", "sub/deep/y.png"]
    assert found == expected


def test_patterns_and_files_with_names_like_patterns(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path, "a.png", "b.png", "[a].png", "sub/c.png")
    (tmp_path / "link.jpg").symlink_to("nowhere")

    def names(pattern: str) -> list[str]:
        return [os.path.relpath(item.path, tmp_path) for item in find_images([f"{tmp_path}/{pattern}"])]

    assert names("[ab].png") == ["a.png", "b.png"]
    assert names("[a].png") == ["[a].png"]
    assert names("*.jpg") == ["link.jpg"]
    assert names("**/*.png") == ["[a].png", "a.png", "b.png", "sub/c.png"]
    errors = [item.error for item in find_images(["x\0y.png", f"{tmp_path}/q*"])]
    assert errors == [None, "no file matches this pattern"]
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))  # a real one lets root pass
    assert [item.error for item in find_images([f"{tmp_path}/q*"])] == ["permission denied"]


# --- the same answer as testing -------------------------------------------------------------------


def test_images_of_32x32_give_the_logits_of_testing_to_the_bit(paths, trained, few_images) -> None:
    read = np.stack([read_image(str(path))[0] for path in paths])
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


def test_out_of_memory_is_one_line(trained: LoadedModel, few_images: np.ndarray) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsecond line")

    trained = dataclasses.replace(trained, model=copy.deepcopy(trained.model))
    trained.model.forward = fail
    with pytest.raises(RunError, match=r"^out of memory: pass a smaller --batch-size$"):
        predict.classify(trained, few_images, 5, "fp32")


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
    phone = tmp_path / "phone" / "x.jxl"
    touch(phone.parent, phone.name)
    notes.write_text("no image")
    pattern = f"{tmp_path}/*.jpg"
    code, out, err = run(paths[0], broken, missing, empty, notes, phone.parent, pattern, paths[1], "--json")
    assert code == 1 and [json.loads(line)["path"] for line in out] == [str(path) for path in paths[:2]]
    *errors, last = err
    assert "6 of 8" in last
    reasons = ("truncated", "no such file", "no image files", "not an image", "convert it", "no file matches")
    files = (broken, missing, empty, notes, phone, pattern)
    for line, path, reason in zip(errors, files, reasons, strict=True):
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


def test_a_drawing_that_fails_is_reported_and_the_others_are_drawn(tmp_path, run, paths, monkeypatch) -> None:
    def write_png(figure: object, path: Path) -> Path:
        if path.name.startswith("00002"):
            raise RunError(f"cannot write {path}: No space left on device")
        return write_png_as_usual(figure, path)

    write_png_as_usual = predict.write_png
    monkeypatch.setattr(predict, "write_png", write_png)
    code, out, err = run(*paths[:3], "--json", "--save", tmp_path / "out")
    assert code == 1 and len(out) == 3
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["00001_00.png", "00003_02.png"]
    assert "No space left" in err[0] and "1 of 3 drawings" in err[1] and len(err) == 2


def test_names_are_cut_by_bytes(tmp_path, run, paths) -> None:
    for letter in "a长":
        paths[0].rename(long := tmp_path / (letter * (240 // len(letter.encode())) + ".png"))
        assert run(long, "--save", tmp_path / "out")[0] == 0
        [drawing] = (tmp_path / "out").iterdir()
        assert drawing.name.startswith(f"00001_{letter * 30}") and len(os.fsencode(drawing.name)) < 120
        drawing.unlink()
        paths[0] = long


def test_no_drawing_replaces_an_input(tmp_path, run, paths, monkeypatch) -> None:
    out = tmp_path / "out"
    assert run(paths[0], "--save", out)[0] == 0
    first = (out / "00001_00.png").read_bytes()
    assert run(paths[0], "--topk", 3, "--save", out)[0] == 0
    second = (out / "00001_00.png").read_bytes()
    assert first != second, "an earlier drawing is replaced"
    (tmp_path / "link.png").symlink_to(out / "00001_00.png")
    for other in (out, out / "00001_00.png", tmp_path / "link.png"):  # named after the drawing is due
        code, lines, err = run(paths[0], other, "--batch-size", 1, "--json", "--save", out)
        assert code == 1 and len(lines) == 2
        assert (out / "00001_00.png").read_bytes() == second
        assert "00001_00.png exists and is, or may be, an input" in err[0] and "1 of 2 drawings" in err[1]
        (out / "00002_00001_00.png").unlink(missing_ok=True)
        (out / "00002_link.png").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(paths[0]))))
    assert run("-", "--save", out)[0] == 1
    assert (out / "00001_00.png").read_bytes() == second


def test_tta_is_that_of_evaluate(paths, run, trained, few_images) -> None:
    [(batch, labels)] = make_test_batches(Split(few_images, np.zeros(20, np.int64)), 20, "cpu")
    expected = averaged_log_probabilities(trained.model, [(batch, labels)]).exp()
    found, probabilities = predict.classify(trained, few_images, 100, "fp32", tta=True)
    torch.testing.assert_close(probabilities.double(), expected.gather(1, found), rtol=1e-6, atol=1e-7)
    plain = predict.classify(trained, few_images, 100, "fp32")[1]
    assert not torch.allclose(probabilities, plain, rtol=1e-3)
    mirrored = predict.classify(trained, few_images[:, :, ::-1].copy(), 100, "fp32", tta=True)
    torch.testing.assert_close(mirrored[1], probabilities, rtol=0, atol=1e-5)
    code, out, _ = run(*paths, "--json", "--topk", 1, "--tta")
    values = [json.loads(line)["predictions"][0]["probability"] for line in out]
    assert code == 0
    np.testing.assert_allclose(values, probabilities[:, 0], rtol=1e-5)


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

    def fake_read(path: str, preview_px: int) -> tuple[np.ndarray, None]:
        read.append(path)
        return np.zeros((32, 32, 3), np.uint8), None

    monkeypatch.setattr(predict, "read_image", fake_read)
    results = predict.predict(trained, endless(), batch_size=4)
    assert not found
    for number in (1, 2, 3):
        batch = list(itertools.islice(results, 4))
        assert [item.path for item in batch] == found[-4:]
        assert len(found) == len(read) == 4 * number
