"""The flags of train.py, and the recipe that they make."""

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import NoReturn

from cifar.augment import AUGMENTATIONS, train_transform
from cifar.dataset import DATASETS
from core.cli import number, whole_number
from core.errors import UsageError, printable
from model import MODELS
from training.flags_training import add_improvement_flags
from training.presets import PRESETS, preset_values, presets_table
from training.recipe import MAX_EPOCHS, PRECISIONS, SCHEDULERS, Recipe

DEFAULT_NAME = "CNN_Model"
DEVICES = ("auto", "cpu", "cuda", "mps")
DEVICE_HELP = "where to compute (default: auto: CUDA, else MPS, else CPU)"
RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; exit code 2 as usual."""

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line and exit with 2."""
        # argparse quotes some arguments as they are: line breaks, terminal codes, a megabyte
        self.exit(2, f"{self.prog}: error: {printable(message, 300)} (see {self.prog} --help)\n")


def plain_name(text: str) -> str:
    """A flag type: a name that is safe as the beginning of file names."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", text):
        raise argparse.ArgumentTypeError(
            f"takes up to 80 letters, digits, '.', '_' or '-', not {printable(text, 40)!r}"
        )
    return text


def augmentation(text: str) -> str:
    """A flag type: the name of an augmentation, with its numbers where it takes some."""
    try:
        train_transform(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(printable(error)) from None
    return text


def build_parser() -> Parser:
    """The parser of train.py. A flag that is not given is None: then a question, or the default, decides."""
    parser = Parser(
        prog="train.py",
        description="Train ResNet-56 (or a relative) on CIFAR-100. Without flags, it asks three questions.",
        epilog=f"{presets_table()}\n\nexample: python train.py --yes --epochs 100 --name my_run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    asked = parser.add_argument_group("answers to the questions")
    asked.add_argument("--yes", action="store_true", help="ask nothing, take the defaults")
    asked.add_argument(
        "--lr-finder",
        action=argparse.BooleanOptionalAction,
        help="run the learning-rate finder first (default: asked; y)",
    )
    asked.add_argument(
        "--lr",
        type=number(1e-8, 100),
        metavar="RATE",
        help="learning rate, instead of the finder's (default: the finder's, or 0.1)",
    )
    asked.add_argument(
        "--epochs",
        type=whole_number(1, MAX_EPOCHS),
        metavar="N",
        help="epochs to train (default: asked; 20)",
    )
    _add_data_flags(parser)
    _add_recipe_flags(parser)
    add_improvement_flags(parser)
    _add_run_flags(parser)
    return parser


def add_data_dir(group: argparse._ActionsContainer, folder_help: str) -> None:
    """Add --data-dir, as every script has it that reads the data set."""
    group.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("CIFAR_DATA") or "data"),
        metavar="DIR",
        help=f"{folder_help} (default: $CIFAR_DATA, else data)",
    )


def add_data_folder(group: argparse._ActionsContainer) -> None:
    """Add --data-dir and --data-url, as the scripts have them that may download the data set."""
    add_data_dir(group, "folder that holds, or gets, cifar-100-python/")
    group.add_argument(
        "--data-url",
        default=os.environ.get("CIFAR100_URL") or None,
        metavar="URL",
        help="try this address or local archive first (default: $CIFAR100_URL)",
    )


def add_weights(group: argparse._ActionsContainer, folder_help: str) -> None:
    """Add --weights and --output-dir, as every script has them that uses a trained network."""
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="checkpoint of train.py (default: the best run in the output folder, else the carried weights)",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("output"),
        metavar="DIR",
        help=f"{folder_help} (default: output)",
    )


def add_processor(group: argparse._ActionsContainer) -> None:
    """Add --device and --precision, as the scripts have them that compute with a trained network."""
    group.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    group.add_argument("--precision", choices=PRECISIONS, help="(default: as the run was tested)")


def _add_data_flags(parser: Parser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        help="cifar100, or the built-in drawn images for machines without it (default: cifar100)",
    )
    add_data_folder(data)
    data.add_argument(
        "--limit-train",
        type=whole_number(1),
        metavar="N",
        help="train on a class-balanced subset of N images, to try things out",
    )
    data.add_argument(
        "--limit-test",
        type=whole_number(1),
        metavar="N",
        help="test on a class-balanced subset of N images",
    )
    data.add_argument(
        "--val-split",
        type=whole_number(0),
        metavar="N",
        help="hold out N training images, choose the best epoch on them, test once at the end (default: 0)",
    )
    data.add_argument(
        "--workers",
        type=whole_number(0, 256),
        metavar="N",
        help="processes that prepare batches; 0: the main one (default: from the cores at hand)",
    )


def _add_recipe_flags(parser: Parser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe", choices=tuple(PRESETS), help="a group of flags, listed at the end")
    recipe.add_argument(
        "--model",
        metavar="NAME",
        choices=sorted(MODELS),
        help=f"network (default: resnet56): {', '.join(sorted(MODELS))}",
    )
    recipe.add_argument(
        "--augment",
        type=augmentation,
        metavar="NAME",
        help=f"Albumentations pipeline (default: reference): {', '.join(sorted(AUGMENTATIONS))}; "
        "randaugment:N,M for N operations of strength M of 30 (default of the two: 2,14)",
    )
    recipe.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="images an optimizer step (default: 128)",
    )
    recipe.add_argument(
        "--test-batch-size",
        type=whole_number(1),
        metavar="N",
        help="images a test step (default: 5000)",
    )
    recipe.add_argument(
        "--momentum",
        type=number(0, 0.9999),
        metavar="M",
        help="SGD momentum, Nesterov (default: 0.9)",
    )
    recipe.add_argument("--weight-decay", type=number(0, 1), metavar="D", help="L2 penalty (default: 5e-4)")
    recipe.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="learning-rate schedule: drops at milestones, one cycle, or a cosine (default: multistep)",
    )
    recipe.add_argument(
        "--milestones",
        type=whole_number(1, MAX_EPOCHS),
        nargs="+",
        metavar="EPOCH",
        help="epochs after which multistep drops the rate (default: 40, 70, 85 %% of the epochs)",
    )
    recipe.add_argument(
        "--gamma",
        type=number(1e-6, 1),
        metavar="G",
        help="factor of each drop (default: 0.2)",
    )
    recipe.add_argument(
        "--max-lr",
        type=number(1e-8, 100),
        metavar="RATE",
        help="peak of onecycle (default: the learning rate)",
    )
    recipe.add_argument(
        "--target-accuracy",
        type=number(0, 100),
        metavar="PERCENT",
        help="mark the first epoch that reaches it (default: 70)",
    )
    recipe.add_argument(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        metavar="N",
        help="of every random draw (default: 0)",
    )


def _add_run_flags(parser: Parser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="folder for plots, history and checkpoints (default: output)",
    )
    run.add_argument(
        "--name",
        type=plain_name,
        metavar="NAME",
        help=f"beginning of the files' names (default: {DEFAULT_NAME})",
    )
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier run of that name (default: NAME-2)",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from this checkpoint, or from the last one of NAME; the recipe comes from the file",
    )
    run.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write curves, gradients, images and the graph to NAME_tensorboard/",
    )
    run.add_argument(
        "--checkpoint-every",
        type=number(0.01, 10_000),
        default=10.0,
        metavar="MINUTES",
        help="checkpoint within an epoch too, this often (default: 10)",
    )
    run.add_argument("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    run.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        help="auto takes bf16 where the processor has it natively (default: auto; with --resume: as before)",
    )
    run.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile the network; auto: where the run is long enough to gain (default: auto)",
    )
    run.add_argument(
        "--deterministic", action="store_true", help="on CUDA: only kernels that give the same bits"
    )
    run.add_argument("--sync-bn", action="store_true", help="with torchrun: BatchNorm over the whole batch")


def apply_preset(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with those of --recipe among them, as if they had been given.

    Raises:
        UsageError: --recipe stands beside --resume.
    """
    if args.recipe is None:
        return args
    if args.resume is not None:
        raise UsageError("--recipe is for new runs: leave it out, the checkpoint has its own")
    given = _given(args)
    given |= {} if args.max_lr is None else {"lr": None}  # both set the peak of onecycle
    return argparse.Namespace(**{**vars(args), **preset_values(args.recipe, given)})


