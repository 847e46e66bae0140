"""Measure the loader, the training step, evaluation and the whole epoch against the plain recipe.

    python benchmark.py                               a table in a few minutes
    python benchmark.py --quick --json speed.json     fewer rounds; the same as JSON
    python benchmark.py --batch-sizes 32 128 512 4096

Both sides are measured in turn in one run; the project's side calls the very functions that train.py calls.
Nothing is kept: the weights are thrown away and no file is written but that of --json.
"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmark_pairs import (
    EPOCH_IMAGES,
    SEED,
    TRAIN_PER_TEST,
    Setting,
    Trainer,
    epoch_pair,
    evaluation_pair,
    loader_pair,
    step_pair,
)
from cli import progress_bar, run_main, whole_number
from dataset import DatasetUnavailable, ImageData, Split, load_dataset
from device import choose_compile, choose_device, native_bf16, set_up_torch
from errors import RunError, UsageError
from files import atomic_write_text
from flags import Parser, add_data_folder
from measuring import (
    Pair,
    convolution_peak,
    copy_rate,
    describe_machine,
    matrix_peak,
    measure,
    step_bytes,
    summary,
)
from model import MODELS, count_macs
from recipe import Recipe
from utils import choose_workers

REFERENCE_EPOCHS = 100  # --compile auto decides as for a run of so many epochs


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, measure, and print the table."""
    args = build_parser().parse_args(argv)
    setting = setting_of(args)
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}")
    data, note = load_images(args.data_dir, setting.images, setting.test_images)
    with torch.random.fork_rng(devices=[]):
        set_up_torch(SEED, setting.device, deterministic=False)
        result = run(setting, data, args.batch_sizes or [])
    result["machine"]["data"] = note
    print(table(result, setting))
    if args.json:
        atomic_write_text(args.json, json.dumps(result, indent=2) + "\n")
        print(f"\nJSON: {args.json}")
    return 0


def build_parser() -> Parser:
    """The parser of benchmark.py."""
    parser = Parser(
        prog="benchmark.py",
        description="Measure this machine's training speed against the plain recipe (fp32, NCHW, eager).",
        allow_abbrev=False,
    )
    count = functools.partial(parser.add_argument, type=whole_number(1), metavar="N")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 3 minutes on 2 CPU cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--model", metavar="NAME", choices=sorted(MODELS), default="resnet56", help="network")
    count("--batch-size", default=128, help="images a training step (default: 128)")
    count(
        "--batch-sizes", nargs="+", help="measure the training step at these sizes too, such as 32 128 4096"
    )
    count("--images", help="training images of one measured epoch (default: 1024, quick 512; CUDA 50000)")
    count("--rounds", help="measurements of each figure (default: 7, quick 3)")
    parser.add_argument(
        "--workers", type=whole_number(0, 256), metavar="N", help="loader processes (default: as train.py)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where (default: auto)"
    )
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as train.py's (default: auto)"
    )
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="as train.py's (default: auto)"
    )
    add_data_folder(parser.add_argument_group("data"))
    return parser


def setting_of(args: argparse.Namespace) -> Setting:
    """What the flags come to on this machine.

    Raises:
        UsageError: an epoch would be smaller than a batch.
    """
    device = choose_device(args.device)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    images = args.images or (EPOCH_IMAGES if device.type == "cuda" else 512 if args.quick else 1024)
    if not args.batch_size <= images <= EPOCH_IMAGES:
        raise UsageError(
            f"--images {images} is not from the batch size, {args.batch_size}, to {EPOCH_IMAGES}"
        )
    recipe = Recipe(model=args.model, batch_size=args.batch_size, lr=0.01, precision=precision)
    use_compile, _ = choose_compile(args.compile, device, precision, REFERENCE_EPOCHS * EPOCH_IMAGES, None)
    return Setting(
        recipe,
        device,
        use_compile,
        choose_workers(device.type) if args.workers is None else args.workers,
        rounds=args.rounds or (3 if args.quick else 7),
        images=images,
        step_images=min(images, 256) if device.type == "cpu" else images // 4,
        peak_s=1.0 if args.quick else 3.0,
    )


