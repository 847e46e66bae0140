"""A training run on disk: its files, its state from batch to batch, and what it says at the end."""

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import distributed
from core.cli import LOG, Interrupts
from core.errors import RunError
from core.files import atomic_write_text
from inspection.curves import plot_history
from training import checkpoint as ckpt
from training.engine import Metrics, RunningTotals, TrainStep
from training.recipe import Recipe
from training.run_files import RunFiles

# On a GPU an epoch takes seconds: the plots are then drawn at most this often, and always at the end.
PLOT_EVERY_S = 5.0
# How often several processes on GPUs agree on an interrupt; each time waits for the device.
AGREE_EVERY = 20


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
        self.averaging = step.techniques.averaging
        self.batches_per_epoch = batches_per_epoch
        self.interrupts = interrupts
        self.resume_command = resume_command
        self.checkpoint_every_s = checkpoint_every_s
        self.extra = extra or {}
        self.epoch, self.batches_done = 1, 0
        self.learning_rate = recipe.lr
        self.sums = RunningTotals(step.device)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy_percent": -math.inf, "model": {}}
        self.elapsed_s = 0.0
        self._clock = self._saved_at = time.monotonic()
        self._plotted_at = -math.inf

    # the split that the best epoch is chosen on
    @property
    def selection_split(self) -> str:
        """ "val" where images are held out, else "test"."""
        return "val" if self.recipe.val_split else "test"

    @property
    def eval_model(self) -> nn.Module:
        """The network whose weights the run leaves: the averaged one where there is one."""
        return self.averaging.network if self.averaging else self.model

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
            **({"average": self.averaging.state()} if self.averaging else {}),
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
            self._check_momentum()
            self.step.scheduler.load_state_dict(state["scheduler"])
            if self.averaging:
                self.averaging.restore(state["average"], source)
            self.epoch, self.batches_done = int(state["epoch"]), int(state["batches_done"])
            self.learning_rate = float(state["learning_rate"])
            if distributed.is_main():  # the stored sums are those of all processes
                self.sums.restore(state["sums"])
            self.history = [dict(row) for row in state["history"]]
            self.best = {key: state["best"][key] for key in ("epoch", "accuracy_percent", "model")}
            self.elapsed_s = float(state["elapsed_s"])
            if len(self.history) != self.epoch - 1 or not 0 <= self.batches_done <= self.batches_per_epoch:
                raise ValueError("its history, epoch and batch do not fit together")
            ckpt.restore_random_state(state["random"])
        except (KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            raise RunError(f"{source} is no state to resume from: {error!r}"[:300]) from None

    def _check_momentum(self) -> None:
        """Refuse momentum of another shape than its weight, which SGD would only stumble over later."""
        for weight, values in self.step.optimizer.state.items():
            buffer = values.get("momentum_buffer")
            if buffer is not None and buffer.shape != weight.shape:
                raise ValueError("a momentum buffer is of another shape than its weight")

    def save(self) -> None:
        """Write the state to resume from, keeping the one before it; on the main process alone."""
        state = self.state()
        self._saved_at = time.monotonic()
        if distributed.is_main():
            ckpt.save_checkpoint(self.files.last, state, keep=self.files.previous)

    def begin_epoch(self) -> None:
        """Note the epoch's learning rate: that of its first batch, also where the epoch is gone on with."""
        if self.batches_done == 0:
            self.learning_rate = self.step.optimizer.param_groups[0]["lr"]

    def after_train_batch(self, number: int) -> None:
        """Between two batches of training: save when it is time; stop, with the state saved, when asked to.

        Several processes must agree on both, since saving sums over all of them: they do so after the same
        batches, on GPUs after every AGREE_EVERY-th only.

        Raises:
            Interrupted: after the state is saved.
        """
        self.batches_done = number
        asked = self.interrupts.signal_number is not None
        due = time.monotonic() - self._saved_at > self.checkpoint_every_s
        if distributed.world_size() > 1:
            if self.step.device.type != "cpu" and number % AGREE_EVERY:
                return
            asked, due = distributed.any_rank(self.step.device, asked, due)
        if asked:
            self._stop()
        if due:
            self._check_then_save()

    def after_test_batch(self, number: int) -> None:
        """Between two batches of testing: stop, with the state saved, when asked to.

        Several processes test shares of unequal length and cannot agree here; they stop in the next epoch.

        Raises:
            Interrupted: after the state is saved.
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
        LOG.info(f"Stopped {where}. Go on with: {self.resume_command}")
        raise Interrupted

    def _check_then_save(self) -> None:
        """Save unless the state is spoilt by a NaN that the loop has not seen yet."""
        finite = all(bool(torch.isfinite(value).all()) for value in self.model.parameters())
        if finite and int(self.sums.bad_batch.item()) == RunningTotals.NO_BAD_BATCH:
            self.save()

    def finish_epoch(self, train: Metrics, chosen_on: Metrics, averaged: Metrics | None = None) -> None:
        """Add the epoch's row to the history and write everything that stands after an epoch.

        Args:
            chosen_on: the network's figures on the split that the best epoch is chosen on.
            averaged: likewise the averaged weights', which then are what is chosen and kept.
        """
        row = {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "train_loss": train.loss,
            "train_acc_percent": train.accuracy_percent,
            f"{self.selection_split}_loss": chosen_on.loss,
            f"{self.selection_split}_acc_percent": chosen_on.accuracy_percent,
        }
        if averaged is not None:
            row[f"ema_{self.selection_split}_loss"] = averaged.loss
            row[f"ema_{self.selection_split}_acc_percent"] = averaged.accuracy_percent
        self.history.append(row)
        accuracy = row[f"{self.recipe.selection_metric}_acc_percent"]
        is_best = accuracy > self.best["accuracy_percent"]
        if is_best:
            weights = {k: v.detach().cpu().clone() for k, v in self.eval_model.state_dict().items()}
            self.best = {"epoch": self.epoch, "accuracy_percent": accuracy, "model": weights}
        LOG.info(self._epoch_line(row, is_best))
        self.epoch, self.batches_done = self.epoch + 1, 0
        self.sums = RunningTotals(self.step.device)
        if distributed.is_main():
            self.write_history()
            if is_best:
                ckpt.save_checkpoint(self.files.best, self.weights_state("best"))
        self.save()  # last: a kill before it repeats the epoch, with the same result

    def _epoch_line(self, row: dict[str, Any], is_best: bool) -> str:
        """The epoch in the reference's form, with marks for the target and a new best."""
        choice, label = self.selection_split, self.selection_split.capitalize()
        accuracy = row[f"{choice}_acc_percent"]
        line = (
            f"Epoch [{self.epoch}/{self.recipe.epochs}] - "
            f"Train Loss: {row['train_loss']:.4f}, Train Acc: {row['train_acc_percent']:.2f}% - "
            f"{label} Loss: {row[f'{choice}_loss']:.4f}, {label} Acc: {accuracy:.2f}%"
        )
        target, column = self.recipe.target_accuracy, f"{self.recipe.selection_metric}_acc_percent"
        if self.averaging:
            accuracy = row[column]
            line += f", Averaged weights: {accuracy:.2f}%"
        earlier = [past[column] for past in self.history[:-1]]
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
            "chosen_on": self.selection_split,
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
