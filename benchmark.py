"""Measure the loader, the training step, evaluation and the whole epoch against the plain recipe.

    python benchmark.py                              a table in a few minutes
    python benchmark.py --quick --json speed.json    fewer rounds; the same as JSON

The two sides take turns in one run: this project's, by the functions that train.py calls, and the plain
recipe's (inspection/plain_recipe.py), in a process of its own. On a CPU the training step is measured also
while a Python loop keeps one core busy. The weights are discarded, and no file is written but that of --json.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import core  # before torch: it sets up torch's threads

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

from cifar.dataset import Split, find_folder, load_dataset
from core.cli import PRECISIONS, Parser, add_data_dir, add_device, progress_bar, run_main, whole_number
from core.errors import RunError, UsageError
from core.files import atomic_write_text, check_output
from core.machine import (
    choose_compile,
    choose_device,
    choose_workers,
    device_name,
    fastest_precision,
    precision_name,
    set_up_torch,
    usable_cores,
)
from inspection.plain_recipe import images_per_s
from model import MODELS, build_model, count_macs
from training.engine import RunningTotals, TrainStep, evaluate, train_one_epoch
from training.recipe import Recipe
from utils import make_test_batches, make_train_loader

PLAIN_RECIPE = Path(__file__).resolve().parent / "inspection" / "plain_recipe.py"
# An epoch of CIFAR-100 trains on 50,000 images and tests on 10,000; a measured one keeps the proportion.
EPOCH_IMAGES, TRAIN_PER_TEST = 50_000, 5
REFERENCE_EPOCHS = 100  # --compile auto decides as for a run of this length
SEED = 0
# The rows of the table, and the methods of both sides that do the work once and return its number of images.
BESIDE_BUSY_CORE = "step, beside a busy core"
ROWS = {
    "loader": "loader",
    "step": "step",
    BESIDE_BUSY_CORE: "step",
    "evaluation": "evaluation",
    "epoch": "epoch",
}
# A process that computes until its standard input ends: with this process, even if that is killed.
BUSY_CORE = """
import sys, threading

def loop():
    while True:
        pass

