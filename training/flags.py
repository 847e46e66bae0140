"""The flags of train.py."""

import argparse
from pathlib import Path

from core.cli import PRECISIONS, Parser, add_data_folder, add_device, number, plain_name, whole_number
from training.presets import PRESETS, presets_table
from training.recipe import ANSWERS, DATA, RECIPE, TECHNIQUES, add_recipe_flags
from training.run_files import DEFAULT_NAME


def build_parser() -> Parser:
    """The parser of train.py. A flag that is not given is None: then a question, or the default, decides."""
    parser = Parser(
        prog="train.py",
        description="Train ResNet-56 (or a relative) on CIFAR-100. Without flags, it asks three questions.",
        epilog=f"{presets_table()}\n\nexample: python train.py --yes --epochs 100 --name my_run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {title: parser.add_argument_group(title) for title in (ANSWERS, DATA, RECIPE, TECHNIQUES, "run")}
    flag = groups[ANSWERS].add_argument
    flag("--yes", action="store_true", help="ask nothing, take the defaults")
    flag(
        "--lr-finder",
        action=argparse.BooleanOptionalAction,
        help="run the LR finder first (default: asked; y)",
    )
    groups[RECIPE].add_argument("--recipe", choices=tuple(PRESETS), help="a preset: flags listed at the end")
    add_recipe_flags(groups)
    add_data_folder(groups[DATA])
    groups[DATA].add_argument(
        "--workers",
        type=whole_number(0, 256),
        metavar="N",
        help="processes that prepare batches; 0: the main one (default: from the number of cores)",
    )
    flag = groups["run"].add_argument
    flag("--output-dir", type=Path, metavar="DIR", help="folder of the run's files (default: output)")
    flag(
        "--name",
        type=plain_name,
        metavar="NAME",
        help=f"prefix of the files' names (default: {DEFAULT_NAME})",
    )
    flag("--overwrite", action="store_true", help="replace an earlier run of that name (default: NAME-2)")
    flag(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="resume from this checkpoint, or from the last one of NAME; the recipe comes from the file",
    )
    flag(
        "--tensorboard",
        action="store_true",
        help="also write curves, gradients, images and the graph to NAME_tensorboard/",
    )
    flag(
        "--checkpoint-every",
        type=number(0.01, 10_000),
        default=10.0,
        metavar="MINUTES",
        help="how often to save a checkpoint within an epoch (default: 10)",
    )
    add_device(groups["run"])
    flag(
        "--precision",
        choices=("auto", *PRECISIONS),
        help="auto: bf16 where the processor supports it natively (default: auto; with --resume: as before)",
    )
    flag(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile the network; auto: where the run is long enough to gain (default: auto)",
    )
    flag("--deterministic", action="store_true", help="use deterministic CUDA kernels")
    flag("--sync-bn", action="store_true", help="with torchrun: BatchNorm over the whole batch")
    return parser
