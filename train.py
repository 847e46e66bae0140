"""Train ResNet-56, or a relative, on CIFAR-100.

    python train.py                              asks three questions, then trains
    python train.py --yes --epochs 100           asks nothing
    python train.py --resume                     resumes an interrupted run
    torchrun --nproc-per-node=2 train.py --yes   several processes, one run (several machines: README.md)

Plots, history and checkpoints are in output/; `python train.py --help` lists every choice.
"""

import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import core  # noqa: F401 (before torch: it sets up torch's threads)

# isort: split
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from cifar.dataset import DatasetUnavailable, ImageData, Split, balanced_subset, load_dataset, train_val_split
from core import distributed
from core.cli import (
    LOG,
    Interrupts,
    as_answer,
    ask,
    ask_yes_no,
    is_interactive,
    number,
    progress_bar,
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
    fastest_precision,
    precision_name,
    set_up_torch,
    versions,
)
from inspection.curves import plot_history, plot_lr_finder
from model import build_model, count_parameters
from training.checkpoint import load_model
from training.engine import Metrics, TrainStep, evaluate, train_one_epoch
from training.history import analyse, duration
from training.presets import apply_preset
from training.recipe import MAX_EPOCHS, Recipe, check_resume_flags, given_flags, recipe_from
from training.run import Interrupted, Run, RunFiles, SavedRun, choose_files, lock_run
from training.settings import DEFAULT_NAME, Settings, build_parser
from training.techniques import bn_update_batches, build_techniques
from training.tensorboard_log import TensorBoard, import_writer
from utils import DEFAULT_LR, find_lr, make_test_batches, make_train_loader, worker_error