def load_images(data_dir: Path, count: int, test_count: int) -> tuple[tuple[Split, Split], str]:
    """So many training and test images, and what they are. Fetches nothing."""
    folder = data_dir / "cifar-100-python"
    data: ImageData | None = None
    if all((folder / name).is_file() for name in ("train", "test", "meta")):
        with contextlib.suppress(DatasetUnavailable, RunError):
            data = load_dataset("cifar100", data_dir, show_progress=False)
    if data is not None:
        splits = tuple(
            Split(np.ascontiguousarray(split.images[:size]), split.labels[:size])
            for split, size in ((data.train, count), (data.test, test_count))
        )
        return splits, "CIFAR-100"
    rng = np.random.default_rng(SEED)
    splits = tuple(
        Split(rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, size))
        for size in (count, test_count)
    )
    return splits, "random images (CIFAR-100 is not there)"


def run(setting: Setting, data: tuple[Split, Split], batch_sizes: list[int]) -> dict:
    """Measure everything; the figures as the JSON has them."""
    trainers = Trainer(setting, plain=True), Trainer(setting, plain=False)
    pairs = [loader_pair(setting, data[0], workers) for workers in sorted({0, setting.workers})]
    pairs.append(step_pair(setting, trainers, data[0], setting.recipe.batch_size))
    pairs.append(evaluation_pair(setting, trainers, data[1]))
    pairs.append(epoch_pair(setting, trainers, data))
    steps = [step_pair(setting, trainers, data[0], size) for size in batch_sizes]
    total = 2 * len(pairs + steps) * (setting.rounds + 1) + 3
    with progress_bar(total=total, desc="benchmark", unit="run") as bar:
        machine = describe_machine(setting.device)
        machine |= measure_peaks(setting, bar.update)
        measure(pairs + steps, setting.rounds, setting.device, bar.update)
    return figures(setting, pairs, steps, trainers[1].model, machine)


def measure_peaks(setting: Setting, after_sample: Callable[[], object]) -> dict[str, float]:
    """What the machine does at best, in the project's precision: matrices, convolutions, copies."""
    dtype = torch.bfloat16 if setting.recipe.precision == "bf16" else torch.float32
    peaks = {}
    for name, work in (
        ("matrix_gflop_per_s", lambda: matrix_peak(setting.device, dtype, setting.peak_s)),
        ("convolution_gflop_per_s", lambda: convolution_peak(setting.device, dtype, setting.peak_s)),
        ("copy_gbyte_per_s", lambda: copy_rate(setting.device, setting.peak_s)),
    ):
        peaks[name] = work() / 1e9
        after_sample()
    return peaks


def figures(setting: Setting, pairs: list[Pair], steps: list[Pair], model: nn.Module, machine: dict) -> dict:
    """The measurements as the JSON has them: the project's figures and their ratio to the plain ones."""
    own_cpu = setting.device.type == "cpu" and setting.workers == 0
    first, step, evaluation, epoch = pairs[0], *pairs[-3:]
    total = summary(pairs[-4].samples)
    per_core = summary(first.samples, per_core=True)
    loader = per_core | {key: value for key, value in total.items() if key not in per_core}
    loader |= {"total_ratio": total["ratio"], "workers": setting.workers}
    entry = summary(step.samples, own_cpu=setting.device.type == "cpu")
    return {
        "loader": loader,
        "step": entry | achieved(entry, setting, model, machine),
        "evaluation": summary(evaluation.samples, own_cpu=own_cpu),
        "epoch": with_seconds(summary(epoch.samples, own_cpu=own_cpu), setting),
        "batch_sizes": {pair.name.split()[1]: summary(pair.samples) for pair in steps},
        "machine": machine,
        "setting": {
            "model": setting.recipe.model,
            "batch_size": setting.recipe.batch_size,
            "precision": setting.recipe.precision,
            "compile": setting.compile,
            "rounds": setting.rounds,
            "epoch_train_images": setting.images,
            "epoch_test_images": setting.test_images,
        },
    }


