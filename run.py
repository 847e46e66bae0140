"""A training run on disk: its files, its state from batch to batch, and what it says at the end."""

import csv
import io
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint as ckpt
import distributed
from cli import LOG, Interrupts
from engine import Metrics, Sums, TrainStep
from errors import RunError
from files import atomic_write_text
from plots import plot_history
from recipe import Recipe

# On a GPU an epoch takes seconds: the plots are then drawn at most this often, and always at the end.
PLOT_EVERY_S = 5.0
# How often several processes on GPUs agree on an interrupt; each time waits for the device.
AGREE_EVERY = 20


@dataclass(frozen=True)
class RunFiles:
    """The files of the run `name` in `folder`."""

    folder: Path
    name: str

    def path(self, ending: str) -> Path:
        """The run's file of that ending, `_last.pth` say."""
        return self.folder / f"{self.name}{ending}"

    @property
    def last(self) -> Path:
        """The state to resume from."""
        return self.path("_last.pth")

    @property
    def previous(self) -> Path:
        """The state before the last one, used where the last one is damaged."""
        return self.path("_last.prev.pth")

    @property
    def best(self) -> Path:
        """The weights of the best epoch so far."""
        return self.path("_best.pth")

    @property
    def results(self) -> Path:
        """What a finished run leaves: best weights, history, recipe, versions."""
        return self.path("_training_results.pth")

    @property
    def taken(self) -> bool:
        """Whether a run of this name, finished or not, is here."""
        return any(path.exists() for path in (self.last, self.previous, self.best, self.results))

    @classmethod
    def of_last(cls, path: Path) -> "RunFiles | None":
        """The files of the run whose state `path` is, or None where it is not called NAME_last.pth."""
        name = path.name.removesuffix("_last.pth")
        return None if name == path.name else cls(path.parent, name)

    def free(self) -> "RunFiles":
        """These files, or those of NAME-2, NAME-3, ... if a run of the name is here already."""
        files, number = self, 1
        while files.taken:
            number += 1
            files = RunFiles(self.folder, f"{self.name}-{number}")
        return files

    def remove_run(self) -> None:
        """Delete an earlier run's checkpoints, so that nothing of it can be mixed up with the new one."""
        for path in (self.last, self.previous, self.best, self.results):
            path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Make the folder and see that a file can be written there.

        Raises:
            RunError: it cannot; the message says why.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RunError(f"{self.folder} is a file, not a folder: pass another --output-dir") from None
        except OSError as error:
            raise RunError(f"cannot make the folder {self.folder}: {error.strerror}") from None
        probe = self.path("_probe")
        atomic_write_text(probe, "")
        probe.unlink(missing_ok=True)

    def load_last(self) -> dict[str, Any]:
        """The state to resume from: the last one, or, where that is damaged, the one before it.

        Raises:
            RunError: neither can be used.
        """
        if not self.last.exists() and not self.previous.exists():
            raise RunError(f"nothing to resume: {self.last} does not exist")
        try:
            return ckpt.load_checkpoint(self.last)
        except RunError as error:
            if not self.previous.exists():
                raise
            LOG.warning(f"{error}; going on from {self.previous} instead")
            return ckpt.load_checkpoint(self.previous)


class Interrupted(Exception):
    """The run was interrupted and its state is saved."""


