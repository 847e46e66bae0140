"""Train ResNet-56, or a relative, on CIFAR-100.

    python train.py                              asks three questions, then trains
    python train.py --yes --epochs 100           asks nothing
    python train.py --resume                     resumes an interrupted run
    torchrun --nproc-per-node=2 train.py --yes   several processes, one run

Plots, history and checkpoints are in output/; `python train.py --help` lists every choice.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from cifar.dataset import (
    DatasetUnavailable,
    ImageData,
    Split,
    balanced_subset,
    load_dataset,
    train_val_split,
)
from core import distributed
from core.cli import (
    LOG,
    Interrupts,
    Parser,
    as_answer,
    ask,
    ask_yes_no,
    is_interactive,
    number,
    run_main,
    shell_command,
    start_log,
    whole_number,
)
from core.errors import RunError, UsageError
from core.machine import (
    choose_compile,
    choose_device,
    choose_workers,
    code_version,
    device_name,
    native_bf16,
    precision_name,
    set_up_torch,
    versions,
)
from inspection.curves import plot_history, plot_lr_finder
from model import build_model, count_parameters
from training.checkpoint import load_model
from training.engine import Metrics, TrainStep, evaluate, train_one_epoch
from training.history import analyse
from training.presets import apply_preset, presets_table
from training.recipe import (
    DEFAULT_EPOCHS,
    MAX_EPOCHS,
    Recipe,
    check_resume_flags,
    recipe_from,
)
from training.run import DEFAULT_NAME, Interrupted, Run, RunFiles, SavedRun, lock_run
from training.techniques import bn_update_batches, build_techniques
from training.tensorboard_log import TensorBoard
from utils import DEFAULT_LR, find_lr, make_test_batches, make_train_loader

# On a GPU an epoch takes seconds: the curves are then drawn at most this often, and always at the end.
PLOT_EVERY_S = 5.0
# The flags about this machine that the command for resuming repeats where they are given.
MACHINE_FLAGS = ("data_dir", "data_url", "workers", "tensorboard", "checkpoint_every", "device", "compile")
MACHINE_FLAGS += ("deterministic", "sync_bn")


@dataclass(frozen=True)
class Settings:
    """The choices of one call that are not part of the recipe: this machine, its files, what to ask.

    Attributes:
        repeated_flags: the words of the flags that resuming the run should repeat.
    """

    yes: bool
    lr_finder: bool | None
    lr_given: bool
    epochs_given: bool
    data_dir: Path
    data_url: str | None
    workers: int | None
    output_dir: Path | None
    name: str | None
    overwrite: bool
    resume: str | None
    tensorboard: bool
    checkpoint_every: float  # minutes
    device: str
    compile: str
    deterministic: bool
    sync_bn: bool
    repeated_flags: tuple[str, ...]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Settings":
        """The settings among the parsed flags."""
        known = {field.name for field in fields(cls)}
        defaults, repeated = vars(build_parser().parse_args([])), []
        for name in MACHINE_FLAGS:
            value = getattr(args, name)
            if value != defaults[name]:
                repeated += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return cls(
            **{name: value for name, value in vars(args).items() if name in known},
            lr_given=args.lr is not None or args.max_lr is not None,
            epochs_given=args.epochs is not None,
            repeated_flags=tuple(repeated),
        )

    def resume_command(self, files: RunFiles) -> str:
        """The command that resumes the run of `files`."""
        script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
        processes = distributed.world_size()
        launcher = ["python"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}"]
        return shell_command([*launcher, script, "--resume", str(files.last), *self.repeated_flags])


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, then train; Ctrl-C and SIGTERM save what resuming needs."""
    args = apply_preset(build_parser().parse_args(argv))
    settings = Settings.from_args(args)
    interrupts = Interrupts()
    with interrupts.caught():
        try:
            start_log(None)
            device = choose_device(settings.device)
            default = RunFiles(settings.output_dir or Path("output"), settings.name or DEFAULT_NAME)
            saved = None if settings.resume is None else SavedRun.load(settings.resume, default)
            recipe = choose_recipe(args, saved, device)
            if saved is not None and saved.results_if_finished:
                LOG.info(
                    f"The run is finished, nothing is left to train. Results: {saved.results_if_finished}"
                )
                return 0
            train(recipe, settings, device, saved, interrupts)
        except Interrupted:
            return interrupts.exit_code
        except KeyboardInterrupt:
            print("\nInterrupted; there was nothing to save.", file=sys.stderr)
            return interrupts.exit_code
    return 0


