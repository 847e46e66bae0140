"""Measure the loader, the training step, evaluation and the whole epoch against the plain recipe.

    python benchmark.py                               a table in a few minutes
    python benchmark.py --quick --json speed.json     fewer rounds; the same as JSON
    python benchmark.py --batch-sizes 32 128 512 4096

The two sides take turns in one run: this project's, by the functions that train.py calls, and the plain
recipe's (inspection/plain_recipe.py), in a process of its own. The weights are discarded, and no file is
written but that of --json.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cifar.dataset import DatasetUnavailable, Split, load_dataset
from core.cli import Parser, add_data_folder, progress_bar, run_main, whole_number
from core.cores import choose_workers, usable_cores
from core.errors import RunError, UsageError
from core.files import atomic_write_text
from core.machine import (
    choose_compile,
    choose_device,
    device_name,
    native_bf16,
    precision_name,
    set_up_torch,
)
from inspection.plain_recipe import images_per_s
from model import MODELS, build_model, count_macs
from training.engine import RunningTotals, TrainStep, evaluate, train_one_epoch
from training.recipe import Recipe
from utils import make_test_batches, make_train_loader

PLAIN_RECIPE = Path(__file__).resolve().parent / "inspection" / "plain_recipe.py"
EXIT_TIMEOUT_S = 5.0  # for the plain recipe's process, before it is killed
# An epoch of CIFAR-100 trains on 50,000 images and tests on 10,000; a measured one keeps the proportion.
EPOCH_IMAGES, TRAIN_PER_TEST = 50_000, 5
REFERENCE_EPOCHS = 100  # --compile auto decides as for a run of this length
SEED = 0
# (images, channels, height and width) of the 3x3 convolutions whose fastest is the machine's peak: the three
# shapes of ResNet-56, and two that are easier on caches and registers.
CONVOLUTIONS = ((128, 16, 32), (128, 32, 16), (128, 64, 8), (32, 128, 16), (16, 256, 16))


@dataclass(frozen=True)
class Setting:
    """What is measured, and for how long."""

    recipe: Recipe
    device: torch.device
    compile: bool
    workers: tuple[int, ...]  # numbers of loader processes: 0, then the run's own where it has some
    batch_sizes: tuple[int, ...]  # of the training step, the recipe's first
    rounds: int
    images: int  # training images of a measured epoch
    test_images: int
    step_images: int  # images of one measurement of the training step, at least
    peak_s: float  # seconds spent on the convolution peak


class Row(NamedTuple):
    """A row of the table: two callables that do the same work once and return its rate in images/s."""

    name: str
    plain: Callable[[], float]
    project: Callable[[], float]


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, measure, and print the table."""
    args = build_parser().parse_args(argv)
    setting = setting_from(args)
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}")
    train, test, data_name = load_images(args.data_dir, setting.images, setting.test_images)
    with torch.random.fork_rng(devices=[]):
        set_up_torch(SEED, setting.device, deterministic=False)
        rows, machine = run(setting, train, test)
    result = results(setting, rows, machine | {"data": data_name})
    print(table(setting, rows, result))
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--model", metavar="NAME", choices=sorted(MODELS), default="resnet56", help="network")
    count("--batch-size", default=128, help="images per training step (default: 128)")
    count("--batch-sizes", nargs="+", help="also measure the training step at these sizes: 32 128 4096, say")
    count("--images", help="training images of a measured epoch (default: 1024, quick 512; CUDA 50000)")
    count("--rounds", help="measurements of each row (default: 7, quick 3)")
    workers_help = "loader processes (default: as in train.py)"
    parser.add_argument("--workers", type=whole_number(0, 256), metavar="N", help=workers_help)
    for flag, choices in (("device", "cpu cuda mps"), ("precision", "fp32 bf16"), ("compile", "on off")):
        options = ("auto", *choices.split())
        parser.add_argument(
            f"--{flag}", choices=options, default="auto", help="default: auto, as in train.py"
        )
    add_data_folder(parser.add_argument_group("data"))
    return parser


