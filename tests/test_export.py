"""export.py: each format against the eager network, refusals, what is written and what is not."""

import importlib.util
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmark
import export
from cifar import dataset
from core.cli import DATA_DIR, run_main
from core.errors import RunError, UsageError
from helpers.tiny_checkpoint import CLASSES, save_tiny_checkpoint
from training.checkpoint import load_model
from utils import normalize

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)
FORMATS = [pytest.param("onnx", marks=needs_onnx), "torchscript", "torch-export"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny_best.pth")


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_TIMING_S", 0.0)
    monkeypatch.setattr(export, "LATENCY_BATCHES", (1, 8))


def run(weights: Path, folder: Path, *argv: object, check_images: int = 9) -> int:
    arguments = ["--weights", weights, "--output-dir", folder, "--data-dir", folder, *argv]
    arguments += ["--check-images", check_images]
    return export.main([str(argument) for argument in arguments])


def some_images(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def metadata(content: bytes, format_name: str) -> dict[str, Any]:
    if format_name != "onnx":
        archive = zipfile.ZipFile(io.BytesIO(content))
        [name] = [name for name in archive.namelist() if name.endswith("meta.json")]
        return json.loads(archive.read(name))
    import onnx

    proto = onnx.load_from_string(content)
    assert proto.opset_import[0].version == export.ONNX_OPSET
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    return json.loads({entry.key: entry.value for entry in proto.metadata_props}["meta.json"])


@pytest.mark.parametrize("with_preprocessing", [False, True])
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_file_computes_what_the_network_does_and_describes_itself(
    tmp_path, weights, format_name, with_preprocessing
):
    flags = ["--format", format_name] + ["--with-preprocessing"] * with_preprocessing
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning of an exporter reaches the user
        assert run(weights, tmp_path, *flags) == 0
    name = "tiny" + "_preprocessing" * with_preprocessing + export.EXTENSIONS[format_name]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    content = (tmp_path / name).read_bytes()
    network = export.load_exported(content, format_name)
    model = load_model(weights).model
    for count in (1, 2, 5):
        images = torch.from_numpy(some_images(count))
        with torch.inference_mode():
            expected = model(normalize(images))
        inputs = images if with_preprocessing else normalize(images)
        output, expected = network(inputs), expected.softmax(1) if with_preprocessing else expected
        assert output.shape == (count, 100) and output.dtype == torch.float32
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)

    meta = metadata(content, format_name)
    assert meta["classes"] == list(CLASSES) and meta["trained_on"] == "CIFAR-100"
    if format_name != "torchscript":  # TorchScript keeps the lines of its source, as torch writes it
        assert str(Path(export.__file__).parent).encode() not in content


def test_a_checkpoint_in_half_precision_is_read_like_the_original(tmp_path, weights, capsys) -> None:
    assert run(weights, tmp_path, "--format", "checkpoint") == 0
    assert "the same top-1 class for 9 of 9" in capsys.readouterr().out
    half, original = load_model(tmp_path / "tiny.pth"), load_model(weights)
    assert (tmp_path / "tiny.pth").stat().st_size < 0.6 * weights.stat().st_size
    assert (half.recipe, half.classes) == (original.recipe, original.classes)
    assert {key: half.state[key] for key in ("epoch", "accuracy_percent", "history")} == {
        key: original.state[key] for key in ("epoch", "accuracy_percent", "history")
    }
    for name, value in original.model.state_dict().items():
        rounded = value.half().float() if value.ndim > 1 else value
        assert torch.equal(half.model.state_dict()[name], rounded), name


def test_weights_of_unknown_training_are_exported_and_nothing_is_said_of_it(tmp_path, weights) -> None:
    torch.save(load_model(weights).model.state_dict(), tmp_path / "mine.pth")
    flags = ["--format", "torchscript", "--model", "resnet20"]
    assert run(tmp_path / "mine.pth", tmp_path, *flags) == 0
    meta = metadata((tmp_path / "resnet20.torchscript").read_bytes(), "torchscript")
    assert meta["network"] == "resnet20" and "trained_on" not in meta


@pytest.mark.parametrize("spoil", [lambda x: x + 2e-4, lambda x: x * float("nan")])
def test_a_file_that_differs_is_not_written(tmp_path, weights, monkeypatch, spoil) -> None:
    real = export.load_exported
    monkeypatch.setattr(export, "load_exported", lambda *args: lambda batch: spoil(real(*args)(batch)))
    earlier = tmp_path / "tiny.torchscript"
    earlier.write_bytes(b"earlier")
    with pytest.raises(RunError, match="no file was written"):
        run(weights, tmp_path, "--format", "torchscript")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


def test_a_file_for_one_batch_size_is_found_out(tmp_path, weights, monkeypatch) -> None:
    model, seen = load_model(weights).model, []

    def network(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return model(batch)

    monkeypatch.setattr(export, "load_exported", lambda *_args: network)
    monkeypatch.setattr(export, "log_latency", lambda *_args: None)
    for count, sizes in ((1, [1]), (2, [1, 1]), (9, [1, 2, 6]), (140, [1, 2, 128, 9])):
        seen.clear()
        assert run(weights, tmp_path, "--format", "torchscript", check_images=count) == 0
        assert seen == sizes


@needs_onnx
def test_real_test_images_are_counted_and_int8_is_calibrated(tmp_path, weights, tiny_cifar, capsys) -> None:
    tiny_cifar.lay(tmp_path)
    assert run(weights, tmp_path, check_images=100) == 0
    out = capsys.readouterr().out
    assert "Comparing on 100 test images of CIFAR-100" in out
    assert "the same top-1 class for 100 of 100" in out and "(+0.00 points)" in out

    assert run(weights, tmp_path, "--int8", "--with-preprocessing", check_images=100) == 0
    out = capsys.readouterr().out
    assert "correct in PyTorch" in out and "in int8" in out and "points)" in out
    content = (tmp_path / "tiny_preprocessing_int8.onnx").read_bytes()
    assert len(content) < 0.45 * (tmp_path / "tiny.onnx").stat().st_size
    # 8-bit, and still the same network: close, but not equal
    model = load_model(weights).model
    images = torch.from_numpy(some_images(100))
    with torch.inference_mode():
        expected = model(normalize(images)).softmax(1)
    difference = (export.load_exported(content, "onnx")(images) - expected).abs()
    assert difference.max() > 1e-4 and difference.mean() < 0.01


def test_the_data_is_found_where_load_dataset_finds_it(tmp_path, weights, monkeypatch, tiny_cifar) -> None:
    trained, folder = load_model(weights), tiny_cifar.lay(tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "REPOSITORY_DATA", folder.parent)
    assert export.find_data(trained, tmp_path) is None
    for data_dir in (folder, folder.parent, DATA_DIR):
        assert len(export.find_data(trained, data_dir).train) == 200
        train, _, name = benchmark.load_images(data_dir, 50)
        assert (len(train), name) == (50, "CIFAR-100")


def test_random_images_where_there_is_no_data(tmp_path, weights, capsys, tiny_cifar) -> None:
    (tmp_path / "cifar-100-python").mkdir()  # empty: nothing is downloaded into it
    assert run(weights, tmp_path, "--format", "torchscript") == 0
    out = capsys.readouterr().out
    assert "Comparing on 9 random images" in out and "correct in PyTorch" not in out
    assert "Latency" in out and "speed-up" in out and "tiny.torchscript, 1." in out


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        pytest.param(["--int8"], RunError, "needs training images", marks=needs_onnx),
        (["--int8", "--format", "torchscript"], UsageError, "--int8 goes with --format onnx only"),
        (["--format", "checkpoint", "--with-preprocessing"], UsageError, "goes with the other formats"),
        (["--format", "torchscript", "--output", "none/x.pt"], UsageError, "there is no folder none"),
        (["--format", "torchscript", "--output", "."], UsageError, "it is a folder"),
        (["--format", "torchscript", "--output", export.__file__], UsageError, "not a .onnx or .pt2"),
    ],
)
def test_what_cannot_be_exported_is_refused_first(tmp_path, weights, monkeypatch, argv, error, message):
    monkeypatch.setattr(export, "to_torchscript", None)
    with pytest.raises(error, match=message):
        run(weights, tmp_path, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["w.pth", "w.onnx"])
def test_the_weights_are_never_replaced(tmp_path: Path, weights: Path, name: str) -> None:
    copy = tmp_path / name
    copy.write_bytes(weights.read_bytes())
    with pytest.raises(UsageError, match=r"w2\.pth exists and is not a \.onnx or \.pt2"):
        (tmp_path / "w2.pth").write_bytes(weights.read_bytes())
        run(copy, tmp_path, "--format", "torchscript", "--output", tmp_path / "w2.pth")
    with pytest.raises(UsageError, match=f"{name} is an input of this command"):
        run(copy, tmp_path, "--format", "torchscript", "--output", copy)
    assert copy.read_bytes() == weights.read_bytes()


def test_without_the_optional_packages_one_line_says_what_to_install(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_main(lambda: run(weights, tmp_path), "export.py") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("pip install onnx onnxruntime")