def achieved(entry: dict, setting: Setting, model: nn.Module, machine: dict) -> dict:
    """FLOP/s and bytes/s of the training step against the machine's peaks.

    A multiply-add is two FLOP; backward costs twice forward, so that an image costs 6 for each multiply-add.
    """
    rate = entry["images_per_s"]
    flops = rate * 6 * count_macs(model) / 1e9
    moved = rate * step_bytes(model, 2 if setting.recipe.precision == "bf16" else 4) / 1e9
    return {
        "gflop_per_s": flops,
        "of_convolution_peak": flops / machine["convolution_gflop_per_s"],
        "of_matrix_peak": flops / machine["matrix_gflop_per_s"],
        "gbyte_per_s_estimated": moved,
        "of_copy_rate": moved / machine["copy_gbyte_per_s"],
    }


def with_seconds(entry: dict, setting: Setting) -> dict:
    """The epoch's entry with the seconds that EPOCH_IMAGES training images, and their tests, take."""
    return entry | {
        "seconds": EPOCH_IMAGES / entry["images_per_s"],
        "plain_seconds": EPOCH_IMAGES / entry["plain_images_per_s"],
    }


def table(result: dict, setting: Setting) -> str:
    """The figures as text: medians with least and most, and what the training step makes of the machine."""
    machine, step, epoch = result["machine"], result["step"], result["epoch"]
    recipe, mode = setting.recipe, "compiled" if setting.compile else "eager"
    loader = result["loader"] | {"ratio": result["loader"]["total_ratio"]}
    return "\n".join(
        [
            f"{recipe.model}, batch {recipe.batch_size}, {machine['data']}",
            f"plain: fp32, NCHW, eager; project: {recipe.precision}, channels_last, {mode}",
            f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, "
            f"{machine['threads']} threads, torch {machine['torch']}, load {machine['load_average']}",
            "",
            f"images/s, median of {setting.rounds} rounds (least - most)",
            f"{'':22}{'plain recipe':>26}{'this project':>26}{'ratio':>8}{'by CPU time':>13}",
            row("loader, one core", result["loader"], "images_per_s_per_core"),
            row(f"loader, {setting.workers} workers", loader),
            row("training step", step),
            row("evaluation", result["evaluation"]),
            row("epoch, with its test", epoch),
            *(row(f"step at batch {size}", entry) for size, entry in result["batch_sizes"].items()),
            "",
            f"An epoch was {setting.images:,} training and {setting.test_images:,} test images; at its rate "
            f"{EPOCH_IMAGES:,} and {EPOCH_IMAGES // TRAIN_PER_TEST:,} take {epoch['seconds']:,.1f} s, plain "
            f"{epoch['plain_seconds']:,.1f} s.",
            f"Training step: {step['gflop_per_s']:,.0f} GFLOP/s, {step['of_convolution_peak']:.0%} of the "
            f"fastest convolution here ({machine['convolution_gflop_per_s']:,.0f}) and "
            f"{step['of_matrix_peak']:.0%} of torch.mm ({machine['matrix_gflop_per_s']:,.0f});",
            f"about {step['gbyte_per_s_estimated']:,.1f} GB/s, were each array moved once a use: "
            f"{step['of_copy_rate']:.0%} of a large copy ({machine['copy_gbyte_per_s']:,.1f}).",
            f"Bound by {bound(step)}.",
        ]
    )


def bound(step: dict) -> str:
    """Which of the machine's limits the training step is nearest to, in words."""
    arithmetic, memory = step["of_convolution_peak"], step["of_copy_rate"]
    if max(arithmetic, memory) < 0.4:
        return "neither (launches, or other programs on this machine)"
    return "the convolutions' arithmetic" if arithmetic >= memory else "memory"


def row(name: str, entry: dict, unit: str = "images_per_s") -> str:
    """One line of the table."""
    cells = [
        f"{entry[key]:,.0f} ({low:,.0f} - {high:,.0f})"
        for key in (f"plain_{unit}", unit)
        for low, high in [entry[f"{key}_spread"]]
    ]
    by_cpu = f"{entry['cpu_time_ratio']:.2f}" if "cpu_time_ratio" in entry and unit == "images_per_s" else ""
    return f"{name:22}{cells[0]:>26}{cells[1]:>26}{entry['ratio']:>8.2f}{by_cpu:>13}".rstrip()


if __name__ == "__main__":
    sys.exit(run_main(main, "benchmark.py"))
