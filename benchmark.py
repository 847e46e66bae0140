"""Measure the loader, the training step, evaluation and the whole epoch against the plain recipe.

    python benchmark.py                               a table in a few minutes
    python benchmark.py --quick --json speed.json     fewer rounds; the same as JSON
    python benchmark.py --batch-sizes 32 128 512 4096

Both sides are measured in turn in one run, the plain one in a process of its own; the project's side calls
the very functions that train.py calls. Nothing is kept: the weights are thrown away, and no file is written
but that of --json.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmark_pairs import make_step, project_works
from benchmark_setting import EPOCH_IMAGES, SEED, TRAIN_PER_TEST, Setting, build_parser, setting_of
from cifar.dataset import DatasetUnavailable, ImageData, Split, load_dataset
from core.cli import progress_bar, run_main
from core.errors import RunError, UsageError
from core.files import atomic_write_text
from core.machine import precision_name, set_up_torch
from measuring import (
    Pair,
    convolution_peak,
    copy_rate,
    describe_machine,
    matrix_peak,
    measure,
    step_bytes,
    summary,
    timed,
)
from model import count_macs
from plain_side import PlainSide


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, measure, and print the table."""
    args = build_parser().parse_args(argv)
    setting = setting_of(args)
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}")
    data, note = load_images(args.data_dir, setting.images, setting.test_images)
    with torch.random.fork_rng(devices=[]):
        set_up_torch(SEED, setting.device, deterministic=False)
        result = run(setting, data)
    result["machine"]["data"] = note
    print(table(result, setting))
    if args.json:
        atomic_write_text(args.json, json.dumps(result, indent=2) + "\n")
        print(f"\nJSON: {args.json}")
    return 0


def load_images(data_dir: Path, count: int, test_count: int) -> tuple[tuple[Split, Split], str]:
    """So many training and test images, and what they are. Fetches nothing."""
    folder = data_dir / "cifar-100-python"
    data: ImageData | None = None
    if all((folder / name).is_file() for name in ("train", "test", "meta")):
        with contextlib.suppress(DatasetUnavailable, RunError):
            data = load_dataset("cifar100", data_dir)
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


def run(setting: Setting, data: tuple[Split, Split]) -> dict:
    """Measure everything; the figures as the JSON has them."""
    with PlainSide(setting, data) as plain:
        step = make_step(setting)
        pairs = {
            name: Pair(functools.partial(plain.measure, name), functools.partial(timed, work, setting.device))
            for name, work in project_works(setting, data, step).items()
        }
        total = 2 * len(pairs) * (setting.rounds + 1) + 3
        with progress_bar(total=total, desc="benchmark", unit="run") as bar:
            machine = describe_machine(setting.device)
            machine |= measure_peaks(setting, bar.update)
            measure(list(pairs.values()), setting.rounds, bar.update)
    return figures(setting, pairs, step.model, machine)


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


def figures(setting: Setting, pairs: Mapping[str, Pair], model: nn.Module, machine: dict) -> dict:
    """The measurements as the JSON has them: the project's figures and their ratio to the plain ones."""
    own_cpu = setting.device.type == "cpu" and setting.workers == 0
    recipe = setting.recipe
    total = summary(pairs[f"loader {setting.workers}"].samples)
    per_core = summary(pairs["loader 0"].samples, per_core=True)
    loader = per_core | {key: value for key, value in total.items() if key not in per_core}
    loader |= {"total_ratio": total["ratio"], "workers": setting.workers}
    entry = summary(pairs[f"step {recipe.batch_size}"].samples, own_cpu=setting.device.type == "cpu")
    return {
        "loader": loader,
        "step": entry | achieved(entry, setting, model, machine),
        "evaluation": summary(pairs["evaluation"].samples, own_cpu=own_cpu),
        "epoch": with_seconds(summary(pairs["epoch"].samples, own_cpu=own_cpu), setting),
        "batch_sizes": {str(size): summary(pairs[f"step {size}"].samples) for size in setting.sizes},
        "machine": machine,
        "setting": {
            "model": recipe.model,
            "batch_size": recipe.batch_size,
            "precision": recipe.precision,
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
    plain, own = (precision_name(name, setting.device) for name in ("fp32", recipe.precision))
    loader = result["loader"] | {"ratio": result["loader"]["total_ratio"]}
    return "\n".join(
        [
            f"{recipe.model}, batch {recipe.batch_size}, {machine['data']}",
            f"plain: {plain}, NCHW, eager; project: {own}, channels_last, {mode}",
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