def setting_from(args: argparse.Namespace) -> Setting:
    """What the flags, and this machine's defaults for the others, amount to.

    Raises:
        UsageError: an epoch would be smaller than a batch, or larger than the dataset.
    """
    device = choose_device(args.device)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    images = args.images or (EPOCH_IMAGES if device.type == "cuda" else 512 if args.quick else 1024)
    if not args.batch_size <= images <= EPOCH_IMAGES:
        raise UsageError(f"--images takes {args.batch_size} (the batch size) to {EPOCH_IMAGES}, not {images}")
    use_compile, _ = choose_compile(args.compile, device, precision, REFERENCE_EPOCHS * EPOCH_IMAGES, None)
    workers = choose_workers(device.type) if args.workers is None else args.workers
    return Setting(
        Recipe(model=args.model, batch_size=args.batch_size, lr=0.01, precision=precision),
        device,
        use_compile,
        workers=(0, workers) if workers else (0,),
        batch_sizes=tuple(dict.fromkeys((args.batch_size, *(args.batch_sizes or ())))),
        rounds=args.rounds or (3 if args.quick else 7),
        images=images,
        test_images=max(1, images // TRAIN_PER_TEST),
        step_images=min(images, 256) if device.type == "cpu" else images // 4,
        peak_s=1.0 if args.quick else 3.0,
    )


def load_images(data_dir: Path, *sizes: int) -> tuple[Split, Split, str]:
    """So many training and test images, and what they are; nothing is downloaded."""
    folder = data_dir / "cifar-100-python"
    if all((folder / name).is_file() for name in ("train", "test", "meta")):
        with contextlib.suppress(DatasetUnavailable, RunError):
            data = load_dataset("cifar100", data_dir)
            pairs = zip((data.train, data.test), sizes, strict=True)
            train, test = (Split(split.images[:size], split.labels[:size]) for split, size in pairs)
            return train, test, "CIFAR-100"
    rng = np.random.default_rng(SEED)
    train, test = (
        Split(rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, size))
        for size in sizes
    )
    return train, test, "random images (CIFAR-100 is not there)"


def run(setting: Setting, train: Split, test: Split) -> tuple[dict[str, dict], dict[str, Any]]:
    """Measure everything; the summary of each row by its name, and the machine."""
    machine = describe_machine(setting)  # first, while nothing else runs
    with plain_process(setting, train, test) as measure_plain:
        rows = make_rows(setting, measure_plain, ProjectSide(setting, train, test))
        total = 2 * len(rows) * (setting.rounds + 1)
        with progress_bar(total=total, desc="benchmark", unit="run") as bar:
            return measure(rows, setting.rounds, bar.update), machine