def train(
    recipe: Recipe,
    settings: Settings,
    device: torch.device,
    saved: SavedRun | None,
    interrupts: Interrupts,
) -> None:
    """The whole run, in reading order: data, network, questions, epochs, results.

    Args:
        saved: the state to resume from; None for a new run.
    """
    distributed.start(device)
    folder = settings.output_dir or (saved.path.parent if saved else Path("output"))
    RunFiles(folder, settings.name or DEFAULT_NAME).prepare()
    set_up_torch(recipe.seed, device, deterministic=settings.deterministic)

    data, recipe = load_data(recipe, settings, may_ask=saved is None)
    train_split, test_split, val_split = make_splits(data, recipe)
    files = choose_files(recipe, settings, folder, saved)
    with lock_run(files, resumed=saved is not None):
        start_log(files.path("_log.txt"))
        model = build_model(recipe.model, num_classes=len(data.classes), **recipe.network_options)
        model = model.to(device, memory_format=torch.channels_last)
        files.check_space(sum(value.nbytes for value in model.state_dict().values()))
        log_header(recipe, model, device, images=(len(train_split), len(test_split)))
        teacher = load_teacher(recipe, data, device, files)  # first: a missing one must cost nothing
        if saved is None:
            recipe = ask_questions(recipe, settings, model, train_split, files)

        train_loader = make_train_loader(
            train_split,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            augment=recipe.augment,
            workers=choose_workers(device.type) if settings.workers is None else settings.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=device.type == "cuda",
        )
        test_batches = make_test_batches(rank_shard(test_split), recipe.test_batch_size, device)
        val_batches = test_batches
        if val_split is not None:
            val_batches = make_test_batches(rank_shard(val_split), recipe.test_batch_size, device)

        step = build_step(
            recipe,
            settings,
            model,
            teacher,
            classes=len(data.classes),
            batches_per_epoch=len(train_loader),
            saved=saved,
        )
        run = Run(
            files,
            recipe,
            step,
            batches_per_epoch=len(train_loader),
            interrupts=interrupts,
            resume_command=settings.resume_command(files),
            checkpoint_every_s=60 * settings.checkpoint_every,
            extra={
                "compile": step.compile_model,
                "commit": code_version(),
                "classes": list(data.classes),
                "superclasses": list(data.superclasses),
                "superclass_of": data.superclass_of.tolist(),
            },
        )
        if run.averaging is not None:
            run.averaging.bn_batches = bn_update_batches(train_split, recipe, device)
        run.start(saved)
        train_epochs(run, train_loader, val_batches, start_tensorboard(run, settings, train_loader))
        finish(run, test_batches)


def train_epochs(
    run: Run, train_loader: DataLoader, val_batches: list[tuple], board: TensorBoard | None
) -> None:
    """Train and test, epoch by epoch, from where `run` stands to the recipe's last epoch.

    Args:
        val_batches: this process's batches of the split that the best epoch is chosen on.
        board: writes each epoch to TensorBoard.
    """
    recipe, plotted_at = run.recipe, -math.inf
    for epoch in run.remaining_epochs():
        train_loader.batch_sampler.set_epoch(epoch, start_batch=run.batches_done)
        title = f"epoch {epoch}/{recipe.epochs}"
        train_metrics = train_one_epoch(
            run.step, train_loader, run.totals, title=title, after_batch=run.after_train_batch
        )
        val_metrics = test(run, run.model, val_batches, f"test of {title}")
        average_metrics = None
        if run.averaging is not None:
            run.averaging.refresh()
            average_metrics = test(run, run.averaging.network, val_batches, "test of averaged weights")
        run.finish_epoch(train_metrics, val_metrics, average_metrics)
        if time.monotonic() - plotted_at > PLOT_EVERY_S:
            plot_curves(run)
            plotted_at = time.monotonic()
        if board is not None:
            board.add_epoch(run.history[-1], run.model)


