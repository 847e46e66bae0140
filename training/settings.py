"""The command line of train.py: its flags, and those of them that are not part of the recipe."""

import argparse
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from core import distributed
from core.cli import (
    PRECISIONS,
    Parser,
    add_data_dir,
    add_device,
    number,
    plain_name,
    shell_command,
    whole_number,
)
from training.presets import PRESETS, presets_table
from training.recipe import ANSWERS, DATA, RECIPE, TECHNIQUES, add_recipe_flags

DEFAULT_NAME = "CNN_Model"
# The flags of a new run, beside the recipe's: the command that resumes it repeats all others.
NEW_RUN_FLAGS = {"yes", "lr_finder", "output_dir", "name", "overwrite", "resume"}


@dataclass(frozen=True)
class Settings:
    """The choices of one call that are not part of the recipe: this machine, its files, what is asked.

    Attributes:
        lr_finder: None where that is asked.
        resume: "" for the last run of `name`.
        checkpoint_every: minutes.
        lr_given, epochs_given: whether a flag answers the question.
        repeated_flags: the flags, as words, that the command for resuming repeats.
    """

    yes: bool
    lr_finder: bool | None
    data_dir: Path
    data_url: str | None
    workers: int | None
    output_dir: Path | None
    name: str | None
    overwrite: bool
    resume: str | None
    tensorboard: bool
    checkpoint_every: float
    device: str
    compile: str
    deterministic: bool
    sync_bn: bool
    lr_given: bool
    epochs_given: bool
    repeated_flags: tuple[str, ...]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Settings":
        """The settings among the parsed flags."""
        defaults = vars(build_parser().parse_args([]))
        values = {name: value for name, value in vars(args).items() if name in {f.name for f in fields(cls)}}
        repeated: list[str] = []
        for name, value in values.items():
            if name not in NEW_RUN_FLAGS and value != defaults[name]:
                repeated += [f"--{name.replace('_', '-')}", *([] if value is True else [f"{value}"])]
        return cls(
            **values,
            lr_given=args.lr is not None or args.max_lr is not None,
            epochs_given=args.epochs is not None,
            repeated_flags=tuple(repeated),
        )

    def resume_command(self, state: Path) -> str:
        """The command that resumes a run from `state`, on the machine of rank 0."""
        script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
        processes, here = distributed.world_size(), distributed.local_world_size()
        launcher = ["python"] if processes == 1 else ["torchrun", f"--nproc-per-node={here}"]
        if processes > here:  # several machines; this is the first of them
            address = (
                f"--master-addr={os.environ['MASTER_ADDR']}",
                f"--master-port={os.environ['MASTER_PORT']}",
            )
            launcher += [f"--nnodes={processes // here}", "--node-rank=0", *address]
        return shell_command([*launcher, script, "--resume", str(state), *self.repeated_flags])


DESCRIPTION = """\
Train ResNet-56 (or a relative) on CIFAR-100. Without flags, it asks three questions.

  python train.py --yes --epochs 100        asks nothing
  python train.py --recipe fast             one of the recipes listed at the end
  python train.py --lr 0.1                  sets the learning rate: no LR finder
  python train.py --model resnet20          another network
  python train.py --limit-train 5000        on a part of the images
  python train.py --name trial              names the files in output/
  python train.py --resume                  goes on with an interrupted run"""


def build_parser() -> Parser:
    """The parser of train.py. A flag that is not given is None: then a question, or the default, decides."""
    parser = Parser(
        prog="train.py",
        usage="python train.py [flags]",
        description=DESCRIPTION,
        epilog=presets_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {title: parser.add_argument_group(title) for title in (ANSWERS, RECIPE, DATA, "run", TECHNIQUES)}
    flag = groups[ANSWERS].add_argument
    flag("--yes", action="store_true", help="ask nothing, take the defaults")
    flag("--lr-finder", action=argparse.BooleanOptionalAction, help="run the LR finder (default: asked; y)")
    groups[RECIPE].add_argument("--recipe", choices=tuple(PRESETS), help="a preset: flags listed at the end")
    add_recipe_flags(groups)
    add_data_dir(groups[DATA])
    groups[DATA].add_argument(
        "--workers",
        type=whole_number(0, 256),
        metavar="N",
        help="processes that prepare batches; 0: the main one (default: from the number of cores)",
    )
    flag = groups["run"].add_argument
    flag("--output-dir", type=Path, metavar="DIR", help="folder of the run's files (default: output)")
    flag("--name", type=plain_name, metavar="NAME", help=f"prefix of file names (default: {DEFAULT_NAME})")
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
        help="auto: bf16 where the processor has it, fp16 on GPUs that lack it (V100, T4, RTX 20), else fp32 "
        "(default: auto; with --resume: as before)",
    )
    flag(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile the network; auto: where the run is long enough to gain (default: auto)",
    )
    flag("--deterministic", action="store_true", help="use deterministic CUDA kernels")
    flag("--sync-bn", action="store_true", help="with torchrun on GPUs: BatchNorm over the whole batch")
    return parser