@contextlib.contextmanager
def plain_process(setting: Setting, train: Split, test: Split) -> Iterator[Callable[..., float]]:
    """Run plain_recipe.py for the `with` block; yields `measure_plain(method, **arguments)` -> images/s.

    The process is new, not forked, since a fork would inherit this process's settings. `measure_plain` raises
    RunError when the plain recipe fails or its process ends.
    """
    recipe, device = setting.recipe, str(setting.device)
    options = {"model": recipe.model, "batch_size": recipe.batch_size, "device": device}
    options |= {"workers": setting.workers, "step_sizes": setting.batch_sizes}
    options |= {"train": (train.images, train.labels), "test": (test.images, test.labels)}
    command, pipe = [sys.executable, str(PLAIN_RECIPE)], subprocess.PIPE
    # in a session of its own, so that Ctrl-C reaches this process alone, which then ends the other
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:

        def measure_plain(method: str, **arguments: int) -> float:
            try:
                pickle.dump((method, arguments), process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
            except (EOFError, OSError):
                answer = f"its process ended with exit code {process.wait()}"
            if isinstance(answer, str):
                raise RunError(f"the plain recipe failed: {answer}")
            return answer

        try:
            with contextlib.suppress(OSError):  # where it has ended, `measure_plain` says so
                pickle.dump(options, process.stdin)
            yield measure_plain
        finally:
            try:
                # not just the end of the pipe: loader processes forked from here hold it open
                process.communicate(pickle.dumps(None), timeout=EXIT_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired):
                process.kill()


class ProjectSide:
    """This project's side, by the functions that train.py calls; the methods are those of `PlainRecipe`.

    The test images are normalised in advance, as train.py does it once per run.
    """

    def __init__(self, setting: Setting, train: Split, test: Split) -> None:
        self.recipe, self.device = setting.recipe, setting.device
        options = {"batch_size": self.recipe.batch_size, "augment": self.recipe.augment, "seed": SEED}
        options |= {"pin_memory": self.device.type == "cuda"}
        self.loaders = {n: make_train_loader(train, workers=n, **options) for n in setting.workers}
        self.train_loader = self.loaders[setting.workers[-1]]
        self.test_batches = make_test_batches(test, self.recipe.test_batch_size, self.device)
        self.batches = {}
        for size in setting.batch_sizes:  # np.resize repeats the images where there are too few
            arrays = np.resize(train.images, (size, 32, 32, 3)), np.resize(train.labels, size)
            self.batches[size] = [torch.from_numpy(array).to(self.device) for array in arrays]
        # one each, since a step is compiled for one batch size
        self.steps = {size: make_step(setting, size) for size in setting.batch_sizes}
        self.epoch_step = self.steps[self.recipe.batch_size]

    def loader(self, workers: int) -> int:
        """Take all batches of an epoch from the training loader."""
        return sum(len(labels) for _, labels in self.loaders[workers])

    def step(self, batch_size: int, steps: int) -> int:
        """Train `steps` times on the same batch, which is on the device already."""
        step = self.steps[batch_size]
        step.model.train()
        for _ in range(steps):
            step(*self.batches[batch_size])
        return steps * batch_size

    def evaluation(self) -> int:
        """Loss and accuracy over the test images."""
        return evaluate(self.epoch_step.model, self.test_batches, precision=self.recipe.precision).images

    def epoch(self) -> int:
        """Train on all images, then evaluate; returns the number of training images."""
        metrics = train_one_epoch(self.epoch_step, self.train_loader, RunningTotals(self.device))
        self.evaluation()
        return metrics.images


def make_step(setting: Setting, batch_size: int) -> TrainStep:
    """A network and its training step for batches of that size, as train.py makes them."""
    recipe = setting.recipe
    model = build_model(recipe.model).to(setting.device, memory_format=torch.channels_last)
    optimizer = recipe.build_optimizer(model)
    return TrainStep(
        model,
        recipe.build_criterion(),
        optimizer,
        recipe.build_scheduler(optimizer, EPOCH_IMAGES // recipe.batch_size + 1),
        precision=recipe.precision,
        compile_batch_size=batch_size if setting.compile else None,
    )


def make_rows(setting: Setting, plain: Callable[..., float], project: ProjectSide) -> list[Row]:
    """The table's rows; `plain` measures a method of `PlainRecipe`, `project` has the same methods."""

    def row(name: str, method: str, **arguments: int) -> Row:
        work = functools.partial(getattr(project, method), **arguments)
        project_rate = functools.partial(images_per_s, work, setting.device)
        return Row(name, functools.partial(plain, method, **arguments), project_rate)

    loaders = [row(loader_name(workers), "loader", workers=workers) for workers in setting.workers]
    first, *steps = (
        row(f"step at batch {size}", "step", batch_size=size, steps=max(1, setting.step_images // size))
        for size in setting.batch_sizes
    )
    epoch = [row("evaluation", "evaluation"), row("epoch with its test", "epoch")]
    return [*loaders, first._replace(name="training step"), *epoch, *steps]


def loader_name(workers: int) -> str:
    """The name of the loader's row."""
    return f"loader, {workers} workers" if workers else "loader, in the training process"


def measure(rows: Sequence[Row], rounds: int, after_sample: Callable[[], object]) -> dict[str, dict]:
    """Measure every row in each of `rounds` rounds, after an unmeasured one; the summaries by row.

    The sides take turns, so that a slow minute of the machine affects both. `after_sample` is called
    2 * len(rows) * (rounds + 1) times.
    """
    rates: dict[str, list[tuple[float, float]]] = {row.name: [] for row in rows}
    for _ in range(rounds + 1):
        for row in rows:
            plain = row.plain()
            after_sample()
            rates[row.name].append((plain, row.project()))
            after_sample()
    return {name: summary(pairs[1:]) for name, pairs in rates.items()}


def summary(rates: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians of (plain, project) rates with minimum and maximum; the ratio is that of the medians."""
    plain, project = zip(*rates, strict=True)
    ratios = [b / a for a, b in rates]
    entry = {"images_per_s": statistics.median(project), "plain_images_per_s": statistics.median(plain)}
    entry["ratio"] = entry["images_per_s"] / entry["plain_images_per_s"]
    for key, values in zip(tuple(entry), (project, plain, ratios), strict=True):
        entry[f"{key}_spread"] = [min(values), max(values)]
    return entry


@torch.no_grad()
def convolution_peak(device: torch.device, dtype: torch.dtype, at_least_s: float) -> float:
    """FLOP/s of the fastest forward 3x3 convolution of CONVOLUTIONS, in channels_last memory."""

    def convolve(images: torch.Tensor, weight: torch.Tensor) -> int:
        return len(F.conv2d(images, weight, padding=1))

    best = 0.0
    for count, channels, side in CONVOLUTIONS:
        images, weight = (
            torch.rand(shape, device=device).to(dtype).to(memory_format=torch.channels_last)
            for shape in ((count, channels, side, side), (channels, channels, 3, 3))
        )
        work = functools.partial(convolve, images, weight)
        end = time.perf_counter() + at_least_s / len(CONVOLUTIONS)
        rates: list[float] = []
        while len(rates) < 4 or time.perf_counter() < end:  # the first call allocates and chooses a kernel
            rates.append(images_per_s(work, device))
        best = max(best, 2 * (3 * channels * side) ** 2 * max(rates))
    return best


def describe_machine(setting: Setting) -> dict[str, Any]:
    """What the results were measured on, as plain types, and how fast its convolutions are."""
    dtype = torch.bfloat16 if setting.recipe.precision == "bf16" else torch.float32
    return {
        "device": device_name(setting.device),
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "convolution_gflop_per_s": convolution_peak(setting.device, dtype, setting.peak_s) / 1e9,
    }


def processor_name() -> str:
    """The processor's name from /proc/cpuinfo, else from Python."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def results(setting: Setting, rows: dict[str, dict], machine: dict[str, Any]) -> dict[str, Any]:
    """The summaries, and what follows from them, as the JSON file holds them.

    A multiply-add is two FLOP and backward costs twice forward, so an image costs 6 per multiply-add. The
    epoch's seconds are those of EPOCH_IMAGES training images and their tests, at its rate.
    """
    recipe, workers = setting.recipe, setting.workers[-1]
    step, epoch = dict(rows["training step"]), dict(rows["epoch with its test"])
    loader = rows[loader_name(workers)] | {"workers": workers}
    loader["images_per_s_per_core"] = rows[loader_name(0)]["images_per_s"]  # one process
    with torch.device("meta"):  # shapes are enough
        step["gflop_per_s"] = step["images_per_s"] * 6 * count_macs(build_model(recipe.model)) / 1e9
    step["of_convolution_peak"] = step["gflop_per_s"] / machine["convolution_gflop_per_s"]
    epoch["seconds"] = EPOCH_IMAGES / epoch["images_per_s"]
    epoch["plain_seconds"] = EPOCH_IMAGES / epoch["plain_images_per_s"]
    return {
        "loader": loader,
        "step": step,
        "evaluation": rows["evaluation"],
        "epoch": epoch,
        "batch_sizes": {size: rows[f"step at batch {size}"] for size in setting.batch_sizes[1:]},
        "machine": machine,
        "setting": {name: getattr(recipe, name) for name in ("model", "batch_size", "precision")}
        | {"compile": setting.compile, "rounds": setting.rounds}
        | {"epoch_train_images": setting.images, "epoch_test_images": setting.test_images},
    }


def table(setting: Setting, rows: dict[str, dict], result: dict[str, Any]) -> str:
    """The results as text: a line per row, and how near the training step is to the peak."""
    machine, step, epoch, recipe = result["machine"], result["step"], result["epoch"], setting.recipe
    mode = "compiled" if setting.compile else "eager"
    plain, own = (precision_name(name, setting.device) for name in ("fp32", recipe.precision))
    return "\n".join(
        [
            f"{recipe.model}, batch {recipe.batch_size}, {machine['data']}",
            f"plain: {plain}, NCHW, eager; project: {own}, channels_last, {mode}",
            f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, "
            f"{machine['threads']} threads, torch {machine['torch']}, load {machine['load_average']}",
            "",
            f"images/s, median of {setting.rounds} rounds (minimum - maximum)",
            f"{'':32}{'plain recipe':>29}{'this project':>29}{'ratio':>23}",
            *(table_row(name, entry) for name, entry in rows.items()),
            "",
            f"A measured epoch has {setting.images:,} training and {setting.test_images:,} test images; "
            f"{EPOCH_IMAGES:,} and {EPOCH_IMAGES // TRAIN_PER_TEST:,} at its rate",
            f"take {epoch['seconds']:,.1f} s, with the plain recipe {epoch['plain_seconds']:,.1f} s.",
            f"Training step: {step['gflop_per_s']:,.0f} GFLOP/s, {step['of_convolution_peak']:.0%} of the "
            f"fastest convolution here ({machine['convolution_gflop_per_s']:,.0f}).",
        ]
    )


def table_row(name: str, entry: dict[str, Any]) -> str:
    """One row: three medians, each with its spread."""
    cells = [f"{name:32}"]
    for key, digits, width in (("plain_images_per_s", 0, 29), ("images_per_s", 0, 29), ("ratio", 2, 23)):
        median, low, high = (f"{value:,.{digits}f}" for value in (entry[key], *entry[f"{key}_spread"]))
        cells.append(f"{median} ({low} - {high})".rjust(width))
    return "".join(cells)


if __name__ == "__main__":
    sys.exit(run_main(main, "benchmark.py"))
