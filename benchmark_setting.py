"""What benchmark.py measures and how long, from its flags."""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from core.cli import whole_number
from core.errors import UsageError
from core.machine import choose_compile, choose_device, choose_workers, native_bf16
from model import MODELS
from training.flags import Parser, add_data_folder
from training.recipe import Recipe

# An epoch of CIFAR-100 trains on 50,000 images and tests on 10,000; a measured one keeps the proportion.
EPOCH_IMAGES, TRAIN_PER_TEST = 50_000, 5
REFERENCE_EPOCHS = 100  # --compile auto decides as for a run of so many epochs
SEED = 0


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
    sizes: tuple[int, ...]  # batch sizes that the training step is measured at, beside the recipe's

    @property
    def test_images(self) -> int:
        """Test images of one measured epoch."""
        return max(1, self.images // TRAIN_PER_TEST)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Every batch size that the training step is measured at, the recipe's first, none twice."""
        return tuple(dict.fromkeys((self.recipe.batch_size, *self.sizes)))

    @property
    def loader_workers(self) -> tuple[int, ...]:
        """The numbers of processes that the loaders are measured with: 0, and the run's own."""
        return tuple(sorted({0, self.workers}))

    def step_times(self, size: int) -> int:
        """How many steps on `size` images make one measurement."""
        return max(1, self.step_images // size)


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
        sizes=tuple(args.batch_sizes or ()),
    )
