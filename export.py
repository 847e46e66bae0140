"""Export a trained network to a file that other programs run, and verify it on the spot.

    python export.py --format onnx                        the best run's network as output/NAME.onnx
    python export.py --format onnx --with-preprocessing   uint8 pixels in, probabilities out
    python export.py --format onnx --int8                 8-bit integers, calibrated on training images
    python export.py --format torchscript                 for torch.jit.load, in C++ too
    python export.py --format torch-export                for torch.export.load
    python export.py --format checkpoint                  half the size, for the scripts here and --teacher

The exported network is compared with the original on test images and with several batch sizes; if an output
differs by more than 1e-4, no file is written. For the two formats that round the weights, --int8 and
checkpoint (half precision), the change in accuracy is printed instead.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import core  # noqa: F401 (before torch: it sets up torch's threads)

# isort: split
import numpy as np
import torch
from torch import nn

from cifar import dataset
from core.cli import LOG, Parser, add_data_dir, add_weights, progress_bar, run_main, start_log, whole_number
from core.errors import RunError, UsageError
from core.files import atomic_write, check_output
from training.checkpoint import LoadedModel, checkpoint_bytes, find_weights, load_model
from utils import normalize

MAX_DIFFERENCE = 1e-4  # of an output: rounding explains 1e-5 for logits of 10, as trained networks give
CALIBRATION_IMAGES = 500  # five per class: the ranges hardly change with more
LATENCY_BATCHES = (1, 128)
# TorchScript compiles itself during the first calls.
WARM_UP_ROUNDS, MIN_ROUNDS, MAX_ROUNDS, MAX_TIMING_S = 3, 3, 50, 3.0
EXTENSIONS = {"onnx": ".onnx", "torchscript": ".torchscript", "torch-export": ".pt2", "checkpoint": ".pth"}
# What a checkpoint of a finished run needs to be used and traced.
CHECKPOINT_ENTRIES = (
    *("kind", "name", "recipe", "epoch", "accuracy_percent", "chosen_on", "history", "final_test"),
    *("versions", "commit", "classes", "superclasses", "superclass_of"),
)
META = "meta.json"  # the entry of the file that describes it, as JSON
ONNX_OPSET = 17  # of 2022: onnxruntime reads it from 1.12 on
Network = Callable[[torch.Tensor], torch.Tensor]  # a batch in, logits or probabilities out


def build_parser() -> Parser:
    """The parser of export.py."""
    parser = Parser(
        prog="export.py",
        description="Export a trained network to a file that other programs run, and verify it on the spot.",
        epilog="Input: normalised float32 [N, 3, 32, 32], output: logits; with --with-preprocessing uint8 "
        "RGB pixels [N, 32, 32, 3] and probabilities. N is free. The class names are in the metadata.",
        allow_abbrev=False,
    )
    add_weights(parser, "folder of the runs, and for the file where --output is not given")
    flag = parser.add_argument
    text = "checkpoint: the weights in half precision, as in weights/ (default: onnx)"
    flag("--format", choices=tuple(EXTENSIONS), default="onnx", help=text)
    text = "include normalisation and softmax: uint8 RGB [N, 32, 32, 3] in, probabilities out"
    flag("--with-preprocessing", action="store_true", help=text)
    text = "8-bit weights and activations, calibrated on training images (onnx only)"
    flag("--int8", action="store_true", help=text)
    text = "file to write, replaced if it exists (default: NAME, _preprocessing, _int8 and the format's "
    text += f"extension, {', '.join(EXTENSIONS.values())}, in the output folder)"
    flag("--output", type=Path, metavar="FILE", help=text)
    text = "test images to compare on (default: 1000)"
    flag("--check-images", type=whole_number(1, 10_000), default=1000, metavar="N", help=text)
    add_data_dir(parser, download=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export, compare, time, and only then write."""
    args = build_parser().parse_args(argv)
    if args.format == "onnx":
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise RunError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    elif args.int8:
        raise UsageError(f"--int8 goes with --format onnx only, not {args.format}")
    if args.format == "checkpoint" and args.with_preprocessing:
        raise UsageError("--with-preprocessing goes with the other formats: a checkpoint holds weights alone")
    start_log(None)
    trained = load_model(args.weights or find_weights(args.output_dir), model_name=args.model)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", str(trained.state.get("name") or trained.recipe.model))
    name += "_preprocessing" * args.with_preprocessing + "_int8" * args.int8 + EXTENSIONS[args.format]
    target = args.output or args.output_dir / name
    replaceable = {".pth"} if args.format == "checkpoint" else {*EXTENSIONS.values()} - {".pth"}
    check_output(target, sorted(replaceable), [trained.path])
    data = find_data(trained, args.data_dir)
    if args.int8 and data is None:
        raise RunError(f"--int8 needs training images, and {args.data_dir} has none: pass --data-dir")

    model: nn.Module = WithPreprocessing(trained.model).eval() if args.with_preprocessing else trained.model
    to_input = torch.tensor if args.with_preprocessing else normalised
    meta = describe(trained, args.with_preprocessing)
    example = to_input(np.zeros((2, 32, 32, 3), np.uint8))  # of one image, torch.export would keep the 1
    if args.format == "checkpoint":
        content = to_checkpoint(trained)
    else:
        content = EXPORTERS[args.format](model, example, meta)
    if args.int8:
        images = dataset.balanced_subset(data.train, min(CALIBRATION_IMAGES, len(data.train)), seed=0).images
        content = to_int8(content, to_input(images).numpy(), meta)
    exported = load_exported(content, args.format)
    if data is None:
        images = np.random.default_rng(0).integers(0, 256, (args.check_images, 32, 32, 3), dtype=np.uint8)
        labels, what = None, "random images (CIFAR-100 is not in --data-dir)"
    else:
        images, labels = data.test.images[: args.check_images], data.test.labels[: args.check_images]
        what = (
            "test images of CIFAR-100" if data.name == "cifar100" else "synthetic test images (not CIFAR-100)"
        )
    LOG.info(f"Comparing on {len(images):,} {what}:")
    inputs = to_input(images)
    compare(model, exported, inputs, labels, "int8" if args.int8 else args.format)
    if args.format != "checkpoint":  # it runs as the original
        log_latency(model, exported, inputs, args.format)
    with atomic_write(target) as file:
        file.write(content)
    weight_bytes = sum(value.nbytes for value in model.state_dict().values())
    LOG.info(f"Written: {target}, {len(content) / 1e6:.2f} MB ({weight_bytes / 1e6:.2f} MB of weights)")
    return 0


