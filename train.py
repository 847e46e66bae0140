"""Train ResNet-56, or a relative, on CIFAR-100.

    python train.py                              asks three questions, then trains
    python train.py --yes --epochs 100           asks nothing
    python train.py --resume                     goes on where a run was interrupted
    torchrun --nproc-per-node=2 train.py --yes   several processes, one run

Plots, history and checkpoints are in output/; `python train.py --help` lists every choice.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from beyond_reference import bn_update_batches, load_teacher, test_average
from cifar.dataset import ImageData, Split, balanced_subset, train_val_split
from core import distributed
from core.cli import LOG, Interrupts, run_main, shell_command, start_log
from core.errors import RunError, UsageError
from core.files import remove_temporary_files, run_lock
from core.machine import (
    choose_compile,
    choose_device,
    choose_workers,
    device_name,
    native_bf16,
    precision_name,
    set_up_torch,
)
from dialogue import answer_questions, choose_files, load_data, resume_command
from model import build_model, count_parameters
from training import checkpoint as ckpt
from training.engine import TrainStep, evaluate, train_one_epoch
from training.flags import DEFAULT_NAME, apply_preset, build_parser, check_resume_flags, recipe_from
from training.history import analyse
from training.recipe import Recipe
from training.run import Interrupted, Run
from training.run_files import RunFiles
from training.techniques import build_techniques
from training.tensorboard_log import TensorBoard
from utils import make_test_batches, make_train_loader


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, then train; Ctrl-C and SIGTERM save what is needed to resume."""
    args = apply_preset(build_parser().parse_args(argv))
    interrupts = Interrupts()
    with interrupts.caught():
        try:
            return train(args, interrupts)
        except Interrupted:
            return interrupts.exit_code
        except KeyboardInterrupt:
            print("\nInterrupted; there was nothing to save.", file=sys.stderr)
            return interrupts.exit_code


def train(args: argparse.Namespace, interrupts: Interrupts) -> int:
    """The whole run, in reading order: recipe, data, network, questions, epochs, results."""
    start_log(None)
    device = choose_device(args.device)
    state, source = load_state(args)
    recipe = starting_recipe(args, state, device)
    if state is not None and is_finished(state, source, recipe.epochs):
        return 0
    folder = args.output_dir or (source.parent if source else Path("output"))
    distributed.start(device, sync_bn=args.sync_bn)
    if distributed.is_main():
        RunFiles(folder, args.name or DEFAULT_NAME).prepare()
    set_up_torch(recipe.seed, device, deterministic=args.deterministic)

    data, recipe = load_data(args, recipe)
    train_split, test_split, val_split = splits(data, recipe)
    files = choose_files(args, recipe, folder, state, source)
    with run_lock(files.path(".lock")) if distributed.is_main() else contextlib.nullcontext():
        if distributed.is_main():
            remove_temporary_files(files.folder, files.name + "_")
            if state is not None:
                files.put_damaged_aside()
        start_log(files.path("_log.txt"))
        model = build_model(recipe.model, num_classes=len(data.classes), **recipe.network_options)
        model = model.to(device, memory_format=torch.channels_last)
        if distributed.is_main():
            files.check_space(sum(value.nbytes for value in model.state_dict().values()))
        say_what_is_trained(recipe, model, device, train_split, test_split)
        loader = make_train_loader(
            train_split,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            augment=recipe.augment,
            workers=choose_workers(device.type) if args.workers is None else args.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=device.type == "cuda",
        )
        teacher = load_teacher(recipe, data, device, files)  # first: a missing one must cost nothing
        if state is None:
            recipe = answer_questions(args, recipe, model, loader, files)
            if distributed.is_main():
                files.remove_run()  # not before: the questions may be left by Ctrl-C
        run = start_run(args, recipe, data, model, teacher, loader, files, interrupts, state, source)
        if run.averaging is not None:
            run.averaging.bn_batches = bn_update_batches(train_split, recipe, device)
        test_batches = make_test_batches(rank_shard(test_split), recipe.test_batch_size, device)
        val_batches = (
            make_test_batches(rank_shard(val_split), recipe.test_batch_size, device) if val_split else []
        )
        board = start_board(args, run, loader)
        train_epochs(run, loader, val_batches or test_batches, after_epoch=board)
        finish(run, test_batches)
    return 0


