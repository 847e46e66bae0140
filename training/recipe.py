"""What a run trains and how: every choice that changes its result, described once.

A field of Recipe carries its default, type, range or choices, and help; its flag, the check of its value and
its line in --help come from there. To add a technique, add a field here and use it in the training step.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from cifar.augment import AUGMENTATIONS, train_transform
from cifar.dataset import DATASETS
from core.cli import PRECISIONS, number, whole_number
from core.errors import UsageError, printable
from model import MODELS, model_options

# The reference drops the rate after epochs 40, 70 and 85 of 100; other lengths keep the fractions.
MILESTONE_FRACTIONS = (0.40, 0.70, 0.85)
MAX_EPOCHS = 100_000
MAX_TRAIN, MAX_TEST = (max(sizes) for sizes in zip(*DATASETS.values(), strict=True))
# The groups of flags, as --help titles them.
ANSWERS, DATA, RECIPE = "answers to the questions", "data", "recipe"
TECHNIQUES = "optional training techniques (off by default)"


def option(
    default: Any,
    help: str | None = None,
    *,
    group: str = RECIPE,
    limits: tuple[float, float] | None = None,
    choices: Collection[str] | None = None,
    metavar: str | None = None,
    parse: Callable[[str], str] | None = None,
) -> Any:
    """A field of Recipe with the description of its flag.

    Args:
        default: its value where the flag is not given; --help shows it unless `help` does.
        help: what the flag does; None: a script defines the flag itself.
        limits: the smallest and the largest number, of each item where the field holds several.
        choices: the accepted words.
        parse: an argparse type that checks the text of the flag.
    """
    metadata = {"help": help, "group": group, "limits": limits, "choices": choices, "metavar": metavar}
    return dataclasses.field(default=default, metadata={**metadata, "parse": parse})


# the options of two other groups
data, technique = functools.partial(option, group=DATA), functools.partial(option, group=TECHNIQUES)


def augmentation(text: str) -> str:
    """A flag type: the name of an augmentation, with its numbers where it takes some."""
    try:
        train_transform(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(printable(str(error), 200)) from None
    return text


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result; the defaults are the reference's recipe.

    A recipe is stored in each checkpoint, so that resuming and evaluating need no flags.

    Raises:
        UsageError: a value is of a wrong type or out of range, or two values contradict each other.
    """

    model: str = option("resnet56", f"network: {', '.join(sorted(MODELS))}", choices=MODELS, metavar="NAME")
    dataset: str = data("cifar100", "cifar100, or synthetic images for machines without it", choices=DATASETS)
    limit_train: int | None = data(
        None, "train on a class-balanced subset of N images", limits=(1, MAX_TRAIN)
    )
    limit_test: int | None = data(None, "test on a class-balanced subset of N images", limits=(1, MAX_TEST))
    val_split: int = data(
        0, "choose the best epoch on N held-out training images; test at the end", limits=(0, MAX_TRAIN - 1)
    )
    epochs: int = option(20, "epochs to train (default: asked; 20)", group=ANSWERS, limits=(1, MAX_EPOCHS))
    batch_size: int = option(128, "images per optimizer step, over all processes", limits=(1, MAX_TRAIN))
    test_batch_size: int = option(5000, "images per test step", limits=(1, MAX_TEST))
    lr: float = option(
        0.1, "learning rate (default: the LR finder's, or 0.1)", group=ANSWERS, limits=(1e-8, 100)
    )
    momentum: float = option(0.9, "SGD momentum (Nesterov)", limits=(0, 0.9999))
    weight_decay: float = option(5e-4, "L2 penalty", limits=(0, 1))
    scheduler: str = option(
        "multistep",
        "learning-rate schedule: drops at milestones, one cycle, or a cosine",
        choices=("multistep", "onecycle", "cosine"),
    )
    milestones: tuple[int, ...] | None = option(
        None,
        "epochs after which multistep drops the rate (default: 40, 70, 85 % of the epochs)",
        limits=(1, MAX_EPOCHS),
        metavar="EPOCH",
    )
    gamma: float = option(0.2, "factor of each drop", limits=(1e-6, 1))
    max_lr: float | None = option(None, "peak of onecycle (default: the learning rate)", limits=(1e-8, 100))
    augment: str = option(
        "reference",
        f"Albumentations pipeline (default: reference): {', '.join(sorted(AUGMENTATIONS))}; "
        "randaugment:N,M for N operations of strength M of 30 (default of the two: 2,14)",
        metavar="NAME",
        parse=augmentation,
    )
    seed: int = option(0, "random seed", limits=(0, 2**32 - 1))
    precision: str = option("fp32", choices=PRECISIONS)  # its flag takes "auto" too
    target_accuracy: float = option(
        70.0, "mark the first epoch that reaches this percentage", limits=(0, 100)
    )
    warmup_epochs: int = technique(
        0, "epochs of linear warm-up for --scheduler cosine", limits=(0, MAX_EPOCHS)
    )
    decay_bn: bool = technique(True, "apply weight decay to BatchNorm and biases too")
    label_smoothing: float = technique(
        0.0, "fraction of each target spread over all classes; the training loss includes it", limits=(0, 0.9)
    )
    clip_norm: float = technique(0.0, "clip the gradient norm to this value; 0: never", limits=(0, 1_000_000))
    accumulate: int = technique(
        1, "N micro-batches per batch, to save memory; BatchNorm sees each alone", limits=(1, MAX_TRAIN)
    )
    # the networks accept sides from 16 to 64; more than the data's 32 would only add work
    image_sizes: tuple[int, ...] | None = technique(
        None,
        "train on images of these sides, each for an equal part of the epochs: 24 28 32 "
        "(default: 32 throughout); testing is at 32",
        limits=(16, 32),
        metavar="SIDE",
    )
    mix: str = technique(
        "none",
        "mix pairs of images: MixUp, CutMix, or one of them at random for each batch; a mixed image counts "
        "in the training accuracy by the fraction of it that is of the predicted class",
        choices=("none", "mixup", "cutmix", "both"),
    )
    mix_probability: float = technique(1.0, "probability that a batch is mixed", limits=(0, 1))
    mixup_alpha: float = technique(0.2, "MixUp's weights are drawn from Beta(X, X)", limits=(1e-3, 100))
    cutmix_alpha: float = technique(1.0, "CutMix's areas are drawn from Beta(X, X)", limits=(1e-3, 100))
    ema_decay: float = technique(
        0.0,
        "also keep and test a moving average of the weights; 0.999 spans about 1,000 batches; 0: none",
        limits=(0, 0.999999),
    )
    swa_start: int | None = technique(
        None, "average the weights of epochs N and later, equally (default: never)", limits=(1, MAX_EPOCHS)
    )
    sam: str = technique(
        "none",
        "sharpness-aware minimization, or its adaptive form: twice the work per step",
        choices=("none", "sam", "asam"),
    )
    sam_rho: float | None = technique(
        None, "SAM neighborhood radius (default: the papers', sam 0.1, asam 1)", limits=(1e-6, 100)
    )
    sam_start: int | None = technique(
        None, "SAM from epoch N on, and plain SGD before it (default: from the first)", limits=(1, MAX_EPOCHS)
    )
    init_from: str | None = technique(
        None,
        "start from the weights in this checkpoint of the same network, with a new optimizer and schedule",
        metavar="CHECKPOINT",
    )
    teacher: tuple[str, ...] | None = technique(
        None,
        "also learn the outputs of this network (knowledge distillation), or the mean of several",
        metavar="CHECKPOINT",
    )
    distill_alpha: float = technique(0.9, "the labels' loss counts 1 - X, and the teacher's X", limits=(0, 1))
    distill_weight: float | None = technique(
        None, "the teacher's loss counts X instead (default: --distill-alpha)", limits=(0, 1000)
    )
    distill_temperature: float = technique(4.0, "softens teacher and student alike", limits=(0.1, 100))
    distill_standardize: bool = technique(
        False, "standardize each image's logits first; published with temperature 2, alpha 0.9 and weight 9"
    )
    zero_init_residual: bool = technique(False, "initialize each residual block to its shortcut alone")
    drop_path: float = technique(
        0.0, "stochastic depth: how often the last block is skipped; earlier ones less", limits=(0, 0.99)
    )
    dropout: float = technique(0.0, "dropout within the blocks of the wide networks", limits=(0, 0.99))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        train, test = DATASETS[self.dataset]
        used = train if self.limit_train is None else self.limit_train
        for name, most, reason in (
            ("limit_train", train, f"the training images of {self.dataset}"),
            ("limit_test", test, f"the test images of {self.dataset}"),
            ("val_split", used - 1, "all training images but one"),
            ("warmup_epochs", self.epochs - 1, "all epochs but one"),
            ("accumulate", self.batch_size, "the batch size"),
            ("swa_start", self.epochs, "the epochs"),
            ("sam_start", self.epochs, "the epochs"),
        ):
            value = getattr(self, name) or 0
            if value > most:
                raise UsageError(f"{flag_of(name)} takes at most {most:,} here ({reason}), not {value:,}")
        images, batch = used - self.val_split, self.batch_size
        scheduler, milestones, sizes = self.scheduler, self.milestones, self.image_sizes
        rising = [*(milestones or ()), self.epochs]
        wide = "dropout" in model_options(self.model)
        for holds, message in (
            (batch <= images, f"--batch-size {batch} exceeds the {images:,} images to train on: lower it"),
            (self.max_lr is None or scheduler == "onecycle", "--max-lr needs --scheduler onecycle"),
            (not self.warmup_epochs or scheduler == "cosine", "--warmup-epochs needs --scheduler cosine"),
            (milestones is None or scheduler == "multistep", "--milestones needs --scheduler multistep"),
            (
                sorted(set(rising)) == rising,
                f"--milestones takes rising epochs from 1 to {self.epochs - 1}, not {_as_text(milestones)}",
            ),
            (
                sizes is None or 1 <= len(sizes) <= self.epochs,
                "--image-sizes takes at least one size, and at most one per epoch",
            ),
            (not (self.ema_decay and self.swa_start), "pass --swa-start or --ema-decay, not both"),
            (self.sam_rho is None or self.sam != "none", "--sam-rho needs --sam sam or --sam asam"),
            (self.sam_start is None or self.sam != "none", "--sam-start needs --sam sam or --sam asam"),
            (self.init_from != "", "--init-from takes the path of a checkpoint"),
            (self.teacher is None or all(self.teacher or [""]), "--teacher takes paths of checkpoints"),
            (
                self.teacher is not None or not (self.distill_standardize or self.distill_weight),
                "--distill-standardize and --distill-weight need --teacher",
            ),
            (wide or not self.dropout, f"--dropout needs a wide network (wrn_...), not {self.model}"),
        ):
            if not holds:
                raise UsageError(message)

    @property
    def milestone_epochs(self) -> tuple[int, ...]:
        """The epochs after which MultiStepLR drops the rate; empty for other schedules."""
        if self.scheduler != "multistep":
            return ()
        if self.milestones is not None:
            return self.milestones
        scaled = {math.floor(self.epochs * fraction + 0.5) for fraction in MILESTONE_FRACTIONS}
        return tuple(sorted(m for m in scaled if 1 <= m < self.epochs))

    @property
    def min_epochs(self) -> int:
        """The fewest epochs that the other choices leave room for."""
        return max(
            (self.milestones or (0,))[-1] + 1,
            self.warmup_epochs + 1,
            len(self.image_sizes or ()),
            self.swa_start or 1,
            self.sam_start or 1,
        )

    @property
    def uses_averaging(self) -> bool:
        """Whether an average of the weights is kept beside them."""
        return self.ema_decay > 0 or self.swa_start is not None

    @property
    def selection_split(self) -> str:
        """The split that the best epoch is chosen on: "val" where images are held out, else "test"."""
        return "val" if self.val_split else "test"

    @property
    def selection_metric(self) -> str:
        """The beginning of the history's columns that the best epoch is chosen by: "test" or "val".

        "ema_" stands before it where the weights are averaged, since the averaged weights are then kept.
        """
        return ("ema_" if self.uses_averaging else "") + self.selection_split

    @property
    def schedule_note(self) -> str:
        """The schedule of learning rates in a few words."""
        if self.scheduler == "onecycle":
            return f"onecycle with its peak at learning rate {self.max_lr or self.lr:g}"
        if self.scheduler == "cosine":
            warmup = f" after {self.warmup_epochs} epochs of warm-up" if self.warmup_epochs else ""
            return f"cosine from learning rate {self.lr:g}{warmup}"
        drops = ", ".join(map(str, self.milestone_epochs))
        return f"learning rate {self.lr:g}" + (f", x {self.gamma:g} after {drops}" if drops else "")

    @property
    def non_default_notes(self) -> list[str]:
        """The techniques that differ from the reference's, as "flag value" each."""
        techniques = [f for f in dataclasses.fields(self) if f.metadata["group"] == TECHNIQUES]
        changed = {f.name: getattr(self, f.name) for f in techniques if getattr(self, f.name) != f.default}
        return [f"{flag_of(name).removeprefix('--')} {_as_text(value)}" for name, value in changed.items()]

    @property
    def network_options(self) -> dict[str, float]:
        """What `build_model` takes beside the name and the number of classes; what is off is left out."""
        return {name: getattr(self, name) for name in model_options(self.model) if getattr(self, name)}

    @property
    def data_note(self) -> str:
        """The data, and which part of it: shown beside every result of this run."""
        note = "CIFAR-100" if self.dataset == "cifar100" else "synthetic data (not CIFAR-100)"
        if self.limit_train is not None:
            note += f", {self.limit_train:,} training images only"
        if self.limit_test is not None:
            note += f", {self.limit_test:,} test images only"
        if self.val_split:
            note += f", {self.val_split:,} held out for validation"
        return note

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain types, for a checkpoint."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe of a checkpoint; fields that it does not know yet take their defaults.

        Raises:
            UsageError: a field of an unknown name (a newer version's), a value of a wrong type or out of
                range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise UsageError(f"unknown recipe field {unknown[0]!r:.60}: was it made by a newer version?")
        if isinstance(values.get("teacher"), str):  # as in checkpoints from before there could be several
            values = {**values, "teacher": (values["teacher"],)}
        return cls(**{n: tuple(value) if isinstance(value, list) else value for n, value in values.items()})

    def build_criterion(self) -> nn.Module:
        """The training loss: cross-entropy, nats an image averaged over the batch.

        With label smoothing e, each target is (1 - e) of itself and e of the mean over all classes
        (Szegedy et al. 2016, arXiv:1512.00567).
        """
        return nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with Nesterov momentum over all parameters of `model`.

        Without `decay_bn`, vectors (BatchNorm's scales and shifts, biases) are a second group whose weight
        decay is 0 (He et al. 2019, arXiv:1812.01187, section 3.1).
        """
        device = next(model.parameters()).device
        parameters: Any = model.parameters()
        if not self.decay_bn:
            matrices = [value for value in model.parameters() if value.ndim > 1]
            vectors = [value for value in model.parameters() if value.ndim <= 1]
            parameters = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
            # fused: one kernel for all tensors; torch has it for these two kinds of device. In fp16 it would
            # leave momentum uninitialised where the first step is skipped for an overflow (torch 2.14).
            fused=device.type in ("cpu", "cuda") and self.precision != "fp16",
        )

    def build_scheduler(self, optimizer: Optimizer, batches_per_epoch: int) -> LRScheduler:
        """The learning-rate schedule, stepped once a batch whatever its kind.

        MultiStepLR's milestones are given in batches, so epochs 1 to 40 of 100 train at lr, 41 to 70 at
        lr x gamma, and so on; OneCycleLR (Smith & Topin 2017, arXiv:1708.07120) rises for 30 % of the
        batches and anneals along a cosine; cosine falls along one after its warm-up.
        """
        if self.scheduler == "cosine":
            warmup, total = self.warmup_epochs * batches_per_epoch, self.epochs * batches_per_epoch
            return LambdaLR(optimizer, lambda step: _cosine_factor(step, warmup, total))
        if self.scheduler == "onecycle":
            return OneCycleLR(
                optimizer,
                max_lr=self.max_lr or self.lr,
                total_steps=self.epochs * batches_per_epoch,
                anneal_strategy="cos",
                cycle_momentum=False,
            )
        milestones = [epoch * batches_per_epoch for epoch in self.milestone_epochs]
        return MultiStepLR(optimizer, milestones, gamma=self.gamma)


def _cosine_factor(step: int, warmup: int, total: int) -> float:
    """The learning rate of batch `step` (from 0) as a fraction of its peak.

    It rises linearly over the first `warmup` batches, the last of which has the peak, and falls along half a
    cosine over the rest (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts), so that the batch
    after the last one would have 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _value_type(field: dataclasses.Field) -> tuple[type, bool]:
    """The type of a field's value, or of its items, and whether it holds several."""
    kind = next((kind for kind in get_args(field.type) if kind is not NoneType), field.type)
    several = get_origin(kind) is tuple
    return (get_args(kind)[0] if several else kind), several


def _check_field(field: dataclasses.Field, value: Any) -> None:
    """Refuse a value of another type than the field's, as a foreign checkpoint may hold, or out of range."""
    if value is None and NoneType in get_args(field.type):
        return
    flag, choices, limits = flag_of(field.name), field.metadata["choices"], field.metadata["limits"]
    kind, several = _value_type(field)
    types = (int, float) if kind is float else (kind,)
    items = value if type(value) is tuple else (value,)
    wrong = [item for item in items if type(item) not in types]  # not isinstance: True is no number
    if wrong or (type(value) is tuple) != several:
        found = type(wrong[0] if wrong else value).__name__
        raise UsageError(f"{flag} takes {'a list of ' if several else ''}{kind.__name__}, not {found}")
    for item in items:
        if choices is not None and item not in choices:
            raise UsageError(f"{flag} {item!r:.60} is not known; choose from {', '.join(choices)}")
        if limits is not None and not limits[0] <= item <= limits[1]:  # NaN never is
            # Python refuses to write out integers of thousands of digits
            shown = "a huge number" if abs(item) > 1e20 else item
            raise UsageError(f"{flag} takes a value from {limits[0]:,} to {limits[1]:,}, not {shown}")


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def add_recipe_flags(groups: Mapping[str, argparse._ArgumentGroup]) -> None:
    """Add the flag of each field to its group, by title; a flag that is not given is None."""
    for field in dataclasses.fields(Recipe):
        described, (kind, several) = field.metadata, _value_type(field)
        help_text = described["help"]
        if help_text is None:
            continue
        if field.default is not None and "(default" not in help_text:
            default = ("no", "yes")[field.default] if kind is bool else field.default
            help_text += f" (default: {default:g})" if kind in (int, float) else f" (default: {default})"
        options: dict[str, Any] = {"help": help_text.replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            metavar = {int: "N", float: "X"}.get(kind)
            options["metavar"] = described["metavar"] or metavar
            options["choices"], options["type"] = described["choices"], described["parse"]
        if kind in (int, float):
            options["type"] = (whole_number if kind is int else number)(*described["limits"])
        if several:
            options["nargs"] = "+"
        groups[described["group"]].add_argument(flag_of(field.name), **options)


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe flags that were given, by field name."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Recipe)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if value is not None}


def recipe_from(given: dict[str, Any]) -> Recipe:
    """The recipe of the flags given, by field name, with defaults for the rest.

    Raises:
        UsageError: two values contradict each other, or one is out of its range.
    """
    if "lr" in given and "max_lr" in given:
        raise UsageError("--lr and --max-lr both set the peak of onecycle: pass one of them")
    return Recipe(**given)


def check_resume_flags(given: dict[str, Any], recipe: Recipe) -> None:
    """Refuse flags that contradict the recipe of the checkpoint to resume.

    Except --precision: a run may resume on another processor, where bf16 is far faster or far slower.

    Args:
        given: the values of the recipe flags that were given, by field name.

    Raises:
        UsageError: naming the first such flag.
    """
    for name, value in given.items():
        stored = recipe.milestone_epochs if name == "milestones" else getattr(recipe, name)
        if value != stored and name != "precision":
            raise UsageError(
                f"{flag_of(name)} {_as_text(value)} contradicts the checkpoint's {_as_text(stored)}: "
                "leave it out to resume, or start from these weights with --init-from instead of --resume"
            )


def _as_text(value: object) -> str:
    """`value` as it is written after its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
