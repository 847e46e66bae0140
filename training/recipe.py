"""What a run trains and how: every choice that changes its result, checked when the recipe is made."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from cifar.dataset import DATASETS
from core.errors import UsageError
from model import MODELS, model_options
from training.recipe_checks import check_improvements, in_range, one_of, shown
from training.schedules import cosine_with_warmup

SCHEDULERS = ("multistep", "onecycle", "cosine")
PRECISIONS = ("fp32", "bf16")
# The reference drops the rate after epochs 40, 70 and 85 of 100; other lengths keep the fractions.
MILESTONE_FRACTIONS = (0.40, 0.70, 0.85)
MAX_EPOCHS = 100_000
TUPLES = ("milestones", "image_sizes")  # the fields that hold several numbers


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result; the defaults are the reference's recipe.

    A recipe is stored in each checkpoint, so that resuming and evaluating need no flags.

    Raises:
        UsageError: a value is out of its range, or two values contradict each other.
    """

    model: str = "resnet56"
    dataset: str = "cifar100"
    limit_train: int | None = None  # a class-balanced subset of this many training images
    limit_test: int | None = None  # likewise for the test images
    val_split: int = 0  # training images held out to choose the best epoch on
    epochs: int = 20
    batch_size: int = 128  # images an optimizer step, over all processes
    test_batch_size: int = 5000
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    scheduler: str = "multistep"
    milestones: tuple[int, ...] | None = None  # None: MILESTONE_FRACTIONS of the epochs
    gamma: float = 0.2
    max_lr: float | None = None  # the peak of onecycle; None: lr
    augment: str = "reference"
    seed: int = 0
    precision: str = "fp32"
    target_accuracy: float = 70.0  # percent
    # beyond the reference: each is off by default
    warmup_epochs: int = 0  # linear rise before cosine's fall
    decay_bn: bool = True  # weight decay of BatchNorm and biases too, as in the reference
    label_smoothing: float = 0.0
    clip_norm: float = 0.0  # largest norm of the whole gradient; 0: no clipping
    accumulate: int = 1  # the pieces that a batch is computed in, one after another
    image_sizes: tuple[int, ...] | None = None  # side in pixels, for equal parts of the epochs
    mix: str = "none"
    mix_probability: float = 1.0  # of a batch to be mixed
    mixup_alpha: float = 0.2
    cutmix_alpha: float = 1.0
    ema_decay: float = 0.0  # of the moving average of weights, a batch; 0: none is kept
    swa_start: int | None = None  # the first epoch whose weights are averaged, all equally
    sam: str = "none"
    sam_rho: float | None = None  # radius of the neighbourhood; None: SAM_RHO's
    teacher: str | None = None  # path of a checkpoint
    distill_alpha: float = 0.9  # the teacher's share of the loss
    distill_temperature: float = 4.0
    zero_init_residual: bool = False
    drop_path: float = 0.0  # rate of the last block; earlier ones drop less
    dropout: float = 0.0  # wide networks only

    def __post_init__(self) -> None:
        self._check_types()
        one_of("--model", self.model, sorted(MODELS))
        one_of("--dataset", self.dataset, DATASETS)
        one_of("--scheduler", self.scheduler, SCHEDULERS)
        one_of("--precision", self.precision, PRECISIONS)
        in_range("--epochs", self.epochs, 1, MAX_EPOCHS)
        in_range("--lr", self.lr, 1e-8, 100)
        in_range("--momentum", self.momentum, 0, 0.9999)
        in_range("--weight-decay", self.weight_decay, 0, 1)
        in_range("--gamma", self.gamma, 1e-6, 1)
        in_range("--seed", self.seed, 0, 2**32 - 1)
        in_range("--target-accuracy", self.target_accuracy, 0, 100)
        if self.max_lr is not None:
            in_range("--max-lr", self.max_lr, 1e-8, 100)
            if self.scheduler != "onecycle":
                raise UsageError("--max-lr goes with --scheduler onecycle only")
        self._check_sizes()
        self._check_milestones()
        check_improvements(self)

    def _check_types(self) -> None:
        """Refuse values of another type than their field's, as a foreign checkpoint may hold."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in TUPLES:
                items = () if value is None else value
                right = isinstance(items, tuple) and all(type(item) is int for item in items)
            else:
                kinds = get_args(field.type) or (field.type,)  # type(), not isinstance: True is no number
                right = type(value) in kinds or (float in kinds and type(value) is int)
            if not right:
                flag = f"--{field.name.replace('_', '-')}"
                raise UsageError(f"{flag} cannot be of type {type(value).__name__} (or of such items)")

    def _check_sizes(self) -> None:
        train, test = DATASETS[self.dataset]
        most = max(sizes[1] for sizes in DATASETS.values())
        if self.limit_train is not None:
            in_range("--limit-train", self.limit_train, 1, train)
            train = self.limit_train
        if self.limit_test is not None:
            in_range("--limit-test", self.limit_test, 1, test)
        in_range("--val-split", self.val_split, 0, train - 1)
        train -= self.val_split
        if self.batch_size > train:
            raise UsageError(
                f"--batch-size {shown(self.batch_size)} is more than the {train:,} images to train on: "
                "pass a smaller one"
            )
        in_range("--batch-size", self.batch_size, 1, train)
        # larger than the test set is no error: it is one batch then, as with the default on few images
        in_range("--test-batch-size", self.test_batch_size, 1, most)

    def _check_milestones(self) -> None:
        if self.milestones is None:
            return
        if self.scheduler != "multistep":
            raise UsageError("--milestones goes with --scheduler multistep only")
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not rising or any(not 1 <= m < self.epochs for m in self.milestones):
            raise UsageError(
                "--milestones takes rising epoch numbers from 1 to epochs - 1 "
                f"(here {self.epochs - 1}), not {' '.join(map(shown, self.milestones))}"
            )

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
    def uses_averaging(self) -> bool:
        """Whether an average of the weights is kept beside them."""
        return self.ema_decay > 0 or self.swa_start is not None

    @property
    def selection_metric(self) -> str:
        """The figures that the best epoch is chosen by, as the history's columns begin.

        "val" where images are held out, else "test"; "ema_" before it where the weights are averaged, for
        it is the averaged weights then that are kept.
        """
        return ("ema_" if self.uses_averaging else "") + ("val" if self.val_split else "test")

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
    def non_default_note(self) -> str:
        """The choices that differ from the reference's, as ", flag value" each; empty where none do."""
        names = [field.name for field in dataclasses.fields(self)]
        names = names[names.index("warmup_epochs") :]
        changed = [name for name in names if getattr(self, name) != getattr(Recipe, name)]
        return "".join(f", {name.replace('_', '-')} {getattr(self, name)}" for name in changed)

    @property
    def network_options(self) -> dict[str, float]:
        """What `build_model` takes beside the name and the number of classes; what is off is left out."""
        return {name: getattr(self, name) for name in model_options(self.model) if getattr(self, name)}

    @property
    def data_note(self) -> str:
        """What must stand beside any figure of this run: the data, and which part of it."""
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
        several = {name: tuple(values[name]) for name in TUPLES if isinstance(values.get(name), list)}
        return cls(**{**values, **several})

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
            # fused: one kernel for all tensors; torch has it for these two kinds of device
            fused=device.type in ("cpu", "cuda"),
        )

    def build_scheduler(self, optimizer: Optimizer, batches_per_epoch: int) -> LRScheduler:
        """The learning-rate schedule, stepped once a batch whatever its kind.

        MultiStepLR's milestones are given in batches, so epochs 1 to 40 of 100 train at lr, 41 to 70 at
        lr x gamma, and so on; OneCycleLR (Smith & Topin 2017, arXiv:1708.07120) rises for 30 % of the
        batches and anneals along a cosine; cosine falls along one after its warm-up.
        """
        if self.scheduler == "cosine":
            warmup, total = self.warmup_epochs * batches_per_epoch, self.epochs * batches_per_epoch
            return cosine_with_warmup(optimizer, warmup, total)
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