def test(run: Run, model: nn.Module, batches: list[tuple], title: str) -> Metrics:
    """The metrics of `model` over `batches` (of every process), at the run's precision."""
    return evaluate(
        model, batches, precision=run.recipe.precision, title=title, after_batch=run.after_test_batch
    )


def finish(run: Run, test_batches: list[tuple]) -> None:
    """Write the results and log the analysis; with held-out images, the test set is read only now."""
    final_test = {}
    if run.recipe.val_split:
        last = {name: value.clone() for name, value in run.eval_model.state_dict().items()}
        for key, weights in (("best", run.best["model"]), ("last", last)):
            run.model.load_state_dict(weights)
            final_test[key] = test(run, run.model, test_batches, "test")
    plot_curves(run)
    run.finish(final_test)
    for line in analyse(run.history, run.recipe, run.best["epoch"], run.elapsed_s, final_test):
        LOG.info(line)
    LOG.info(f"Results: {run.files.results}")


# ---- before training: recipe, data, files ----


def choose_recipe(args: argparse.Namespace, saved: SavedRun | None, device: torch.device) -> Recipe:
    """The recipe of the flags, or that of the saved run; the questions may still change a new one.

    Raises:
        UsageError: the flags contradict each other or the checkpoint.
    """
    precision = None if args.precision == "auto" else args.precision
    if saved is not None:
        check_resume_flags(args, saved.recipe)
        return replace(saved.recipe, precision=precision or saved.recipe.precision)
    recipe = recipe_from(args, precision or ("bf16" if native_bf16(device) else "fp32"))
    if recipe.batch_size % distributed.world_size():
        raise UsageError(
            f"--batch-size {recipe.batch_size} does not divide by {distributed.world_size()} processes"
        )
    return recipe


def load_data(recipe: Recipe, settings: Settings, *, may_ask: bool) -> tuple[ImageData, Recipe]:
    """The images; where CIFAR-100 is unavailable, a person at a terminal is offered the synthetic set.

    The main process downloads; the others wait for it and read what it wrote.

    Raises:
        DatasetUnavailable: CIFAR-100 is unavailable and nobody accepted the offer.
    """
    dataset, data = recipe.dataset, None
    if distributed.is_main():
        try:
            data = load_dataset(dataset, settings.data_dir, url=settings.data_url)
        except DatasetUnavailable as error:
            if settings.yes or not may_ask or not is_interactive():
                raise
            print(error)
            if not ask_yes_no("Train on the built-in synthetic images instead? (y/n, default: y): "):
                raise RunError("no data to train on") from None
            dataset = "synthetic"
    dataset = distributed.broadcast_object(dataset)
    if data is None:
        data = load_dataset(dataset, settings.data_dir, url=settings.data_url)
    return data, replace(recipe, dataset=dataset)


def make_splits(data: ImageData, recipe: Recipe) -> tuple[Split, Split, Split | None]:
    """The training, test and held-out images that the recipe asks for; None where none are held out."""
    train_split, test_split, val_split = data.train, data.test, None
    if recipe.limit_train:
        train_split = balanced_subset(train_split, recipe.limit_train, recipe.seed)
    if recipe.limit_test:
        test_split = balanced_subset(test_split, recipe.limit_test, recipe.seed)
    if recipe.val_split:
        train_split, val_split = train_val_split(train_split, recipe.val_split, recipe.seed)
    return train_split, test_split, val_split


def rank_shard(split: Split) -> Split:
    """The images that this process tests: every world_size-th image, from its rank on."""
    shard = slice(distributed.rank(), None, distributed.world_size())
    return Split(np.ascontiguousarray(split.images[shard]), split.labels[shard])