def recipe_from(args: argparse.Namespace, precision: str) -> Recipe:
    """The recipe of the flags given, defaults for the rest.

    Args:
        precision: "fp32" or "bf16", what --precision came to on this device.

    Raises:
        UsageError: two values contradict each other, or one is out of its range.
    """
    if args.lr is not None and args.max_lr is not None:
        raise UsageError("--lr and --max-lr both set the peak of onecycle: pass one of them")
    return Recipe(**(_given(args) | {"precision": precision}))


def check_resume_flags(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse recipe flags that say otherwise than the checkpoint that is resumed.

    Not --precision: a run may go on on another processor, where bf16 is far faster or far slower.

    Raises:
        UsageError: naming the first such flag.
    """
    for name, value in _given(args).items():
        stored = recipe.milestone_epochs if name == "milestones" else getattr(recipe, name)
        if value != stored and name != "precision":
            flag, said, kept = f"--{name.replace('_', '-')}", _shown(value), _shown(stored)
            raise UsageError(
                f"{flag} {said} contradicts the checkpoint's {kept}: leave it out to go on, or start a "
                "new run without --resume"
            )


def _shown(value: object) -> str:
    """`value` as it is written after its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _given(args: argparse.Namespace) -> dict[str, object]:
    """The recipe flags that were given, by field name."""
    values = {name: getattr(args, name, None) for name in RECIPE_FIELDS}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if value is not None}
