"""A training run: its files, the state to resume it from, and its state from batch to batch."""

import argparse
import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import distributed
from core.cli import LOG, Interrupts, ask_yes_no, is_interactive, plain_name
from core.errors import RunError
from core.files import atomic_write_text, remove_temporary_files, run_lock
from core.machine import versions
from training import checkpoint as ckpt
from training.engine import Metrics, RunningTotals, TrainStep
from training.history import epoch_line, history_csv
from training.recipe import Recipe
from training.settings import DEFAULT_NAME, Settings

# A run keeps about this many times the bytes of its network's weights: the last state, the one before it and
# the temporary file of the next one, of three each (weights, momentum, best weights); the best weights; the
# results. The plots and the table come on top.
WEIGHTS_KEPT = 11
OTHER_BYTES = 2 << 20
# How often several processes on GPUs agree on an interrupt; each time waits for the device.
AGREE_EVERY = 20


class Interrupted(Exception):
    """The run was interrupted and its state is saved."""


@dataclass(frozen=True)
class RunFiles:
    """The files of the run `name` in `folder`."""

    folder: Path
    name: str

    def path(self, ending: str) -> Path:
        """The run's file with that ending, for example `_last.pth`."""
        return self.folder / f"{self.name}{ending}"

    # The state to resume from, the one before it (used where the last one is damaged), and a damaged one
    # that was moved aside; the weights of the best epoch so far; what a finished run leaves.
    last = property(lambda self: self.path("_last.pth"))
    previous = property(lambda self: self.path("_last.prev.pth"))
    damaged = property(lambda self: self.path("_last.damaged.pth"))
    best = property(lambda self: self.path("_best.pth"))
    results = property(lambda self: self.path("_training_results.pth"))

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Every checkpoint that the run may write."""
        return (self.last, self.previous, self.damaged, self.best, self.results)

    @property
    def exists(self) -> bool:
        """Whether a run of this name, finished or not, is in the folder."""
        return any(path.exists() for path in self.checkpoints if path != self.damaged)

    @classmethod
    def of_last(cls, path: Path) -> "RunFiles | None":
        """The files of the run whose state `path` is; None where it is not called NAME_last.pth."""
        name = path.name.removesuffix("_last.pth")
        return None if name == path.name else cls(path.parent, name)

    def next_free(self) -> "RunFiles":
        """These files, or those of NAME-2, NAME-3, ... where a run of the name exists already."""
        files, number = self, 1
        while files.exists:
            number += 1
            files = RunFiles(self.folder, f"{self.name}-{number}")
        return files

    def prepare(self) -> None:
        """Create the folder and check, on the main process, that files can be written there.

        Raises:
            RunError: it cannot be created or written to; the message says why.
        """
        if not distributed.is_main():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RunError(f"{self.folder} is a file, not a folder: pass another --output-dir") from None
        except OSError as error:
            raise RunError(f"cannot create the folder {self.folder}: {error.strerror}") from None
        probe = self.path("_probe")
        atomic_write_text(probe, "")
        probe.unlink(missing_ok=True)

    def check_space(self, weights_bytes: int) -> None:
        """Check, on the main process, that the disk has room for a run whose weights have that many bytes.

        Raises:
            RunError: it has not.
        """
        if not distributed.is_main():
            return
        reused = sum(path.stat().st_size for path in self.checkpoints if path.exists())
        needed = WEIGHTS_KEPT * weights_bytes + OTHER_BYTES - reused
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise RunError(
                f"the disk of {self.folder} has {free / 1e6:,.1f} MB left, the run needs about "
                f"{needed / 1e6:,.1f}: free some space, or pass another --output-dir"
            )

    def remove_earlier_run(self) -> None:
        """Delete what an earlier run of this name left beside the new one's `last`; by the main process."""
        if not distributed.is_main():
            return
        tables = self.path("_history.csv"), self.path("_training_plots.png")
        for path in {*self.checkpoints, *tables} - {self.last}:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"cannot delete {path}: {error.strerror or error}") from None

    def load_last(self) -> dict[str, Any]:
        """The state to resume from: the last one or, where that is damaged, the one before it.

        Raises:
            RunError: neither can be read.
        """
        if not self.last.exists() and not self.previous.exists():
            others = sorted(path.name for path in self.folder.glob("*_last.pth"))
            hint = f"; there is {', '.join(others[:5])}: pass --resume FILE" if others else ""
            raise RunError(f"nothing to resume: {self.last} does not exist{hint}")
        if not self.last.exists():  # killed between the two moves of a save
            LOG.warning(f"{self.last} is missing. Resuming from the checkpoint before it, {self.previous}")
            return ckpt.load_checkpoint(self.previous)
        try:
            return ckpt.load_checkpoint(self.last)
        except RunError as error:
            if not self.previous.exists():
                raise
            try:
                state = ckpt.load_checkpoint(self.previous)
            except RunError as earlier:
                raise RunError(f"{error}; nor can the one before it be used: {earlier}") from None
            LOG.warning(f"{error}. Resuming from the checkpoint before it, {self.previous}")
            return state

    def move_damaged_aside(self) -> None:
        """Move a damaged last state away, so that the next save does not replace the good earlier one by it.

        Only for the process that holds the run's lock: another one may be about to replace the file.
        """
        if not self.last.exists() or not self.previous.exists():
            return
        try:
            ckpt.load_checkpoint(self.last)
        except RunError:
            try:
                os.replace(self.last, self.damaged)
            except OSError as error:
                raise RunError(f"cannot move {self.last}: {error.strerror or error}") from None
            LOG.warning(f"The damaged file is now {self.damaged}")


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A state to resume from, and the file that it was read from."""

    state: dict[str, Any]
    path: Path

    @classmethod
    def load(cls, file: str | None, default: RunFiles) -> "SavedRun":
        """The state in `file`, or the last one of the run `default` where no file is named.

        Raises:
            RunError: it is missing, damaged or of another kind.
        """
        files = RunFiles.of_last(Path(file)) if file else default
        if files is None:
            state, path = ckpt.load_checkpoint(file), Path(file)
        else:
            state, path = files.load_last(), files.last
        if state.get("kind") != "last" or not isinstance(state.get("recipe"), dict):
            raise RunError(f"{path} is not a state to resume from: name a NAME_last.pth")
        return cls(state, path)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run; a UsageError where it holds what this version does not know."""
        return Recipe.from_dict(self.state["recipe"])

    @property
    def name(self) -> str:
        """The run's name.

        Raises:
            RunError: there is none, or it could lead out of the output folder.
        """
        try:
            return plain_name(self.state["name"])
        except (KeyError, TypeError, argparse.ArgumentTypeError):
            raise RunError("the checkpoint's run name is missing or unsafe: pass --name NAME") from None

    def results_if_finished(self) -> Path | None:
        """The results file of the run where it is on disk and belongs to this state; else None."""
        files, history = RunFiles.of_last(self.path), self.state.get("history")
        unfinished = not isinstance(history, list) or len(history) < self.recipe.epochs
        if files is None or unfinished or not files.results.exists():
            return None
        try:
            results = ckpt.load_checkpoint(files.results)
            same = all(results.get(key) == self.state.get(key) for key in ("name", "recipe", "history"))
        except (RunError, RuntimeError, ValueError):  # damaged, or tensors where none belong: written again
            return None
        return files.results if same else None