threading.Thread(target=loop, daemon=True).start()
print("started", flush=True)
sys.stdin.read()
"""
# (images, channels, height and width) of the 3x3 convolutions whose fastest is the machine's peak: the three
# shapes of ResNet-56, and two that are easier on caches and registers.
CONVOLUTIONS = ((128, 16, 32), (128, 32, 16), (128, 64, 8), (32, 128, 16), (16, 256, 16))
CONVOLUTION_CALLS = 50  # of each of them


@dataclass(frozen=True)
class Setting:
    """What is measured, and for how long."""

    model: str
    batch_size: int
    precision: str
    device: str
    compile: bool
    workers: int  # loader processes
    rounds: int
    images: int  # training images of a measured epoch
    steps: int  # training steps of one measurement

    @property
    def rows(self) -> tuple[str, ...]:
        """What is measured; a step on a GPU needs one core alone, so not beside a busy one there."""
        return tuple(row for row in ROWS if row != BESIDE_BUSY_CORE or self.device == "cpu")


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, measure, and print the table."""
    args = build_parser().parse_args(argv)
    setting = setting_from(args)
    if args.json:
        check_output(args.json, [".json"])
    train, test, data = load_images(args.data_dir, setting.images)
    set_up_torch(SEED, torch.device(setting.device), deterministic=False)
    machine = describe_machine(setting) | {"data": data}  # first, while nothing else runs
    with plain_process(setting, train, test) as measure_plain:
        rows = measure(measure_plain, ProjectSide(setting, train, test).measure, setting)
    add_derived(rows, setting, machine)
    result = rows | {"machine": machine, "setting": asdict(setting)}
    print(table(result))
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
    flag = parser.add_argument
    count = functools.partial(flag, type=whole_number(1), metavar="N")
    flag("--quick", action="store_true", help="fewer rounds: under 3 minutes on 2 CPU cores")
    flag("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    flag("--model", metavar="NAME", choices=sorted(MODELS), default="resnet56", help="network")
    count("--batch-size", default=128, help="images per training step (default: 128)")
    count("--images", help="training images of a measured epoch (default: 1024, quick 512; CUDA 50000)")
    count("--rounds", help="measurements of each row (default: 7, quick 3)")
    flag("--workers", type=whole_number(0, 256), metavar="N", help="loader processes (default: train.py's)")
    flag("--precision", choices=("auto", *PRECISIONS), default="auto", help="default: auto, as in train.py")
    flag("--compile", choices=("auto", "on", "off"), default="auto", help="default: auto, as in train.py")
    add_device(parser)
    add_data_dir(parser, download=False)
    return parser


def setting_from(args: argparse.Namespace) -> Setting:
    """What the flags, and this machine's defaults for the others, amount to.

    Raises:
        UsageError: an epoch would be smaller than a batch, or larger than the dataset.
    """
    device, batch_size, precision = choose_device(args.device), args.batch_size, args.precision
    if precision == "auto":
        precision = fastest_precision(device)
    images = args.images or (EPOCH_IMAGES if device.type == "cuda" else 512 if args.quick else 1024)
    if not batch_size <= images <= EPOCH_IMAGES:
        raise UsageError(f"--images takes {batch_size} (the batch size) to {EPOCH_IMAGES}, not {images}")
    use_compile, _ = choose_compile(args.compile, device, precision, REFERENCE_EPOCHS * EPOCH_IMAGES, None)
    return Setting(
        model=args.model,
        batch_size=batch_size,
        precision=precision,
        device=str(device),
        compile=use_compile,
        workers=choose_workers(device.type) if args.workers is None else args.workers,
        rounds=args.rounds or (3 if args.quick else 7),
        images=images,
        steps=max(1, (min(images, 256) if device.type == "cpu" else images // 4) // batch_size),
    )


def load_images(data_dir: Path, count: int) -> tuple[Split, Split, str]:
    """`count` training images, their test images, and what they are.

    Nothing is downloaded; where only the archive of CIFAR-100 is here, it is unpacked.
    """
    if find_folder(data_dir) is not None:
        data, name = load_dataset("cifar100", data_dir), "CIFAR-100"
        train, test = data.train, data.test
    else:
        name = "random images (CIFAR-100 is not there)"
        images = np.random.default_rng(SEED).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        train = test = Split(images, np.arange(count) % 100)
    sizes = (train, count), (test, max(1, count // TRAIN_PER_TEST))
    train, test = (Split(split.images[:size], split.labels[:size]) for split, size in sizes)
    return train, test, name


@contextlib.contextmanager
def plain_process(setting: Setting, train: Split, test: Split) -> Iterator[Callable[[str], float]]:
    """Run plain_recipe.py for the `with` block; yields `measure(method)`, which returns images/s.

    The process is new, not forked, since a fork would inherit this process's settings. `measure` raises
    RunError when the plain recipe fails or its process ends.
    """
    options = {name: getattr(setting, name) for name in ("model", "device", "batch_size", "steps", "workers")}
    options |= {"train": (train.images, train.labels), "test": (test.images, test.labels)}
    command, pipe = [sys.executable, str(PLAIN_RECIPE)], subprocess.PIPE
    # the plain recipe runs without the setting of core/__init__.py, unless it is the user's
    own = {"GOMP_SPINCOUNT"} if core.SETS_SPIN_COUNT else set()
    env = {name: value for name, value in os.environ.items() if name not in own}
    # in a session of its own, so that Ctrl-C reaches this process alone, which then ends the other
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True) as process:

        def measure(method: str) -> float:
            try:
                pickle.dump(method, process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
            except (EOFError, OSError):
                answer = f"its process ended with exit code {process.wait()}"
            if isinstance(answer, str):
                raise RunError(f"the plain recipe failed: {answer}")
            return answer

        try:
            with contextlib.suppress(OSError):  # where it has ended, `measure` says so
                pickle.dump(options, process.stdin)
            yield measure
        finally:
            process.kill()  # it has nothing to save; its loader processes end by themselves
            with contextlib.suppress(OSError):
                process.stdin.close()


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy for the `with` block, by a process that runs a plain Python loop.

    Raises:
        RunError: the process ends before the loop starts.
    """
    command, pipe = [sys.executable, "-c", BUSY_CORE], subprocess.PIPE
    # in a session of its own, for the same reason as the plain recipe
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        try:
            if not process.stdout.readline():
                raise RunError(f"the process of the busy core ended with exit code {process.wait()}")
            yield
        finally:
            process.kill()


class ProjectSide:
    """This project's side, by the functions that train.py calls; the methods are those of `PlainRecipe`."""

    def __init__(self, setting: Setting, train: Split, test: Split) -> None:
        recipe = Recipe(model=setting.model, batch_size=setting.batch_size, lr=0.01)
        self.steps, self.device = setting.steps, torch.device(setting.device)
        options = {"seed": SEED, "workers": setting.workers, "pin_memory": self.device.type == "cuda"}
        self.train_loader = make_train_loader(train, batch_size=recipe.batch_size, **options)
        # normalised in advance, as train.py does it once per run
        self.test_batches = make_test_batches(test, recipe.test_batch_size, self.device)
        images, labels = train.images[: recipe.batch_size], train.labels[: recipe.batch_size]
        self.batch = torch.tensor(images, device=self.device), torch.tensor(labels, device=self.device)
        model = build_model(recipe.model).to(self.device, memory_format=torch.channels_last)
        optimizer = recipe.build_optimizer(model)
        self.train_step = TrainStep(
            model,
            recipe.build_criterion(),
            optimizer,
            recipe.build_scheduler(optimizer, len(self.train_loader)),
            precision=setting.precision,
            compile_batch_size=recipe.batch_size if setting.compile else None,
        )

    def measure(self, method: str) -> float:
        """Do the work of `method` once; its images/s."""
        return images_per_s(getattr(self, method), self.device)

    def loader(self) -> int:
        return sum(len(labels) for _, labels in self.train_loader)

    def step(self) -> int:
        self.train_step.model.train()
        for _ in range(self.steps):
            self.train_step(*self.batch)
        return self.steps * len(self.batch[1])

    def evaluation(self) -> int:
        step = self.train_step
        return evaluate(step.model, self.test_batches, precision=step.precision).images

    def epoch(self) -> int:
        metrics = train_one_epoch(self.train_step, self.train_loader, RunningTotals(self.device))
        self.evaluation()
        return metrics.images


def measure(
    plain: Callable[[str], float], project: Callable[[str], float], setting: Setting
) -> dict[str, dict[str, Any]]:
    """Measure every row in each round, after one that is not counted; the summaries by row.

    The sides take turns, so that a slow minute of the machine affects both.

    Args:
        plain, project: the images/s of a method, which is called once.
    """
    rates: dict[str, list[tuple[float, float]]] = {row: [] for row in setting.rows}
    first_round = [row for row in setting.rows if row != BESIDE_BUSY_CORE]  # it has warmed up as "step"
    rows = [*first_round, *list(setting.rows) * setting.rounds]
    for row in progress_bar(iterable=rows, desc="benchmark", unit="row"):
        with busy_core() if row == BESIDE_BUSY_CORE else contextlib.nullcontext():
            rates[row].append((plain(ROWS[row]), project(ROWS[row])))
    return {row: summary(pairs[-setting.rounds :]) for row, pairs in rates.items()}


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
def convolution_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest forward 3x3 convolution of CONVOLUTIONS, in channels_last memory."""
    peaks = []
    for count, channels, side in CONVOLUTIONS:
        images, weight = (
            torch.rand(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last)
            for shape in ((count, channels, side, side), (channels, channels, 3, 3))
        )
        work = functools.partial(F.conv2d, images, weight, padding=1)
        fastest = max(images_per_s(lambda run=work: len(run()), device) for _ in range(CONVOLUTION_CALLS))
        peaks.append(2 * (3 * channels * side) ** 2 * fastest)
    return max(peaks)


def describe_machine(setting: Setting) -> dict[str, Any]:
    """What the results were measured on, as plain types, and how fast its convolutions are."""
    device = torch.device(setting.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[setting.precision]
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precisions": [precision_name(name, device) for name in ("fp32", setting.precision)],
        "convolution_gflop_per_s": convolution_peak(device, dtype) / 1e9,
    }


def processor_name() -> str:
    """The processor's name from /proc/cpuinfo, else from Python."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        if found := re.search(r"^model name\s*: *(.+)", text, re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def add_derived(rows: dict[str, dict], setting: Setting, machine: dict[str, Any]) -> None:
    """Add to the summaries what follows from them.

    A multiply-add is two FLOP and backward costs twice forward, so an image costs 6 per multiply-add. The
    epoch's seconds are those of EPOCH_IMAGES training images and their tests, at its rate.
    """
    step, epoch = rows["step"], rows["epoch"]
    with torch.device("meta"):  # shapes are enough
        step["gflop_per_s"] = step["images_per_s"] * 6 * count_macs(build_model(setting.model)) / 1e9
    step["of_convolution_peak"] = step["gflop_per_s"] / machine["convolution_gflop_per_s"]
    epoch["seconds"] = EPOCH_IMAGES / epoch["images_per_s"]
    epoch["plain_seconds"] = EPOCH_IMAGES / epoch["plain_images_per_s"]


def table(result: dict[str, Any]) -> str:
    """The results as text: a line per row, and how near the training step is to the peak."""

    def cell(entry: dict[str, Any], key: str, digits: int, width: int) -> str:
        values = (f"{value:,.{digits}f}" for value in (entry[key], *entry[f"{key}_spread"]))
        return "{} ({} - {})".format(*values).rjust(width)

    columns = (("plain_images_per_s", 0, 29), ("images_per_s", 0, 29), ("ratio", 2, 23))
    setting, machine, step, epoch = (result[key] for key in ("setting", "machine", "step", "epoch"))
    names = [row for row in ROWS if row in result]
    width = max(map(len, names)) + 1
    lines = (f"{row:{width}}" + "".join(cell(result[row], *column) for column in columns) for row in names)
    (plain, own), mode = machine["precisions"], "compiled" if setting["compile"] else "eager"
    rows = "\n".join(lines)
    return f"""\
{setting["model"]}, batch {setting["batch_size"]}, {setting["workers"]} loader processes, {machine["data"]}
plain: {plain}, NCHW, eager; project: {own}, channels_last, {mode}
{machine["device"]}, {machine["processor"]}, {machine["cores"]} cores, torch {machine["torch"]}, \
load {machine["load_average"]}

images/s, median of {setting["rounds"]} rounds (minimum - maximum)
{"":{width}}{"plain recipe":>29}{"this project":>29}{"ratio":>23}
{rows}

At these rates an epoch of {EPOCH_IMAGES:,} training images and its test takes {epoch["seconds"]:,.1f} s, \
with the plain recipe {epoch["plain_seconds"]:,.1f} s.
Training step: {step["gflop_per_s"]:,.0f} GFLOP/s, {step["of_convolution_peak"]:.0%} of the \
fastest convolution here ({machine["convolution_gflop_per_s"]:,.0f})."""


if __name__ == "__main__":
    sys.exit(run_main(main, "benchmark.py"))
