"""Turn a trained network into a file that other programs run, and check it on the spot.

    python export.py --format onnx                        the best run's network as output/NAME.onnx
    python export.py --format onnx --with-preprocessing   uint8 pixels in, probabilities out
    python export.py --format onnx --int8                 in 8-bit integers, calibrated on training images
    python export.py --format torchscript                 for torch.jit.load, in C++ too
    python export.py --format torch-export                for torch.export.load

The file is compared with the network that it comes from, on test images and with several batch sizes; where
an output differs by more than 1e-4 it is not written. With --int8 the change in accuracy is printed instead.
"""

import argparse
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cifar.dataset import (
    ARCHIVE,
    CIFAR100_MEAN,
    CIFAR100_STD,
    FOLDER,
    ImageData,
    balanced_subset,
    load_dataset,
)
from core.cli import LOG, progress_bar, run_main, start_log, whole_number
from core.errors import RunError, UsageError
from core.files import atomic_write
from exporting import (
    ENDINGS,
    Exported,
    WithPreprocessing,
    load_exported,
    require_packages,
    to_int8,
    to_onnx,
    to_torch_export,
    to_torchscript,
)
from training.flags import Parser, add_data_dir, add_weights
from training.trained import LoadedModel, find_weights, load_model
from utils import normalize

LIMIT = 1e-4  # of an output's difference: rounding explains 1e-5 for logits of 10, as trained networks give
CALIBRATION_IMAGES = 500  # five a class: the ranges hardly change with more
LATENCY_BATCHES = (1, 128)
# TorchScript compiles itself during the first calls.
WARM_UP_ROUNDS, MIN_ROUNDS, MAX_ROUNDS, TIMING_S = 3, 3, 50, 3.0
PACKAGES = {"onnx": ("onnx", "onnxruntime")}  # beside the project's own
EXPORTERS = {"onnx": to_onnx, "torchscript": to_torchscript, "torch-export": to_torch_export}
EXAMPLE = np.zeros((2, 32, 32, 3), dtype=np.uint8)  # of one image, torch.export would keep the 1
ToInput = Callable[[np.ndarray], torch.Tensor]  # uint8 [N, 32, 32, 3] to what the network takes


@dataclass(frozen=True, eq=False)
class Checked:
    """The images to check with: uint8 [N, 32, 32, 3], their labels int64 [N] if known, and what they are."""

    images: np.ndarray
    labels: np.ndarray | None
    what: str


def build_parser() -> Parser:
    """The parser of export.py."""
    parser = Parser(
        prog="export.py",
        description="Turn a trained network into a file that other programs run, checked on the spot.",
        epilog="Input: normalised float32 [N, 3, 32, 32], output: logits; with --with-preprocessing uint8 "
        "RGB pixels [N, 32, 32, 3] and probabilities. N is free. The class names are in the metadata.",
        allow_abbrev=False,
    )
    add_weights(parser, "folder of the runs, and for the file where --output is not given")
    parser.add_argument("--format", choices=tuple(ENDINGS), default="onnx", help="(default: onnx)")
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="put normalisation and softmax into the file: uint8 RGB [N, 32, 32, 3] in, probabilities out",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="8-bit weights and activations, calibrated on training images (onnx only)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write; one that is there is replaced (default: NAME, _preprocessing, _int8 and the "
        f"format's ending, {', '.join(ENDINGS.values())}, in the output folder)",
    )
    parser.add_argument(
        "--check-images",
        type=whole_number(1, 10_000),
        default=1000,
        metavar="N",
        help="test images to compare on (default: 1000)",
    )
    add_data_dir(parser, "folder that holds cifar-100-python/; nothing is fetched")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export, compare, time, and only then write."""
    args = build_parser().parse_args(argv)
    if args.int8 and args.format != "onnx":
        raise UsageError(f"--int8 goes with --format onnx only, not {args.format}")
    require_packages(PACKAGES.get(args.format, ()), f"--format {args.format}")
    start_log(None)
    trained = load_model(args.weights or find_weights(args.output_dir))
    target = args.output or args.output_dir / default_name(args, trained)
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist: make it, or pass another --output")
    data = find_data(trained, args.data_dir)
    if args.int8 and data is None:
        raise RunError(f"--int8 needs training images, and {args.data_dir} has none: pass --data-dir")

    model: nn.Module = trained.model
    to_input: ToInput = normalised
    if args.with_preprocessing:
        model, to_input = WithPreprocessing(model).eval(), torch.from_numpy
    checked = images_to_check(data, args.check_images)
    meta = describe(trained, args.with_preprocessing)
    content = EXPORTERS[args.format](model, to_input(EXAMPLE), meta)
    if args.int8:
        images = balanced_subset(data.train, min(CALIBRATION_IMAGES, len(data.train)), seed=0).images
        content = to_int8(content, to_input(images).contiguous().numpy(), meta)
    exported = load_exported(content, args.format)
    compare(model, exported, to_input, checked, "int8" if args.int8 else args.format)
    say_latency(model, exported, to_input(checked.images), args.format)
    with atomic_write(target) as file:
        file.write(content)
    LOG.info(f"Written: {target}, {len(content) / 1e6:.2f} MB ({weight_megabytes(model):.2f} MB of weights)")
    return 0


def default_name(args: argparse.Namespace, trained: LoadedModel) -> str:
    """The file's name: that of the run, what is special, the format's ending."""
    run = re.sub(r"[^A-Za-z0-9._-]", "_", str(trained.state.get("name") or trained.recipe.model))
    special = "_preprocessing" * args.with_preprocessing + "_int8" * args.int8
    return run + special + ENDINGS[args.format]


def find_data(trained: LoadedModel, data_dir: Path) -> ImageData | None:
    """The data that the network was trained on, if it is here or can be drawn; nothing is downloaded."""
    name = trained.recipe.dataset
    if name == "cifar100" and not ((data_dir / FOLDER).is_dir() or (data_dir / ARCHIVE).is_file()):
        return None
    data = load_dataset(name, data_dir)
    if len(data.classes) != len(trained.classes):
        raise RunError(f"{trained.path} has {len(trained.classes)} classes, the data {len(data.classes)}")
    return data


def images_to_check(data: ImageData | None, count: int) -> Checked:
    """The first `count` test images, or random pixels where there is no data."""
    if data is None:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Checked(pixels, None, "random images (CIFAR-100 is not in --data-dir)")
    what = "test images of CIFAR-100" if data.name == "cifar100" else "synthetic test images (not CIFAR-100)"
    return Checked(data.test.images[:count], data.test.labels[:count], what)


def describe(trained: LoadedModel, with_preprocessing: bool) -> dict[str, Any]:
    """What a user of the file needs to know, as plain types."""
    return {
        "network": trained.recipe.model,
        "trained_on": trained.recipe.data_note,
        "input": "uint8 RGB [N, 32, 32, 3]"
        if with_preprocessing
        else "float32 RGB [N, 3, 32, 32], (level / 255 - mean) / std",
        "output": "probabilities [N, classes]" if with_preprocessing else "logits [N, classes]",
        "mean": list(CIFAR100_MEAN),
        "std": list(CIFAR100_STD),
        "classes": list(trained.classes),
        "superclasses": list(trained.superclasses),
        "superclass_of": list(trained.superclass_of),
    }


def normalised(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, 32, 32, 3] to the float32 [N, 3, 32, 32] that the network takes, contiguous."""
    return normalize(torch.tensor(images)).contiguous()


