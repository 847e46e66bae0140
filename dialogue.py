"""What train.py asks a person: which data, which files, the LR finder, its rate, how many epochs."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from cifar.dataset import DatasetUnavailable, ImageData, load_dataset
from core import distributed
from core.cli import LOG, as_answer, ask, ask_yes_no, is_interactive, number, whole_number
from core.errors import RunError
from inspection.curves import plot_lr_finder
from training.flags import DEFAULT_NAME, build_parser, plain_name
from training.recipe import MAX_EPOCHS, Recipe
from training.run_files import RunFiles
from utils import DEFAULT_LR, find_lr

DEFAULT_EPOCHS = 20


def load_data(args: argparse.Namespace, recipe: Recipe) -> tuple[ImageData, Recipe]:
    """The images; where CIFAR-100 cannot be had, a person at a terminal is offered the synthetic set.

    The main process downloads; the others wait for it and read what it laid down.

    Raises:
        DatasetUnavailable: CIFAR-100 cannot be had and nobody accepted the offer.
    """
    choice, data = recipe.dataset, None
    if distributed.is_main():
        try:
            data = load_dataset(choice, args.data_dir, url=args.data_url)
        except DatasetUnavailable as error:
            if args.yes or args.resume is not None or not is_interactive():
                raise
            print(error)
            if not ask_yes_no("Train on the built-in synthetic images instead? (y/n, default: y): "):
                raise RunError("no data to train on") from None
            choice = "synthetic"
    choice = distributed.broadcast_object(choice)
    if data is None:
        data = load_dataset(choice, args.data_dir, url=args.data_url)
    return data, dataclasses.replace(recipe, dataset=choice)


def choose_files(
    args: argparse.Namespace,
    recipe: Recipe,
    folder: Path,
    state: dict[str, Any] | None,
    source: Path | None,
) -> RunFiles:
    """Where the run writes: an earlier run's files are replaced only by --overwrite or a y at a terminal.

    A resumed run (its `state`, read from `source`) writes its own files on, and no other run's.
    """
    if state is not None:
        files = RunFiles(folder, args.name or stored_name(state))
        own = source.resolve() in (files.last.resolve(), files.previous.resolve())
        if own or args.overwrite or not distributed.broadcast_object(files.exists):
            return files
        free = distributed.broadcast_object(files.next_free())
        LOG.info(f"{files.last} is not {source} and is kept; this run writes {free.name}.")
        return free
    name = args.name or DEFAULT_NAME
    if recipe.dataset == "synthetic" and "synthetic" not in name:
        name += "_synthetic"
    files = RunFiles(folder, name)
    if not distributed.broadcast_object(files.exists) or args.overwrite:
        return files
    free = distributed.broadcast_object(files.next_free())
    if not args.yes and distributed.broadcast_object(is_interactive()):
        question = f"{files.last.parent} holds a run {name}. Overwrite it? (y/n, default: n): "
        if ask_yes_no(question, default=False):
            return files
    LOG.info(f"{name} is kept (--resume goes on with it); this run writes {free.name}.")
    return free


def stored_name(state: dict[str, Any]) -> str:
    """The run's name in a checkpoint.

    Raises:
        RunError: there is none, or it could lead out of the output folder.
    """
    try:
        return plain_name(state["name"])
    except (KeyError, TypeError, argparse.ArgumentTypeError):
        raise RunError("the checkpoint's run name is missing or unsafe: pass --name NAME") from None


def answer_questions(
    args: argparse.Namespace, recipe: Recipe, model: nn.Module, loader: DataLoader, files: RunFiles
) -> Recipe:
    """The recipe with the answers to the three questions: LR finder? its rate? how many epochs?

    A flag given is a question not asked; --lr, or --max-lr, makes the finder's rate moot, so that it is then
    run only on --lr-finder.
    """
    quiet = args.yes
    rate_given = args.lr is not None or args.max_lr is not None
    lr = DEFAULT_LR if args.lr is None else args.lr
    wanted = args.lr_finder
    if wanted is None:
        wanted = not rate_given and (quiet or ask_yes_no("Do you want to run LR Finder? (y/n, default: y): "))
    if wanted:
        suggested = run_lr_finder(recipe, model, loader, files)
        if not rate_given:
            question = f"Use suggested LR {suggested:.2e}? (y/n, default: y): "
            if quiet or ask_yes_no(question):
                lr = suggested
            else:
                lr = ask(
                    f"Enter learning rate (default {DEFAULT_LR:.2e}): ",
                    DEFAULT_LR,
                    as_answer(number(1e-8, 100), "The learning rate"),
                    shown=f"{DEFAULT_LR:.2e}",
                )
    elif not rate_given:
        LOG.info(f"No LR finder: the learning rate is {lr:.2e}, the default.")
    epochs = args.epochs
    if epochs is None and quiet:
        epochs = DEFAULT_EPOCHS
    if epochs is None:
        lowest = recipe.milestones[-1] + 1 if recipe.milestones else 1
        epochs = ask(
            f"Select number of epochs for training (default {DEFAULT_EPOCHS}): ",
            DEFAULT_EPOCHS,
            as_answer(whole_number(lowest, MAX_EPOCHS), "The number of epochs"),
            shown=str(DEFAULT_EPOCHS),
        )
    return dataclasses.replace(recipe, lr=lr, epochs=epochs)


def run_lr_finder(recipe: Recipe, model: nn.Module, loader: DataLoader, files: RunFiles) -> float:
    """Run the finder on the main process, say and draw what it found, and return the suggested rate."""
    found = None
    if distributed.is_main():
        LOG.info("LR finder: 200 batches at rising learning rates, on a copy of the network")
        found = find_lr(
            model,
            recipe.build_criterion(),
            recipe.build_optimizer,
            loader,
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


def resume_command(args: argparse.Namespace, files: RunFiles) -> str:
    """The command that goes on with this run, with the flags that are about this machine."""
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    processes = distributed.world_size()
    command = ["python"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}"]
    command += [script, "--resume", str(files.last)]
    for flag in ("data_dir", "device", "workers", "checkpoint_every"):
        value = getattr(args, flag)
        if value != build_parser().get_default(flag):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            command += [f"--{flag.replace('_', '-')}", shown]
    command += [f"--{flag.replace('_', '-')}" for flag in ("deterministic", "sync_bn") if getattr(args, flag)]
    return shlex.join(command)