class Run:
    """One run's state, and when it goes to disk.

    `epoch` is the epoch being trained, from 1; `batches_done` its batches that are done; `sums` their loss
    and hits; `history` one row for each finished epoch. No wall-clock time is in the history, so that a run
    resumed after a kill writes the same bytes as one that went through.
    """

    def __init__(
        self,
        files: RunFiles,
        recipe: Recipe,
        model: nn.Module,
        step: TrainStep,
        batches_per_epoch: int,
        interrupts: Interrupts,
        *,
        resume_command: str,
        checkpoint_every_s: float = 600.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.files, self.recipe, self.model, self.step = files, recipe, model, step
        self.batches_per_epoch = batches_per_epoch
        self.interrupts = interrupts
        self.resume_command = resume_command
        self.checkpoint_every_s = checkpoint_every_s
        self.extra = extra or {}
        self.epoch, self.batches_done = 1, 0
        self.learning_rate = recipe.lr
        self.sums = Sums(step.device)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy_percent": -math.inf, "model": {}}
        self.elapsed_s = 0.0
        self._clock = self._saved_at = time.monotonic()
        self._plotted_at = -math.inf

    # the split that the best epoch is chosen on
    @property
    def choice(self) -> str:
        """ "val" where images are held out, else "test"."""
        return "val" if self.recipe.val_split else "test"

    def state(self) -> dict[str, Any]:
        """Everything that going on exactly needs, as plain types and tensors."""
        sums = distributed.sum_over_ranks(self.sums.values).tolist()
        self._count_time()
        return {
            "kind": "last",
            "name": self.files.name,
            "recipe": self.recipe.to_dict(),
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "learning_rate": self.learning_rate,
            "sums": sums,
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scheduler": ckpt.plain(self.step.scheduler.state_dict()),
            "random": ckpt.random_state(),
            "history": self.history,
            "best": self.best,
            "elapsed_s": self.elapsed_s,
            "versions": ckpt.versions(),
            **self.extra,
        }

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Go on from `state`.

        Raises:
            RunError: the state does not fit this network, or lacks an entry.
        """
        ckpt.load_weights(self.model, state.get("model"), source)
        try:
            self.step.optimizer.load_state_dict(state["optimizer"])
            self.step.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.batches_done = state["epoch"], state["batches_done"]
            self.learning_rate = state["learning_rate"]
            if distributed.is_main():  # the stored sums are those of all processes
                self.sums.restore(state["sums"])
            self.history, self.best = state["history"], state["best"]
            self.elapsed_s = state["elapsed_s"]
            ckpt.restore_random_state(state["random"])
        except (KeyError, ValueError, TypeError) as error:
            raise RunError(f"{source} is no state to resume from: {error!r}") from None

    def save(self) -> None:
        """Write the state to resume from, keeping the one before it; on the main process alone."""
        state = self.state()
        self._saved_at = time.monotonic()
        if not distributed.is_main():
            return
        if self.files.last.exists():
            os.replace(self.files.last, self.files.previous)
        ckpt.save_checkpoint(self.files.last, state)

    def begin_epoch(self) -> None:
        """Note the epoch's learning rate: that of its first batch, also where the epoch is gone on with."""
        if self.batches_done == 0:
            self.learning_rate = self.step.optimizer.param_groups[0]["lr"]

    def after_train_batch(self, number: int) -> None:
        """Between two batches of training: save when it is time, stop when asked to.

        Raises:
            Interrupted: after the state is saved.
        """
        self.batches_done = number
        self.after_batch(number)
        due = time.monotonic() - self._saved_at > self.checkpoint_every_s
        if distributed.world_size() > 1:
            # each process reads its own clock; they must agree, since saving sums over all of them
            due = number % AGREE_EVERY == 0 and distributed.any_rank(due, self.step.device)
        if due:
            self._check_then_save()

    def after_batch(self, number: int) -> None:
        """Between two batches of training or testing: stop when asked to, with the state saved.

        Raises:
            Interrupted: after the state is saved.
        """
        asked = self.interrupts.signal_number is not None
        if distributed.world_size() > 1:
            often = 1 if self.step.device.type == "cpu" else AGREE_EVERY
            asked = number % often == 0 and distributed.any_rank(asked, self.step.device)
        if asked:
            self._check_then_save()
            LOG.info(f"Stopped in epoch {self.epoch}. Go on with: {self.resume_command}")
            raise Interrupted

    def _check_then_save(self) -> None:
        """Save unless the state is spoilt by a NaN that the loop has not seen yet."""
        finite = all(bool(torch.isfinite(value).all()) for value in self.model.parameters())
        if finite and int(self.sums.bad_batch.item()) == Sums.NONE:
            self.save()

    def finish_epoch(self, train: Metrics, chosen_on: Metrics) -> None:
        """Add the epoch's row to the history and write everything that stands after an epoch."""
        row = {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "train_loss": train.loss,
            "train_acc_percent": train.accuracy_percent,
            f"{self.choice}_loss": chosen_on.loss,
            f"{self.choice}_acc_percent": chosen_on.accuracy_percent,
        }
        self.history.append(row)
        is_best = chosen_on.accuracy_percent > self.best["accuracy_percent"]
        if is_best:
            weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            accuracy = chosen_on.accuracy_percent
            self.best = {"epoch": self.epoch, "accuracy_percent": accuracy, "model": weights}
        LOG.info(self._epoch_line(row, is_best))
        self.epoch, self.batches_done = self.epoch + 1, 0
        self.sums = Sums(self.step.device)
        if distributed.is_main():
            self.write_history()
            if is_best:
                ckpt.save_checkpoint(self.files.best, self.weights_state("best"))
        self.save()  # last: a kill before it repeats the epoch, with the same result

    def _epoch_line(self, row: dict[str, Any], is_best: bool) -> str:
        """The epoch in the reference's form, with marks for the target and a new best."""
        choice, label = self.choice, self.choice.capitalize()
        accuracy = row[f"{choice}_acc_percent"]
        line = (
            f"Epoch [{self.epoch}/{self.recipe.epochs}] - "
            f"Train Loss: {row['train_loss']:.4f}, Train Acc: {row['train_acc_percent']:.2f}% - "
            f"{label} Loss: {row[f'{choice}_loss']:.4f}, {label} Acc: {accuracy:.2f}%"
        )
        target = self.recipe.target_accuracy
        earlier = [past[f"{choice}_acc_percent"] for past in self.history[:-1]]
        if accuracy >= target and all(past < target for past in earlier):
            line += f" [target {target:g}% reached]"
        if is_best:
            line += " [best]"
        return line + (" (synthetic data)" if self.recipe.dataset == "synthetic" else "")

    def write_history(self, final: bool = False) -> None:
        """Write the history as CSV and, when it is time or `final`, as plots."""
        if not self.history:
            return
        atomic_write_text(self.files.path("_history.csv"), history_csv(self.history))
        if final or time.monotonic() - self._plotted_at > PLOT_EVERY_S:
            plot_history(
                self.history,
                self.files.path("_training_plots.png"),
                milestones=self.recipe.milestone_epochs,
                title=f"{self.recipe.model} on {self.recipe.data_note}",
                target_accuracy=self.recipe.target_accuracy,
                best_epoch=self.best["epoch"] or None,
            )
            self._plotted_at = time.monotonic()

    def weights_state(self, kind: str) -> dict[str, Any]:
        """The best epoch's weights with all that using them needs."""
        return {
            "kind": kind,
            "name": self.files.name,
            "recipe": self.recipe.to_dict(),
            "epoch": self.best["epoch"],
            "accuracy_percent": self.best["accuracy_percent"],
            "chosen_on": self.choice,
            "model": self.best["model"],
            "history": self.history,
            "versions": ckpt.versions(),
            **self.extra,
        }

    def finish(self, final_test: dict[str, Metrics] | None = None) -> None:
        """Write the results file and the last plots, at the end of the last epoch."""
        self._count_time()
        if not distributed.is_main():
            return
        self.write_history(final=True)
        tests = {
            key: {"loss": m.loss, "accuracy_percent": m.accuracy_percent, "images": m.images}
            for key, m in (final_test or {}).items()
        }
        results = self.weights_state("results") | {"elapsed_s": self.elapsed_s, "final_test": tests}
        ckpt.save_checkpoint(self.files.results, results)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.elapsed_s += now - self._clock
        self._clock = now


def history_csv(rows: list[dict[str, Any]]) -> str:
    """The history as CSV: losses with 6 decimals, percentages with 4, rates with 8 significant digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([_cell(key, value) for key, value in row.items()])
    return out.getvalue()


def _cell(key: str, value: Any) -> str:
    if key == "epoch":
        return str(value)
    if key == "learning_rate":
        return f"{value:.8g}"
    return f"{value:.4f}" if key.endswith("_percent") else f"{value:.6f}"