def compare(
    model: nn.Module, exported: Exported, to_input: ToInput, checked: Checked, format_name: str
) -> None:
    """Run both over the images and say how they differ.

    The batches have 1, 2, 128, 128, ... images, since a file may work with the size of its example alone.

    Raises:
        RunError: an output differs by more than LIMIT (NaN does too), and the file is not in int8.
    """
    count = len(checked.images)
    bounds = sorted({0, 1, *range(3, count, 128), count})
    pairs = []
    with progress_bar(total=count, desc="check", unit="image") as bar, torch.inference_mode():
        for first, end in itertools.pairwise(bounds):
            batch = to_input(checked.images[first:end])
            pairs.append((model(batch), exported(batch)))
            bar.update(end - first)
    ours, theirs = (torch.cat(outputs) for outputs in zip(*pairs, strict=True))
    difference = float((ours - theirs).abs().max())
    LOG.info(f"Checked on {count:,} {checked.what}: largest difference {difference:.2g}")
    same = int((ours.argmax(1) == theirs.argmax(1)).sum())
    line = f"Top-1: the same class for {same:,} of {count:,}"
    if checked.labels is not None:
        labels = torch.from_numpy(checked.labels)
        hits = [int((outputs.argmax(1) == labels).sum()) for outputs in (ours, theirs)]
        line += f"; {hits[0]:,} right in PyTorch, {hits[1]:,} in {format_name}"
        line += f" ({100 * (hits[1] - hits[0]) / count:+.2f} points)"
    LOG.info(line)
    if format_name != "int8" and not difference <= LIMIT:
        raise RunError(
            f"the exported network differs from PyTorch's by {difference:.2g}, more than {LIMIT:g}: "
            "no file was written"
        )


def say_latency(model: nn.Module, exported: Exported, inputs: torch.Tensor, format_name: str) -> None:
    """Time both on the CPU in turns, so that a busy machine slows both, and log the medians and ratios."""
    LOG.info(f"Latency on the CPU, {torch.get_num_threads()} thread(s), medians:")
    LOG.info(f"  {'batch':>5}  {'PyTorch':>12}  {format_name:>12}  ratio")
    for size in LATENCY_BATCHES:
        batch = inputs.repeat(-(-size // len(inputs)), *[1] * (inputs.dim() - 1))[:size]
        ours, theirs = medians_ms([model, exported], batch)
        LOG.info(f"  {size:>5}  {ours:>9.2f} ms  {theirs:>9.2f} ms  {ours / theirs:.2f}x as fast")


@torch.inference_mode()
def medians_ms(networks: list[Exported], batch: torch.Tensor) -> list[float]:
    """The median time of each network for `batch`, in milliseconds."""
    for network in networks * WARM_UP_ROUNDS:
        network(batch)
    times: list[list[float]] = [[] for _ in networks]
    began = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or (
        len(times[0]) < MAX_ROUNDS and time.perf_counter() - began < TIMING_S
    ):
        for network, measured in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(batch)
            measured.append(1000 * (time.perf_counter() - start))
    return [statistics.median(measured) for measured in times]


def weight_megabytes(model: nn.Module) -> float:
    """The size of the network's weights and statistics in MB (10^6 bytes)."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 1e6


if __name__ == "__main__":
    sys.exit(run_main(main, "export.py"))
