"""The flags of what goes beyond the reference's recipe; each is off unless it is given."""

import argparse

from core.cli import number, whole_number
from training.recipe_checks import LARGEST_IMAGE, MIXES, SAMS, SMALLEST_IMAGE


def add_improvement_flags(parser: argparse.ArgumentParser) -> None:
    """Add the groups; as everywhere, a flag that is not given is None."""
    _add_training_flags(parser)
    _add_mixing_flags(parser)
    _add_weights_flags(parser)
    _add_network_flags(parser)


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beyond the reference: training")
    group.add_argument(
        "--warmup-epochs",
        type=whole_number(0),
        metavar="N",
        help="with --scheduler cosine: epochs of linear rise at the beginning (default: 0)",
    )
    group.add_argument(
        "--label-smoothing",
        type=number(0, 0.9),
        metavar="E",
        help="share of each target that goes to all classes; the train loss counts it (default: 0)",
    )
    group.add_argument(
        "--decay-bn",
        action=argparse.BooleanOptionalAction,
        help="weight decay of BatchNorm and biases too (default: yes)",
    )
    group.add_argument(
        "--clip-norm",
        type=number(0, 1e6),
        metavar="NORM",
        help="scale gradients of a larger norm down to this one; 0: never (default: 0)",
    )
    group.add_argument(
        "--accumulate",
        type=whole_number(1),
        metavar="N",
        help="compute each batch in N pieces, for less memory; BatchNorm sees the pieces (default: 1)",
    )


def _add_mixing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beyond the reference: batches")
    group.add_argument(
        "--mix",
        choices=MIXES,
        help="mix pairs of images: MixUp, CutMix, or one of them by chance for each batch; train accuracy "
        "then counts, for a mixed image, the share of it that is of the predicted class (default: none)",
    )
    group.add_argument(
        "--mix-probability",
        type=number(0, 1),
        metavar="P",
        help="probability of a batch to be mixed (default: 1)",
    )
    group.add_argument(
        "--mixup-alpha",
        type=number(1e-3, 100),
        metavar="A",
        help="MixUp's shares are Beta(A, A) (default: 0.2, mild, for small networks)",
    )
    group.add_argument(
        "--cutmix-alpha",
        type=number(1e-3, 100),
        metavar="A",
        help="CutMix's areas are Beta(A, A) (default: 1)",
    )
    group.add_argument(
        "--image-sizes",
        type=whole_number(SMALLEST_IMAGE, LARGEST_IMAGE),
        nargs="+",
        metavar="SIDE",
        help="train on images of these sides, each for an equal part of the epochs: 24 28 32 "
        "(default: 32 throughout); testing is at 32",
    )


def _add_weights_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beyond the reference: weights")
    group.add_argument(
        "--ema-decay",
        type=number(0, 0.999999),
        metavar="D",
        help="keep a moving average of the weights and test it too; 0.999 looks back over 1,000 batches, "
        "at first over fewer; 0: none (default: 0)",
    )
    group.add_argument(
        "--swa-start",
        type=whole_number(1),
        metavar="EPOCH",
        help="average the weights at the ends of the epochs from this one, all equally (default: never)",
    )
    group.add_argument(
        "--sam",
        choices=SAMS,
        help="sharpness-aware minimisation, or its adaptive form: twice the work a step (default: none)",
    )
    group.add_argument(
        "--sam-rho",
        type=number(1e-6, 100),
        metavar="RHO",
        help="how far SAM looks (default: sam 0.1, asam 1: the papers' for CIFAR-100)",
    )
    group.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        help="learn from this trained network's answers too (knowledge distillation)",
    )
    group.add_argument(
        "--distill-alpha",
        type=number(0, 1),
        metavar="A",
        help="share of the teacher in the loss, the labels have the rest (default: 0.9)",
    )
    group.add_argument(
        "--distill-temperature",
        type=number(0.1, 100),
        metavar="T",
        help="softens teacher and student alike (default: 4)",
    )


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beyond the reference: network")
    group.add_argument(
        "--zero-init-residual",
        action=argparse.BooleanOptionalAction,
        help="let each block start as its shortcut alone (default: no)",
    )
    group.add_argument(
        "--drop-path",
        type=number(0, 0.99),
        metavar="RATE",
        help="stochastic depth: how often the last block is skipped, earlier ones less (default: 0)",
    )
    group.add_argument(
        "--dropout",
        type=number(0, 0.99),
        metavar="RATE",
        help="within the blocks of the wide networks (default: 0)",
    )