REPOSITORY = Path(__file__).resolve().parent
# On a GPU an epoch takes seconds: the curves are then drawn at most this often, and always at the end.
PLOT_EVERY_S = 30.0
# The bar of the whole run, above that of the epoch; for the log, which has no bars, a line every ten epochs.
RUN_BAR_FORMAT = "{desc}:{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
TIME_LINE_EVERY = 10


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, then train; Ctrl-C and SIGTERM save what resuming needs."""
    distributed.enable()
    args = apply_preset(build_parser().parse_args(argv))
    settings, given = Settings.from_args(args), given_flags(args)
    interrupts = Interrupts()
    with interrupts.caught():
        try:
            start_log(None)
            if settings.tensorboard:
                import_writer()  # a missing package must cost nothing
            device, saved = choose_device(settings.device), None
            if settings.resume is not None:
                default = RunFiles(settings.output_dir or Path("output"), settings.name or DEFAULT_NAME)
                distributed.start(device, sync_bn=settings.sync_bn)
                # the others may be on machines that do not have the file
                saved = SavedRun.load(settings.resume, default) if distributed.is_main() else None
                saved = distributed.broadcast_object(saved)
            recipe = choose_recipe(given, saved, device)
            if saved is not None and (results := distributed.broadcast_object(saved.results_if_finished())):
                LOG.info(f"The run is finished, nothing is left to train. Results: {results}")
                LOG.info(f"To train its weights further: {train_further(results)}")
                return 0
            train(recipe, settings, device, saved, interrupts)
            return 0
        except Interrupted:
            return interrupts.exit_code
        except RuntimeError as error:  # when a worker dies, torch raises it wherever the main process is
            if (known := worker_error(error)) is None:
                raise
            raise known from None
        except KeyboardInterrupt:
            print("\nInterrupted; there was nothing to save.", file=sys.stderr)
            return interrupts.exit_code


def train(
    recipe: Recipe, settings: Settings, device: torch.device, saved: SavedRun | None, interrupts: Interrupts
) -> None:
    """The whole run, in reading order: data, network, questions, epochs, results.

    Args:
        saved: the state to resume from; None for a new run.
    """
    distributed.start(device, sync_bn=settings.sync_bn)
    folder = settings.output_dir or (saved.path.parent if saved else Path("output"))
    RunFiles(folder, settings.name or DEFAULT_NAME).prepare()
    set_up_torch(recipe.seed, device, deterministic=settings.deterministic)

    data, recipe = load_data(recipe, settings)
    train_split, test_split, val_split = make_splits(data, recipe)
    files = choose_files(recipe, settings, folder, saved)
    with lock_run(files, resumed=saved is not None):
        start_log(files.path("_log.txt"))
        model = build_model(recipe.model, num_classes=len(data.classes), **recipe.network_options)
        model = model.to(device, memory_format=torch.channels_last)
        files.check_space(sum(value.nbytes for value in model.state_dict().values()))
        log_header(recipe, model, device, files, images=(len(train_split), len(test_split)))
        # early: a missing file must cost nothing
        teachers = load_teachers(recipe, data, device, files)
        if recipe.init_from is not None and saved is None:
            initial = load_model(here_or_in_repository(recipe.init_from), model_name=recipe.model)
            model.load_state_dict(initial.model.state_dict())
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
        if saved is None:
            recipe = ask_questions(recipe, settings, model, train_loader, files)
        test_batches = make_test_batches(rank_shard(test_split), recipe.test_batch_size, device)
        val_batches = test_batches
        if val_split is not None:
            val_batches = make_test_batches(rank_shard(val_split), recipe.test_batch_size, device)

        optimizer = recipe.build_optimizer(model)
        step = TrainStep(
            model,
            recipe.build_criterion(),
            optimizer,
            recipe.build_scheduler(optimizer, len(train_loader)),
            precision=recipe.precision,
            compile_batch_size=choose_compile_size(recipe, settings, train_loader, device, saved),
            sync_bn=settings.sync_bn,
            techniques=build_techniques(
                recipe,
                model,
                classes=len(data.classes),
                batches_per_epoch=len(train_loader),
                teachers=teachers,
                bn_batches=bn_update_batches(train_split, recipe, device),
            ),
        )
        run = Run(
            files,
            recipe,
            step,
            batches_per_epoch=len(train_loader),
            interrupts=interrupts,
            resume_command=settings.resume_command(files.last),
            checkpoint_every_s=60 * settings.checkpoint_every,
            extra={
                "compile": step.compile_batch_size is not None,
                "commit": code_version(),
                "classes": list(data.classes),
                "superclasses": list(data.superclasses),
                "superclass_of": data.superclass_of.tolist(),
            },
        )
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
    done = run.epoch - 1 + run.batches_done / run.batches_per_epoch
    with progress_bar(total=recipe.epochs, initial=done, bar_format=RUN_BAR_FORMAT) as bar:

        def after_train_batch(number: int) -> None:
            bar.n = run.epoch - 1 + number / run.batches_per_epoch  # exact: a sum may pass the total
            bar.update(0)
            run.after_train_batch(number)

        for epoch in run.remaining_epochs():
            train_loader.batch_sampler.set_epoch(epoch, start_batch=run.batches_done)
            title = f"epoch {epoch}/{recipe.epochs}"
            bar.set_description_str(title)
            train_metrics = train_one_epoch(
                run.step, train_loader, run.totals, title=title, after_batch=after_train_batch
            )
            val_metrics = test(run, run.model, val_batches, f"test of {title}")
            average_metrics = None
            if run.averaging is not None:
                run.averaging.refresh()
                average_metrics = test(run, run.averaging.network, val_batches, "test of averaged weights")
            run.finish_epoch(train_metrics, val_metrics, average_metrics)
            bar.set_postfix_str(f"best {run.best['accuracy_percent']:.2f}%")
            if epoch % TIME_LINE_EVERY == 0 and epoch < recipe.epochs:
                left = run.elapsed_s / epoch * (recipe.epochs - epoch)
                LOG.info(f"Time: {duration(run.elapsed_s)} so far, about {duration(left)} left")
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
    LOG.info(next_steps(run.files))


def next_steps(files: RunFiles) -> str:
    """Where the plots are, and the commands that use what the run left."""
    return f"""