def find_data(trained: LoadedModel, data_dir: Path) -> dataset.ImageData | None:
    """The data that the network was trained on, if it is here or can be drawn; nothing is downloaded."""
    name = trained.recipe.dataset
    here = name != "cifar100" or dataset.find_folder(data_dir) is not None
    return dataset.load_dataset(name, data_dir) if here else None


def describe(trained: LoadedModel, with_preprocessing: bool) -> dict[str, Any]:
    """What a user of the file needs to know, as plain types."""
    pixels, normalised = "uint8 RGB [N, 32, 32, 3]", "float32 RGB [N, 3, 32, 32], (level / 255 - mean) / std"
    return {
        "network": trained.recipe.model,
        **({"trained_on": trained.trained_on} if trained.trained_on else {}),
        "input": pixels if with_preprocessing else normalised,
        "output": "probabilities [N, classes]" if with_preprocessing else "logits [N, classes]",
        "mean": list(dataset.CIFAR100_MEAN),
        "std": list(dataset.CIFAR100_STD),
        "classes": list(trained.classes),
        "superclasses": list(trained.superclasses),
        "superclass_of": list(trained.superclass_of),
    }


def normalised(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, 32, 32, 3] to the float32 [N, 3, 32, 32] that the network takes, contiguous."""
    return normalize(torch.tensor(images)).contiguous()


class WithPreprocessing(nn.Module):
    """`model` from pixels to probabilities: uint8 [N, 32, 32, 3] RGB in, float32 [N, classes] out, sum 1.

    Channels come last (NHWC), as image libraries read them and this project keeps them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # utils.normalize as one multiplication and one subtraction. The constants are buffers, so that each
        # format carries them; not an addition, since to_int8 makes those of the network 8-bit.
        mean, std = torch.tensor([dataset.CIFAR100_MEAN, dataset.CIFAR100_STD], dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (mean / std).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities float32 [N, classes] of `images` (uint8 [N, 32, 32, 3])."""
        normalised = images.float() * self.scale - self.shift
        return self.model(normalised.permute(0, 3, 1, 2)).softmax(1)


def to_torchscript(model: nn.Module, example: torch.Tensor, meta: dict[str, Any]) -> bytes:
    """`model` traced and frozen, BatchNorm folded into the convolutions, for torch.jit.load (in C++ too)."""
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(model, example, check_trace=False))
        torch.jit.save(frozen, buffer, _extra_files={META: json.dumps(meta)})
    return buffer.getvalue()


def to_torch_export(model: nn.Module, example: torch.Tensor, meta: dict[str, Any]) -> bytes:
    """`model` as torch.export's graph of ATen operators: torch.export.load(...).module() runs it."""
    buffer = io.BytesIO()
    with _quiet():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it would carry this machine's paths into the file
        torch.export.save(program, buffer, extra_files={META: json.dumps(meta)})
    return buffer.getvalue()


def to_onnx(model: nn.Module, example: torch.Tensor, meta: dict[str, Any]) -> bytes:
    """`model` as ONNX with opset ONNX_OPSET: input "images", output "logits" or, for a uint8 `example`,
    "probabilities"; the first dimension of both is free.

    By torch's exporter of TorchScript graphs: it takes 1 s where the one of torch.export graphs takes half a
    minute, folds BatchNorm and needs no package but onnx.
    """
    import onnx

    output = "probabilities" if example.dtype == torch.uint8 else "logits"
    buffer = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            model,
            (example,),
            buffer,
            input_names=["images"],
            output_names=[output],
            opset_version=ONNX_OPSET,
            dynamic_axes={"images": {0: "batch"}, output: {0: "batch"}},
            dynamo=False,
        )
    proto = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(proto, full_check=True)
    onnx.helper.set_model_props(proto, {META: json.dumps(meta)})
    return proto.SerializeToString()


