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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import plain_recipe
from cli import progress_bar, run_main, whole_number
from dataset import DatasetUnavailable, ImageData, Split, load_dataset
from device import choose_compile, choose_device, native_bf16, set_up_torch
from engine import Sums, TrainStep, evaluate, train_one_epoch
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
    repeated,
    step_bytes,
    summary,
)
from model import MODELS, build_model, count_macs
from recipe import Recipe
from utils import choose_workers, make_test_batches, make_train_loader, normalize

# An epoch of CIFAR-100 trains on 50,000 images and tests on 10,000; a measured one keeps the proportion.
EPOCH_IMAGES, TRAIN_PER_TEST = 50_000, 5
SEED = 0
REFERENCE_EPOCHS = 100  # --compile auto decides as for a run of so many epochs


@dataclass(frozen=True)
class Setting:
    """What is measured, and how long."""

    recipe: Recipe
    device: torch.device
    compile: bool
    workers: int
    rounds: int
    images: int  # of one measured epoch
    step_images: int  # of one measurement of the training step, at least
    peak_s: float  # seconds spent on each of the machine's peaks


class Trainer:
    """A network and its step, plain or the project's, that is trained on whatever it is given."""

    def __init__(self, setting: Setting, plain: bool) -> None:
        recipe, self.device = setting.recipe, setting.device
        self.model: nn.Module = build_model(recipe.model).to(self.device)
        if plain:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(),
                lr=recipe.lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=True,
            )
        else:
            self.model = self.model.to(memory_format=torch.channels_last)
            optimizer = recipe.build_optimizer(self.model)
            self.step = TrainStep(
                self.model,
                recipe.build_criterion(),
                optimizer,
                recipe.build_scheduler(optimizer, EPOCH_IMAGES // recipe.batch_size + 1),
                precision=recipe.precision,
                compile_model=setting.compile,
            )


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, measure, and print the table."""
    args = build_parser().parse_args(argv)
    setting = setting_of(args)
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}")
    data, note = load_images(args.data_dir, setting.images)
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
    count("--batch-sizes", nargs="+", help="measure the training step at these sizes too, such as 32 128 4096")
    count("--images", help="training images of one measured epoch (default: 1024, quick 512; CUDA 50000)")
    count("--rounds", help="measurements of each figure (default: 7, quick 3)")
    parser.add_argument("--workers", type=whole_number(0, 256), metavar="N", help="loader processes (default: as train.py)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where (default: auto)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as train.py's (default: auto)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="as train.py's (default: auto)")
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
        raise UsageError(f"--images {images} is not from the batch size, {args.batch_size}, to {EPOCH_IMAGES}")
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


def load_images(data_dir: Path, count: int) -> tuple[tuple[Split, Split], str]:
    """`count` training images and a fifth as many test images, and what they are. Fetches nothing."""
    test_count = max(1, count // TRAIN_PER_TEST)
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
    pairs = [*loader_pairs(setting, data[0]), step_pair(setting, trainers, data[0], setting.recipe.batch_size)]
    pairs += [evaluation_pair(setting, trainers, data[1]), epoch_pair(setting, trainers, data)]
    steps = [step_pair(setting, trainers, data[0], size) for size in batch_sizes]
    total = 2 * len(pairs + steps) * (setting.rounds + 1) + 3
    with progress_bar(total=total, desc="benchmark", unit="run") as bar:
        machine = describe_machine(setting.device)
        machine |= measure_peaks(setting, bar.update)
        measure(pairs + steps, setting.rounds, setting.device, bar.update)
    return figures(setting, pairs, steps, trainers[1].model, machine)


def loader_pairs(setting: Setting, split: Split) -> list[Pair]:
    """Augmented training batches: in this process, and, where train.py would start workers, with them."""
    pin = setting.device.type == "cuda"

    def drain(loader: object) -> int:
        return sum(len(labels) for _, labels in loader)

    pairs = []
    for workers in sorted({0, setting.workers}):
        plain = plain_recipe.make_loader(
            split, setting.recipe.batch_size, train=True, workers=workers, pin_memory=pin
        )
        own = make_train_loader(
            split,
            batch_size=setting.recipe.batch_size,
            seed=SEED,
            augment=setting.recipe.augment,
            workers=workers,
            pin_memory=pin,
        )
        pairs.append(Pair(f"loader {workers}", functools.partial(drain, plain), functools.partial(drain, own)))
    return pairs


def step_pair(setting: Setting, trainers: tuple[Trainer, Trainer], split: Split, size: int) -> Pair:
    """Training steps on one batch of `size` images that is on the device already."""
    plain, own = trainers
    if size != setting.recipe.batch_size and setting.compile:
        own = Trainer(setting, plain=False)  # a step compiles for the first size that it sees
    chosen = np.resize(np.arange(len(split.labels)), size)
    images = torch.from_numpy(split.images[chosen]).to(setting.device)
    labels = torch.from_numpy(split.labels[chosen]).to(setting.device)
    batch = normalize(images).contiguous()

    def plain_step() -> int:
        plain.model.train()
        plain_recipe.train_step(plain.model, plain.optimizer, batch, labels)
        return size

    def own_step() -> int:
        own.model.train()
        own.step(images, labels)
        return size

    times = max(1, setting.step_images // size)
    return Pair(f"step {size}", repeated(plain_step, times), repeated(own_step, times))


def evaluation_pair(setting: Setting, trainers: tuple[Trainer, Trainer], split: Split) -> Pair:
    """Testing once; the project's side has normalised the test images before, as train.py does once a run."""
    plain, own = trainers
    loader = plain_recipe.make_loader(
        split, min(1000, len(split.labels)), train=False, workers=setting.workers
    )
    batches = make_test_batches(split, setting.recipe.test_batch_size, setting.device)
    precision = setting.recipe.precision
    return Pair(
        "evaluation",
        lambda: plain_recipe.evaluate(plain.model, loader, setting.device),
        lambda: evaluate(own.model, batches, precision=precision).images,
    )


def epoch_pair(setting: Setting, trainers: tuple[Trainer, Trainer], data: tuple[Split, Split]) -> Pair:
    """Loading, training and testing together: an epoch of `setting.images` images. Counts training images."""
    plain, own = trainers
    loaders = loader_pairs_of(setting, data[0])
    test = evaluation_pair(setting, trainers, data[1])

    def plain_epoch() -> int:
        seen = plain_recipe.train_epoch(plain.model, plain.optimizer, loaders[0], setting.device)
        test.plain()
        return seen

    def own_epoch() -> int:
        sums = Sums(setting.device)
        metrics = train_one_epoch(own.step, loaders[1], sums, batches=len(loaders[1]))
        test.project()
        return metrics.images

    return Pair("epoch", plain_epoch, own_epoch)