def train_epochs(
    run: Run, loader: DataLoader, chosen_on: list[tuple], after_epoch: Callable[[], None]
) -> None:
    """Train and test, epoch by epoch, from where `run` stands to the recipe's last epoch.

    Args:
        chosen_on: the batches of the split that the best epoch is chosen on.
        after_epoch: called after each epoch.
    """
    recipe, sampler = run.recipe, loader.batch_sampler
    run.interrupts.busy = True  # from here on there is a state to save
    while run.epoch <= recipe.epochs:
        run.begin_epoch()
        sampler.set_epoch(run.epoch, start_batch=run.batches_done)
        train_metrics = train_one_epoch(
            run.step,
            loader,
            run.sums,
            first_batch=run.batches_done,
            batches=run.batches_per_epoch,
            global_size=sampler.global_size,
            title=f"epoch {run.epoch}/{recipe.epochs}",
            after_batch=run.after_train_batch,
        )
        test_metrics = evaluate(
            run.model,
            chosen_on,
            precision=recipe.precision,
            title=f"test of epoch {run.epoch}/{recipe.epochs}",
            after_batch=run.after_test_batch,
        )
        run.finish_epoch(train_metrics, test_metrics, test_average(run, chosen_on))
        after_epoch()
    run.stop_if_asked()


def start_board(args: argparse.Namespace, run: Run, loader: DataLoader) -> Callable[[], None]:
    """What writes the last epoch to TensorBoard; without --tensorboard it does nothing."""
    if not args.tensorboard or not distributed.is_main():
        return lambda: None
    board = TensorBoard(run.files.path("_tensorboard"), first_epoch=run.epoch)
    board.show_start(run.model, loader, run.epoch)
    return lambda: board.add_epoch(run.history[-1], run.model)


def finish(run: Run, test_batches: list[tuple]) -> None:
    """Write the results and say what the run came to; with held-out images, read the test set now."""
    tests = {}
    if run.recipe.val_split:
        final = {name: value.clone() for name, value in run.eval_model.state_dict().items()}
        for key, weights in (("best", run.best["model"]), ("last", final)):
            run.model.load_state_dict(weights)
            tests[key] = evaluate(
                run.model, test_batches, precision=run.recipe.precision, after_batch=run.after_test_batch
            )
    run.finish(tests)
    for line in analyse(run.history, run.recipe, run.best["epoch"], run.elapsed_s, tests):
        LOG.info(line)
    LOG.info(f"Results: {run.files.results}")


def load_state(args: argparse.Namespace) -> tuple[dict[str, Any] | None, Path | None]:
    """The state to resume from and its file, or two times None for a new run.

    Raises:
        RunError: --resume names a file that is missing, damaged or of another kind.
    """
    if args.resume is None:
        return None, None
    if args.resume:
        source = Path(args.resume)
        files = RunFiles.of_last(source)
        state = files.load_last() if files else ckpt.load_checkpoint(source)
    else:
        files = RunFiles(args.output_dir or Path("output"), args.name or DEFAULT_NAME)
        source, state = files.last, files.load_last()
    if state.get("kind") != "last" or not isinstance(state.get("recipe"), dict):
        raise RunError(f"{source} is no state to resume from: name a NAME_last.pth")
    return state, source


def is_finished(state: dict[str, Any], source: Path, epochs: int) -> bool:
    """Whether the run of `state` has its results on disk; says so, since there is nothing to go on with."""
    files, history = RunFiles.of_last(source), state.get("history")
    if files is None or not isinstance(history, list) or len(history) < epochs or not files.results.exists():
        return False
    try:
        results = ckpt.load_checkpoint(files.results)
        if any(results.get(key) != state.get(key) for key in ("name", "recipe", "history")):
            return False
    except (RunError, RuntimeError, ValueError):  # damaged, or tensors where none belong: written anew
        return False
    LOG.info(f"{files.name} is finished, nothing is left to train. Results: {files.results}")
    return True