EXPORTERS = {"onnx": to_onnx, "torchscript": to_torchscript, "torch-export": to_torch_export}


def to_checkpoint(trained: LoadedModel) -> bytes:
    """The checkpoint with its convolutions and linear layer in float16; vectors, BatchNorm's and biases, stay
    float32.

    Raises:
        UsageError: the file is not one of a finished run: it holds a state to resume, or foreign weights.
    """
    if trained.state.get("kind") not in ("best", "results"):
        raise UsageError(f"{trained.path} is not a NAME_best.pth or NAME_training_results.pth: name one")
    weights = {name: v.half() if v.ndim > 1 else v for name, v in trained.model.state_dict().items()}
    entries = {key: trained.state[key] for key in CHECKPOINT_ENTRIES if key in trained.state}
    return checkpoint_bytes({**entries, "model": weights})


def to_int8(content: bytes, calibration: np.ndarray, meta: dict[str, Any]) -> bytes:
    """The ONNX network `content` with 8-bit weights (one scale per channel) and activations (their ranges are
    those observed on `calibration`, an input of N images), as QuantizeLinear/DequantizeLinear pairs.

    Static, since onnxruntime's dynamic quantisation helps matrix products and hardly convolutions.
    Convolutions and the sums of the shortcuts become 8-bit. The last layer, the pooling before it and the
    preprocessing stay float: that costs no time, and the error of the logits is smaller.
    """
    import onnx
    from onnxruntime import quantization

    batches = ({"images": batch} for batch in np.array_split(calibration, -(-len(calibration) // 100)))

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, prepared, target = (str(Path(folder) / f"{name}.onnx") for name in ("in", "prepared", "out"))
        Path(source).write_bytes(content)
        quantization.shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        proto = onnx.load(target)
    onnx.helper.set_model_props(proto, {META: json.dumps(meta)})
    return proto.SerializeToString()


def load_exported(content: bytes, format_name: str) -> Network:
    """A function that runs the exported bytes on the CPU: batch in, logits or probabilities out."""
    if format_name != "onnx":
        with _quiet():
            if format_name == "checkpoint":
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "exported.pth"
                    path.write_bytes(content)
                    module = load_model(path).model
            elif format_name == "torchscript":
                module = torch.jit.load(io.BytesIO(content), map_location="cpu")
            else:
                module = torch.export.load(io.BytesIO(content)).module()
        return torch.inference_mode()(module)

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # latencies compare at equal threads
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.contiguous().numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings: that TorchScript is deprecated, that tracing fixes shapes (the check
    with other batch sizes would find that), quantisation's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@torch.inference_mode()
def compare(
    model: nn.Module, exported: Network, inputs: torch.Tensor, labels: np.ndarray | None, format_name: str
) -> None:
    """Run both over `inputs` and log how their outputs differ, and their accuracy if `labels` are known.

    The batches have 1, 2, 128, 128, ... images, since a file may work with the size of its example alone.

    Raises:
        RunError: an output differs by more than MAX_DIFFERENCE (NaN does too), and the format does not round.
    """
    count = len(inputs)
    bounds = sorted({0, 1, *range(3, count, 128), count})
    pairs = []
    with progress_bar(total=count, desc="check", unit="image") as bar:
        for first, end in itertools.pairwise(bounds):
            batch = inputs[first:end]
            pairs.append((model(batch), exported(batch)))
            bar.update(end - first)
    ours, theirs = (torch.cat(outputs) for outputs in zip(*pairs, strict=True))
    difference = float((ours - theirs).abs().max())
    same = int((ours.argmax(1) == theirs.argmax(1)).sum())
    LOG.info(f"  largest difference {difference:.2g}; the same top-1 class for {same:,} of {count:,}")
    if labels is not None:
        before, after = (int((outputs.argmax(1).numpy() == labels).sum()) for outputs in (ours, theirs))
        points = 100 * (after - before) / count
        LOG.info(f"  {before:,} correct in PyTorch, {after:,} in {format_name} ({points:+.2f} points)")
    if format_name not in ("int8", "checkpoint") and not difference <= MAX_DIFFERENCE:
        what = (
            f"the exported network differs from PyTorch's by {difference:.2g}, more than {MAX_DIFFERENCE:g}"
        )
        raise RunError(f"{what}: no file was written")


def log_latency(model: nn.Module, exported: Network, inputs: torch.Tensor, format_name: str) -> None:
    """Time both on the CPU and log the medians and ratios."""
    LOG.info(f"Latency on the CPU, {torch.get_num_threads()} thread(s), medians:")
    LOG.info(f"  {'batch':>5}  {'PyTorch':>12}  {format_name:>12}  speed-up")
    for size in LATENCY_BATCHES:
        batch = inputs[torch.arange(size) % len(inputs)]
        ours, theirs = medians_ms([model, exported], batch)
        LOG.info(f"  {size:>5}  {ours:>9.2f} ms  {theirs:>9.2f} ms  {ours / theirs:.2f}x")


@torch.inference_mode()
def medians_ms(networks: list[Network], batch: torch.Tensor) -> list[float]:
    """The median time of each network for `batch`, in milliseconds; in turns, so that a busy machine slows
    all of them."""
    for network in networks * WARM_UP_ROUNDS:
        network(batch)
    times: list[list[float]] = []  # a list for each round
    deadline = time.perf_counter() + MAX_TIMING_S
    while len(times) < MIN_ROUNDS or (len(times) < MAX_ROUNDS and time.perf_counter() < deadline):
        times.append([])
        for network in networks:
            start = time.perf_counter()
            network(batch)
            times[-1].append(1000 * (time.perf_counter() - start))
    return [statistics.median(column) for column in zip(*times, strict=True)]


if __name__ == "__main__":
    sys.exit(run_main(main, "export.py"))