def choose_files(recipe: Recipe, settings: Settings, folder: Path, saved: SavedRun | None) -> RunFiles:
    """Where the run writes: an earlier run's files are replaced only by --overwrite or a y at a terminal.

    A resumed run continues its own files, and never those of another run.
    """
    if saved is not None:
        files = RunFiles(folder, settings.name or saved.name)
        own = saved.path.resolve() in (files.last.resolve(), files.previous.resolve())
        if own or settings.overwrite or not distributed.broadcast_object(files.exists):
            return files
        free = distributed.broadcast_object(files.next_free())
        LOG.info(f"{files.last} is not {saved.path} and is kept; this run writes {free.name}.")
        return free
    name = settings.name or DEFAULT_NAME
    if recipe.dataset == "synthetic" and "synthetic" not in name:
        name += "_synthetic"
    files = RunFiles(folder, name)
    if not distributed.broadcast_object(files.exists) or settings.overwrite:
        return files
    free = distributed.broadcast_object(files.next_free())
    if not settings.yes and distributed.broadcast_object(is_interactive()):
        question = f"{folder} holds a run {name}. Overwrite it? (y/n, default: n): "
        if ask_yes_no(question, default=False):
            return files
    LOG.info(f"{name} is kept (--resume resumes it); this run writes {free.name}.")
    return free


# ---- the questions ----


def ask_questions(
    recipe: Recipe, settings: Settings, model: nn.Module, train_split: Split, files: RunFiles
) -> Recipe:
    """The recipe with the answers to the three questions: LR finder? its rate? how many epochs?

    A flag given is a question not asked; with --lr or --max-lr the finder only runs on --lr-finder.
    """
    lr, wanted = recipe.lr, settings.lr_finder
    if wanted is None:
        wanted = not settings.lr_given and (
            settings.yes or ask_yes_no("Do you want to run LR Finder? (y/n, default: y): ")
        )
    if wanted:
        suggested = run_lr_finder(recipe, model, train_split, files)
        if not settings.lr_given:
            question = f"Use suggested LR {suggested:.2e}? (y/n, default: y): "
            if settings.yes or ask_yes_no(question):
                lr = suggested
            else:
                lr = ask(
                    f"Enter learning rate (default {DEFAULT_LR:.2e}): ",
                    DEFAULT_LR,
                    as_answer(number(1e-8, 100), "The learning rate"),
                    shown=f"{DEFAULT_LR:.2e}",
                )
    elif not settings.lr_given:
        LOG.info(f"No LR finder: the learning rate is {lr:.2e}, the default.")
    epochs = recipe.epochs
    if not settings.epochs_given and not settings.yes:
        lowest = recipe.milestones[-1] + 1 if recipe.milestones else 1
        epochs = ask(
            f"Select number of epochs for training (default {DEFAULT_EPOCHS}): ",
            DEFAULT_EPOCHS,
            as_answer(whole_number(lowest, MAX_EPOCHS), "The number of epochs"),
            shown=str(DEFAULT_EPOCHS),
        )
    return replace(recipe, lr=lr, epochs=epochs)


def run_lr_finder(recipe: Recipe, model: nn.Module, train_split: Split, files: RunFiles) -> float:
    """Run the LR finder on the main process, on whole batches, and plot it; returns the suggested rate."""
    found = None
    if distributed.is_main():
        LOG.info("LR finder: 200 batches at rising learning rates, on a copy of the network")
        found = find_lr(
            model,
            recipe.build_criterion(),
            recipe.build_optimizer,
            make_train_loader(
                train_split, batch_size=recipe.batch_size, seed=recipe.seed, augment=recipe.augment
            ),
            precision=recipe.precision,
        )
        LOG.info(found.summary)
        path = plot_lr_finder(
            found.learning_rates,
            found.losses,
            found.suggested_lr,
            files.path("_lr_finder.png"),
            smoothed=found.smoothed,
            title=f"LR finder: {recipe.model} on {recipe.data_note}",
        )
        LOG.info(f"LR finder plot: {path}")
    return distributed.broadcast_object(found.suggested_lr if found else None)


# ---- the parts of a run ----