Plots:    {files.path("_training_plots.png")}
Results:  {files.results}
Evaluate: {python_command("evaluate.py", "--weights", files.best)}
Classify: {python_command("predict.py", "--weights", files.best, "photo.jpg")}
Export:   {python_command("export.py", "--weights", files.best)}
Go on:    {train_further(files.best)}"""


def train_further(weights: Path) -> str:
    """The command that trains the weights of a finished run further, by a new schedule."""
    return python_command("train.py", "--init-from", weights)


def python_command(*words: object) -> str:
    """A command as it is typed."""
    return shell_command(["python", *map(str, words)])


# ---- before training: recipe, data, files ----


def choose_recipe(given: dict[str, Any], saved: SavedRun | None, device: torch.device) -> Recipe:
    """The recipe of the flags, or that of the saved run; the questions may still change a new one.

    Args:
        given: the recipe flags that were given, by field name; their precision may be "auto".

    Raises:
        UsageError: the flags contradict each other or the checkpoint.
    """
    precision = None if given.get("precision") == "auto" else given.get("precision")
    if saved is not None:
        check_resume_flags(given, saved.recipe)
        return replace(saved.recipe, precision=precision or saved.recipe.precision)
    precision = precision or fastest_precision(device)
    recipe = recipe_from({**given, "precision": precision})
    if recipe.batch_size % distributed.world_size():
        raise UsageError(
            f"--batch-size {recipe.batch_size} does not divide by {distributed.world_size()} processes"
        )
    return recipe


def load_data(recipe: Recipe, settings: Settings) -> tuple[ImageData, Recipe]:
    """The images, and the recipe, which is the main process's on every rank.

    The first process of each machine downloads; the others wait for it and read what it wrote. Where the main
    process finds CIFAR-100 unavailable, a person at its terminal is offered the synthetic set.

    Raises:
        DatasetUnavailable: CIFAR-100 is unavailable on this machine and nobody accepted the offer.
        RunError: the files here are damaged, another machine has no data, or the offer was refused.
    """
    data, failure = None, None
    if distributed.local_rank() == 0:
        try:
            data = load_dataset(recipe.dataset, settings.data_dir, url=settings.data_url)
        except RunError as error:
            failure = error
    reason = failure and str(failure).splitlines()[0].rstrip(":")
    reasons = distributed.gather_objects(reason, "the data set")
    may_offer = not settings.yes and settings.resume is None and is_interactive()
    if distributed.broadcast_object(isinstance(failure, DatasetUnavailable) and may_offer):
        if distributed.is_main():
            print(failure)
        if not ask_yes_no("Train on the built-in synthetic images instead? (y/n, default: y): "):
            raise RunError("no data to train on")
        data, recipe = None, replace(recipe, dataset="synthetic")
    elif failure is not None:
        raise failure
    elif any(reasons):
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        raise RunError(f"the machine of rank {rank} has no data: {reason}")
    recipe = distributed.broadcast_object(recipe)  # the default precision depends on the machine
    if data is None:
        data = load_dataset(recipe.dataset, settings.data_dir, url=settings.data_url)
    return data, recipe


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


# ---- the questions ----


def ask_questions(
    recipe: Recipe, settings: Settings, model: nn.Module, train_loader: DataLoader, files: RunFiles
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
        suggested = run_lr_finder(recipe, model, train_loader, files)
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
        epochs = ask(
            f"Select number of epochs for training (default {Recipe.epochs}): ",
            Recipe.epochs,
            as_answer(whole_number(recipe.min_epochs, MAX_EPOCHS), "The number of epochs"),
            shown=str(Recipe.epochs),
        )
    return replace(recipe, lr=lr, epochs=epochs)


def run_lr_finder(recipe: Recipe, model: nn.Module, train_loader: DataLoader, files: RunFiles) -> float:
    """Run the LR finder on the main process, on whole batches, and plot it; returns the suggested rate."""
    found = None
    if distributed.is_main():
        LOG.info("LR finder: 200 batches at rising learning rates, on a copy of the network")
        found = find_lr(
            model, recipe.build_criterion(), recipe.build_optimizer, train_loader, precision=recipe.precision
        )
        LOG.info(found.summary)
        # with several processes, or SAM's two passes, the run's steps cost something else than the finder's
        if distributed.world_size() == 1 and recipe.sam == "none":
            epoch_s = found.seconds_per_image * len(train_loader.dataset)
            LOG.info(
                f"An epoch takes about {duration(epoch_s)} here, and the default of {Recipe.epochs} about "
                f"{duration(Recipe.epochs * epoch_s)}"
            )
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


def load_teachers(recipe: Recipe, data: ImageData, device: torch.device, files: RunFiles) -> list[nn.Module]:
    """The networks that --teacher names; none without it.

    Raises:
        RunError: one cannot be loaded, or was trained on other classes.
        UsageError: the run itself, which writes `files`, would replace one.
    """
    teachers = []
    for path in recipe.teacher or ():
        if Path(path).resolve() in [written.resolve() for written in files.checkpoints]:
            raise UsageError(f"--teacher {path} would be replaced by this run: pass another --name")
        teacher = load_model(here_or_in_repository(path), device)
        if teacher.classes != tuple(data.classes):
            raise RunError(f"--teacher {path} was trained on other classes than {data.name} has")
        teachers.append(teacher.model)
    return teachers


def here_or_in_repository(path: str) -> Path:
    """`path`, relative to the current folder or else, for weights/, to the repository."""
    here, included = Path(path), REPOSITORY / path
    return included if included.exists() and not here.exists() else here


def choose_compile_size(
    recipe: Recipe, settings: Settings, train_loader: DataLoader, device: torch.device, saved: SavedRun | None
) -> int | None:
    """The size of the batches to run through torch.compile, that of a full one; None to train eagerly."""
    stored = None
    if saved is not None and saved.recipe.precision == recipe.precision:
        stored = saved.state.get("compile")
    images = len(train_loader) * recipe.batch_size * recipe.epochs
    use_compile, why = choose_compile(settings.compile, device, recipe.precision, images, stored)
    LOG.info(f"torch.compile: {'on' if use_compile else 'off'} ({why})")
    return train_loader.batch_sampler.global_size(0) if use_compile else None


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


def log_header(
    recipe: Recipe, model: nn.Module, device: torch.device, files: RunFiles, *, images: tuple[int, int]
) -> None:
    """Log what is trained; to trace it by, the log file also gets the command and the versions.

    Args:
        images: the numbers of training and test images.
    """
    cpu = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    LOG.info(f"Device:   {device_name(device)}, {precision_name(recipe.precision, device)}{cpu}")
    LOG.info(f"Network:  {recipe.model}, {count_parameters(model):,} parameters")
    LOG.info(f"Data:     {recipe.data_note}")
    LOG.info(f"          {images[0]:,} training, {images[1]:,} test images")
    LOG.info(f"Recipe:   SGD, batch {recipe.batch_size}, weight decay {recipe.weight_decay:g}")
    LOG.info(f"          {recipe.scheduler}, {recipe.augment} augmentation, seed {recipe.seed}")
    for note in recipe.non_default_notes:
        LOG.info(f"          {note}")
    LOG.info(f"Output:   {files.path('_*')}")
    LOG.debug(f"Command: {shell_command(['python', *sys.argv])}")
    found = {
        "code": code_version(),
        **versions(),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set"),
    }
    LOG.debug("Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()))


if __name__ == "__main__":
    sys.exit(run_main(main, "train.py"))