def starting_recipe(args: argparse.Namespace, state: dict[str, Any] | None, device: torch.device) -> Recipe:
    """The recipe of the flags, or that of the resumed checkpoint; the questions may still change it.

    Raises:
        UsageError: the flags contradict each other or the checkpoint.
    """
    if state is not None:
        recipe = Recipe.from_dict(state["recipe"])
        check_resume_flags(args, recipe)
        kept = args.precision in (None, "auto")
        return recipe if kept else replace(recipe, precision=args.precision)
    precision = args.precision
    if precision in (None, "auto"):
        precision = "bf16" if native_bf16(device) else "fp32"
    recipe = recipe_from(args, precision)
    if recipe.batch_size % distributed.world_size():
        raise UsageError(
            f"--batch-size {recipe.batch_size} does not divide by {distributed.world_size()} processes"
        )
    return recipe


def splits(data: ImageData, recipe: Recipe) -> tuple[Split, Split, Split | None]:
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
    """The images that this process tests: with several processes each takes every so-manieth, none twice."""
    share = slice(distributed.rank(), None, distributed.world_size())
    return Split(np.ascontiguousarray(split.images[share]), split.labels[share])


def say_what_is_trained(
    recipe: Recipe, model: nn.Module, device: torch.device, train_split: Split, test_split: Split
) -> None:
    """Log the first line of a run and, to trace it by, its command and versions."""
    LOG.info(
        f"Device: {device_name(device)}, {precision_name(recipe.precision, device)} | "
        f"Network: {recipe.model}, {count_parameters(model):,} parameters | Data: {recipe.data_note}, "
        f"{len(train_split):,} train / {len(test_split):,} test | Recipe: SGD, batch "
        f"{recipe.batch_size}, weight decay {recipe.weight_decay:g}, {recipe.scheduler}, "
        f"{recipe.augment} augmentation, seed {recipe.seed}{recipe.non_default_note}"
    )
    LOG.info(f"Command: {shell_command(['python', *sys.argv])}")
    versions = {"code": ckpt.commit(), **ckpt.versions()}
    LOG.info("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def start_run(
    args: argparse.Namespace,
    recipe: Recipe,
    data: ImageData,
    model: nn.Module,
    teacher: nn.Module | None,
    loader: DataLoader,
    files: RunFiles,
    interrupts: Interrupts,
    state: dict[str, Any] | None,
    source: Path | None,
) -> Run:
    """The run at its first batch, or at the batch after the last one of the resumed state."""
    optimizer = recipe.build_optimizer(model)
    device = next(model.parameters()).device
    batches_per_epoch, batch_size = len(loader), loader.batch_sampler.global_size(0)
    images = batches_per_epoch * recipe.batch_size * recipe.epochs
    changed = state is not None and recipe.precision != state["recipe"]["precision"]
    stored = state.get("compile") if state and not changed else None
    use_compile, why = choose_compile(args.compile, device, recipe.precision, images, stored)
    LOG.info(f"torch.compile: {'on' if use_compile else 'off'} ({why})")
    step = TrainStep(
        model,
        recipe.build_criterion(),
        optimizer,
        recipe.build_scheduler(optimizer, batches_per_epoch),
        precision=recipe.precision,
        compile_batch_size=batch_size if use_compile else None,
        sync_bn=args.sync_bn,
        techniques=build_techniques(
            recipe,
            model,
            classes=len(data.classes),
            batches_per_epoch=batches_per_epoch,
            teacher=teacher,
        ),
    )
    run = Run(
        files,
        recipe,
        model,
        step,
        batches_per_epoch,
        interrupts,
        resume_command=resume_command(args, files),
        checkpoint_every_s=60 * args.checkpoint_every,
        extra={
            "compile": use_compile,
            "commit": ckpt.commit(),
            "classes": list(data.classes),
            "superclasses": list(data.superclasses),
            "superclass_of": data.superclass_of.tolist(),
        },
    )
    plural = "" if recipe.epochs == 1 else "s"
    LOG.info(f"Training: {recipe.epochs} epoch{plural}, {recipe.schedule_note}")
    if state is None:
        run.save()  # so that from now on there is always a state to resume
    else:
        run.restore(state, source)
        LOG.info(f"Resumed {source}: epoch {run.epoch}, batch {run.batches_done} of {batches_per_epoch}")
    if changed:
        LOG.info(f"Precision: {recipe.precision} from here on, {state['recipe']['precision']} until here")
    return run


if __name__ == "__main__":
    sys.exit(run_main(main, "train.py"))