def choose_files(recipe: Recipe, settings: Settings, folder: Path, saved: SavedRun | None) -> RunFiles:
    """Where the run writes: an earlier run's files are replaced only by --overwrite or a y at a terminal.

    A resumed run continues its own files, and never replaces those of another run.
    """
    if saved is not None:
        files = RunFiles(folder, settings.name or saved.name)
        own = saved.path.resolve() in (files.last.resolve(), files.previous.resolve())
        if distributed.broadcast_object(own or settings.overwrite or not files.exists):
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


@contextlib.contextmanager
def lock_run(files: RunFiles, *, resumed: bool) -> Iterator[None]:
    """Keep other processes off the run's files, and clean up after killed ones; done by the main process.

    Raises:
        RunError: another process writes this run.
    """
    if not distributed.is_main():
        yield
        return
    with run_lock(files.path(".lock")):
        remove_temporary_files(files.folder, f"{files.name}_")
        if resumed:
            files.move_damaged_aside()
        yield


class Run:
    """One run's state from batch to batch, and when it is written to disk.

    `epoch` is the epoch in training, from 1, and `batches_done` the number of its batches that are done;
    `totals` are their loss and hits; `history` has one row for each finished epoch. It holds no wall-clock
    time, so that a run resumed after a kill writes the same bytes as one that was never interrupted.
    """

    def __init__(
        self,
        files: RunFiles,
        recipe: Recipe,
        step: TrainStep,
        *,
        batches_per_epoch: int,
        interrupts: Interrupts,
        resume_command: str,
        checkpoint_every_s: float = 600.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.files, self.recipe, self.step = files, recipe, step
        self.model, self.averaging = step.network, step.techniques.averaging
        self.batches_per_epoch = batches_per_epoch
        self.interrupts = interrupts
        self.resume_command = resume_command
        self.checkpoint_every_s = checkpoint_every_s
        self.extra = extra or {}
        self.epoch, self.batches_done = 1, 0
        self.learning_rate = recipe.lr
        self.totals = RunningTotals(step.device)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy_percent": -math.inf, "model": {}}
        self.elapsed_s = 0.0
        self._clock = self._saved_at = time.monotonic()

    @property
    def eval_model(self) -> nn.Module:
        """The network whose weights the run leaves: the averaged one where there is one."""
        return self.averaging.network if self.averaging else self.model

    def start(self, saved: SavedRun | None) -> None:
        """Restore the saved state or, in a new run, write the first one, in the place of an earlier run's.

        From then on there is always a state to resume from.

        Raises:
            RunError: the state does not fit this network, or cannot be written.
        """
        self.interrupts.busy = True  # from here on a signal stops the run after a batch, with the state saved
        epochs = f"{self.recipe.epochs} epoch{'' if self.recipe.epochs == 1 else 's'}"
        LOG.info(f"Training: {epochs}, {self.recipe.schedule_note}")
        if saved is None:
            self.save()
            self.files.remove_earlier_run()
            return
        self.restore(saved)
        LOG.info(
            f"Resumed {saved.path}: epoch {self.epoch}, batch {self.batches_done} of {self.batches_per_epoch}"
        )
        if self.best["epoch"] and distributed.is_main() and not self.files.best.exists():  # under a new name
            ckpt.save_checkpoint(self.files.best, self._weights_state("best"))
        if self.recipe.precision != saved.recipe.precision:
            LOG.info(f"Precision changed from {saved.recipe.precision} to {self.recipe.precision}")

    def remaining_epochs(self) -> Iterator[int]:
        """The epochs from the one in training to the recipe's last, each noted as it begins.

        Raises:
            Interrupted: after the last epoch, where the run was asked to stop.
        """
        while self.epoch <= self.recipe.epochs:
            self.begin_epoch()
            yield self.epoch
        self.stop_if_asked()

    def begin_epoch(self) -> None:
        """Note the epoch's learning rate: that of its first batch, also when the epoch is resumed."""
        if self.batches_done == 0:
            self.learning_rate = self.step.optimizer.param_groups[0]["lr"]

    def after_train_batch(self, number: int) -> None:
        """Between two training batches: save when it is time; stop, with the state saved, when asked to.

        Several processes must agree on both, since saving sums over all of them. They do so after the same
        batches, on GPUs only after every AGREE_EVERY-th.

        Raises:
            Interrupted: after the state is saved.
        """
        self.batches_done = number
        if distributed.world_size() > 1 and self.step.device.type != "cpu" and number % AGREE_EVERY:
            return
        asked = self.interrupts.signal_number is not None
        due = time.monotonic() - self._saved_at > self.checkpoint_every_s
        asked, due = distributed.any_rank(self.step.device, asked, due)
        if asked:
            self._stop()
        if due:
            self._check_then_save()

    def after_test_batch(self, number: int) -> None:
        """As `after_train_batch`, between two test batches.

        Several processes test different numbers of batches and cannot agree here; they stop in the next
        epoch.
        """
        if distributed.world_size() == 1:
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Stop, with the state saved, where any process was asked to; all of them must call this.

        Raises:
            Interrupted: after the state is saved.
        """
        [asked] = distributed.any_rank(self.step.device, self.interrupts.signal_number is not None)
        if asked:
            self._stop()

    def _stop(self) -> None:
        if self.epoch > self.recipe.epochs:  # saved already, and the network may hold the best weights now
            where = "after the last epoch"
        else:
            self._check_then_save()
            where = f"in epoch {self.epoch}"
        LOG.info(f"Stopped {where}. Resume with: {self.resume_command}")
        raise Interrupted

    def finish_epoch(self, train: Metrics, val: Metrics, averaged: Metrics | None = None) -> None:
        """Add the epoch's row to the history, and write history, best weights and state.

        Args:
            val: the network's metrics on the split that the best epoch is chosen on.
            averaged: those of the averaged weights, which then are chosen and kept.
        """
        split = self.recipe.selection_split
        row = {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "train_loss": train.loss,
            "train_acc_percent": train.accuracy_percent,
            f"{split}_loss": val.loss,
            f"{split}_acc_percent": val.accuracy_percent,
        }
        if averaged is not None:
            row[f"ema_{split}_loss"] = averaged.loss
            row[f"ema_{split}_acc_percent"] = averaged.accuracy_percent
        self.history.append(row)
        accuracy = row[f"{self.recipe.selection_metric}_acc_percent"]
        is_best = accuracy > self.best["accuracy_percent"]
        if is_best:
            weights = {k: v.detach().cpu().clone() for k, v in self.eval_model.state_dict().items()}
            self.best = {"epoch": self.epoch, "accuracy_percent": accuracy, "model": weights}
        LOG.info(epoch_line(self.history, self.recipe, is_best))
        self.epoch, self.batches_done = self.epoch + 1, 0
        self.totals = RunningTotals(self.step.device)
        if distributed.is_main():
            self.write_history()
            if is_best:
                ckpt.save_checkpoint(self.files.best, self._weights_state("best"))
        self.save()  # last: a kill before it repeats the epoch, with the same result

    def finish(self, final_test: dict[str, Metrics]) -> None:
        """Write the results file at the end of the run.

        Args:
            final_test: with held-out images, the test metrics of the best and the last epoch; else empty.
        """
        self._count_time()
        if not distributed.is_main():
            return
        self.write_history()
        tests = {
            key: {"loss": m.loss, "accuracy_percent": m.accuracy_percent, "images": m.images}
            for key, m in final_test.items()
        }
        results = self._weights_state("results") | {"elapsed_s": self.elapsed_s, "final_test": tests}
        ckpt.save_checkpoint(self.files.results, results)

    def write_history(self) -> None:
        """Write the history as a CSV table."""
        if self.history:
            atomic_write_text(self.files.path("_history.csv"), history_csv(self.history))

    def save(self) -> None:
        """Write the state to resume from and keep the one before it; all processes must call this."""
        state = self.state()
        self._saved_at = time.monotonic()
        if distributed.is_main():
            ckpt.save_checkpoint(self.files.last, state, keep=self.files.previous)

    def _check_then_save(self) -> None:
        """Save, unless a NaN that the loop has not noticed yet is in the state."""
        finite = all(bool(torch.isfinite(value).all()) for value in self.model.parameters())
        if finite and int(self.totals.bad_batch.item()) == RunningTotals.NO_BAD_BATCH:
            self.save()

    def state(self) -> dict[str, Any]:
        """Everything that resuming exactly needs, as plain types and tensors."""
        totals = distributed.sum_over_ranks(self.totals.values).tolist()
        self._count_time()
        return {
            "kind": "last",
            "name": self.files.name,
            "recipe": self.recipe.to_dict(),
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "learning_rate": self.learning_rate,
            "sums": totals,
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scheduler": ckpt.plain(self.step.scheduler.state_dict()),
            "scaler": self.step.scaler.state_dict(),
            "skipped_steps": self.step.skipped_steps,
            "random": ckpt.random_state(),
            "history": self.history,
            "best": self.best,
            "elapsed_s": self.elapsed_s,
            "versions": versions(),
            **({"average": self.averaging.state()} if self.averaging else {}),
            **self.extra,
        }

    def restore(self, saved: SavedRun) -> None:
        """Restore what `state` returned.

        Raises:
            RunError: the state does not fit this network, or lacks an entry.
        """
        state, source = saved.state, saved.path
        ckpt.load_weights(self.model, state.get("model"), source)
        try:
            self.step.optimizer.load_state_dict(state["optimizer"])
            self._check_momentum()
            self.step.scheduler.load_state_dict(state["scheduler"])
            self.step.skipped_steps = int(state.get("skipped_steps", 0))
            if self.step.scaler.is_enabled() and state.get("scaler"):  # empty where the run was not in fp16
                self.step.scaler.load_state_dict(state["scaler"])
            if self.averaging:
                self.averaging.restore(state["average"], source)
            self.epoch, self.batches_done = int(state["epoch"]), int(state["batches_done"])
            self.learning_rate = float(state["learning_rate"])
            if distributed.is_main():  # the stored totals are those of all processes
                self.totals.restore(state["sums"])
            self.history = [dict(row) for row in state["history"]]
            self.best = {key: state["best"][key] for key in ("epoch", "accuracy_percent", "model")}
            self.elapsed_s = float(state["elapsed_s"])
            if len(self.history) != self.epoch - 1 or not 0 <= self.batches_done <= self.batches_per_epoch:
                raise ValueError("its history, epoch and batch do not fit together")
            ckpt.restore_random_state(state["random"])
        except (KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            raise RunError(f"{source} is not a state to resume from: {error!r}"[:300]) from None

    def _check_momentum(self) -> None:
        """Refuse momentum of another shape than its weight, which SGD would only fail on later."""
        for weight, values in self.step.optimizer.state.items():
            buffer = values.get("momentum_buffer")
            if buffer is not None and buffer.shape != weight.shape:
                raise ValueError("a momentum buffer has another shape than its weight")

    def _weights_state(self, kind: str) -> dict[str, Any]:
        """The best epoch's weights with everything that using them needs."""
        return {
            "kind": kind,
            "name": self.files.name,
            "recipe": self.recipe.to_dict(),
            "epoch": self.best["epoch"],
            "accuracy_percent": self.best["accuracy_percent"],
            "chosen_on": self.recipe.selection_split,
            "model": self.best["model"],
            "history": self.history,
            "versions": versions(),
            **self.extra,
        }

    def _count_time(self) -> None:
        now = time.monotonic()
        self.elapsed_s += now - self._clock
        self._clock = now
