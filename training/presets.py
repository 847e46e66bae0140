"""Presets: recipes by name, written as the flags of train.py that make them."""

import argparse

from core.cli import Parser
from core.errors import UsageError
from training.recipe import ANSWERS, DATA, RECIPE, TECHNIQUES, Recipe, add_recipe_flags, given_flags

# What each preset aims at, with the test accuracy after the last epoch of its run in docs/runs; its flags.
PRESETS = {
    "reference": ("the reference's recipe, which the defaults are: 74.1 % in 100 epochs", ""),
    # 20 epochs leave no time to overfit: augmentation is light, and the rate is high and falls to nothing
    "fast": (
        "as much as 20 epochs can give: 67.6 %, or 71.3 % with the teacher of best",
        """
      --epochs 20 --scheduler onecycle --max-lr 0.2 --augment standard
      --image-sizes 24 32 --no-decay-bn""",
    ),
    # wide layers learn much faster than ResNet-56, and overfit in 20 epochs without mixing
    "teacher": (
        "WideResNet-16-4, to be given to --teacher: 76.8 %; 2.2 times the work of ResNet-56 per step",
        """
      --model wrn_16_4 --epochs 40 --scheduler onecycle --max-lr 0.2
      --augment standard --mix cutmix --mix-probability 0.5
      --image-sizes 24 32 --no-decay-bn""",
    ),
    # a long schedule, a teacher that is better than itself, and SAM once the rate is low, where it gains
    # nearly all that it gains in a whole run
    "best": (
        "ResNet-56 at its best, distilled from the WideResNet in weights/: 75.8 %",
        """
      --epochs 100 --scheduler cosine --lr 0.1 --warmup-epochs 5 --no-decay-bn
      --teacher weights/wrn_16_4_cifar100.pth --distill-standardize
      --distill-temperature 2 --distill-weight 9 --sam sam --sam-start 86""",
    ),
    # 42 times the parameters of ResNet-56, so it needs the strongest regularization
    "wide": (
        "WideResNet-28-10, for a GPU: not measured; about 40 times the work of ResNet-56 per step",
        """
      --model wrn_28_10 --epochs 200 --scheduler cosine --lr 0.1
      --warmup-epochs 5 --augment autoaugment --mix both --mix-probability 1.0
      --mixup-alpha 0.2 --cutmix-alpha 1.0 --ema-decay 0.999""",
    ),
}


def preset_values(name: str) -> dict[str, object]:
    """The fields of Recipe that a preset sets."""
    parser = Parser(add_help=False)
    add_recipe_flags(dict.fromkeys((ANSWERS, DATA, RECIPE, TECHNIQUES), parser))
    return given_flags(parser.parse_args(PRESETS[name][1].split()))


def apply_preset(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with those of --recipe among them, as if they had been given; the flags given win.

    Raises:
        UsageError: --recipe stands beside --resume.
    """
    if args.recipe is None:
        return args
    if args.resume is not None:
        raise UsageError("--recipe is for new runs: leave it out, the checkpoint has its own")
    preset, given = preset_values(args.recipe), given_flags(args)
    merged = {**Recipe().to_dict(), **preset, **given}
    dropped = set(given)  # and the values that the given flags leave without meaning
    if merged["scheduler"] != "cosine" or merged["warmup_epochs"] >= merged["epochs"]:
        dropped.add("warmup_epochs")
    if merged["sam"] == "none":
        dropped.add("sam_start")
    if (merged["sam_start"] or 0) > merged["epochs"]:  # the run ends before SAM would start
        dropped.update(("sam", "sam_start"))
    if "swa_start" in given:
        dropped.add("ema_decay")
    if "max_lr" in given:
        dropped.add("lr")  # both set the peak of onecycle
    if "lr" in given or merged["scheduler"] != "onecycle":
        dropped.add("max_lr")
    if len(merged["image_sizes"] or ()) > merged["epochs"]:
        dropped.add("image_sizes")
    kept = {name: value for name, value in preset.items() if name not in dropped}
    return argparse.Namespace(**{**vars(args), **kept})


def presets_table() -> str:
    """The presets as --help prints them."""
    lines = ["recipes (--recipe NAME; a flag beside it overrides it):"]
    return "\n".join(lines + [f"  {name}: {goal}{flags}" for name, (goal, flags) in PRESETS.items()])