def load_teacher(recipe: Recipe, data: ImageData, device: torch.device, files: RunFiles) -> nn.Module | None:
    """The network that --teacher names; None without it.

    Raises:
        RunError: it cannot be loaded, or was trained on other classes.
        UsageError: the run itself, which writes `files`, would replace it.
    """
    if recipe.teacher is None:
        return None
    if Path(recipe.teacher).resolve() in [path.resolve() for path in files.checkpoints]:
        raise UsageError(f"--teacher {recipe.teacher} would be replaced by this run: pass another --name")
    teacher = load_model(recipe.teacher, device)
    if teacher.classes != tuple(data.classes):
        raise RunError(f"--teacher {recipe.teacher} was trained on other classes than {data.name} has")
    return teacher.model


def build_step(
    recipe: Recipe,
    settings: Settings,
    model: nn.Module,
    teacher: nn.Module | None,
    *,
    classes: int,
    batches_per_epoch: int,
    saved: SavedRun | None,
) -> TrainStep:
    """The training step of `recipe`: optimizer, schedule, precision, compilation, optional techniques."""
    device = next(model.parameters()).device
    stored_compile = (
        saved.state.get("compile") if saved and saved.recipe.precision == recipe.precision else None
    )
    images = batches_per_epoch * recipe.batch_size * recipe.epochs
    use_compile, why = choose_compile(settings.compile, device, recipe.precision, images, stored_compile)
    LOG.info(f"torch.compile: {'on' if use_compile else 'off'} ({why})")
    optimizer = recipe.build_optimizer(model)
    return TrainStep(
        model,
        recipe.build_criterion(),
        optimizer,
        recipe.build_scheduler(optimizer, batches_per_epoch),
        precision=recipe.precision,
        compile_model=use_compile,
        sync_bn=settings.sync_bn,
        rank_batch_size=recipe.batch_size // distributed.world_size(),
        techniques=build_techniques(
            recipe, model, classes=classes, batches_per_epoch=batches_per_epoch, teacher=teacher
        ),
    )


def start_tensorboard(run: Run, settings: Settings, train_loader: DataLoader) -> TensorBoard | None:
    """The writer for --tensorboard, on the main process."""
    if not settings.tensorboard or not distributed.is_main():
        return None
    board = TensorBoard(run.files.path("_tensorboard"), first_epoch=run.epoch)
    board.show_start(run.model, train_loader, run.epoch)
    return board


def plot_curves(run: Run) -> None:
    """Draw the curves of the epochs so far, on the main process."""
    if run.history and distributed.is_main():
        plot_history(
            run.history,
            run.files.path("_training_plots.png"),
            milestones=run.recipe.milestone_epochs,
            title=f"{run.recipe.model} on {run.recipe.data_note}",
            target_accuracy=run.recipe.target_accuracy,
            best_epoch=run.best["epoch"] or None,
        )


def log_header(recipe: Recipe, model: nn.Module, device: torch.device, *, images: tuple[int, int]) -> None:
    """Log what is trained and, to trace it by, the command and the versions.

    Args:
        images: the numbers of training and test images.
    """
    LOG.info(
        f"Device: {device_name(device)}, {precision_name(recipe.precision, device)} | "
        f"Network: {recipe.model}, {count_parameters(model):,} parameters | Data: {recipe.data_note}, "
        f"{images[0]:,} train / {images[1]:,} test | Recipe: SGD, batch {recipe.batch_size}, "
        f"weight decay {recipe.weight_decay:g}, {recipe.scheduler}, {recipe.augment} augmentation, "
        f"seed {recipe.seed}{recipe.non_default_note}"
    )
    LOG.info(f"Command: {shell_command(['python', *sys.argv])}")
    found = {"code": code_version(), **versions()}
    LOG.info("Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()))


def build_parser() -> Parser:
    """The parser of train.py. A flag that is not given is None: then a question, or the default, decides."""
    parser = Parser(
        prog="train.py",
        description="Train ResNet-56 (or a relative) on CIFAR-100. Without flags, it asks three questions.",
        epilog=f"{presets_table()}\n\nexample: python train.py --yes --epochs 100 --name my_run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main, "train.py"))
