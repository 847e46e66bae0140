"""The files of a run: their names, whether they are taken, and which state a run goes on from."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.cli import LOG
from core.errors import RunError
from core.files import atomic_write, atomic_write_text
from training import checkpoint as ckpt

DEFAULT_NAME = "CNN_Model"
# A run keeps about this many times the bytes of its network's weights: the last state, the one before it and
# the temporary file of the next one, of three each (weights, momentum, best weights); the best weights; the
# results. The plots and the table come on top.
WEIGHTS_KEPT = 11
OTHER_BYTES = 2 << 20


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
    def damaged(self) -> Path:
        """Where a damaged last state is put aside."""
        return self.path("_last.damaged.pth")

    @property
    def best(self) -> Path:
        """The weights of the best epoch so far."""
        return self.path("_best.pth")

    @property
    def results(self) -> Path:
        """What a finished run leaves: best weights, history, recipe, versions."""
        return self.path("_training_results.pth")

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Every checkpoint that the run may write."""
        return (self.last, self.previous, self.damaged, self.best, self.results)

    @property
    def exists(self) -> bool:
        """Whether a run of this name, finished or not, is here."""
        return any(path.exists() for path in (self.last, self.previous, self.best, self.results))

    @classmethod
    def of_last(cls, path: Path) -> "RunFiles | None":
        """The files of the run whose state `path` is, or None where it is not called NAME_last.pth."""
        name = path.name.removesuffix("_last.pth")
        return None if name == path.name else cls(path.parent, name)

    def next_free(self) -> "RunFiles":
        """These files, or those of NAME-2, NAME-3, ... if a run of the name is here already."""
        files, number = self, 1
        while files.exists:
            number += 1
            files = RunFiles(self.folder, f"{self.name}-{number}")
        return files

    def remove_run(self) -> None:
        """Delete an earlier run's checkpoints, so that nothing of it can be mixed up with the new one."""
        for path in (*self.checkpoints, self.path("_history.csv"), self.path("_training_plots.png")):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"cannot delete {path}: {error.strerror or error}") from None

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

    def check_space(self, weights_bytes: int) -> None:
        """See that the disk takes the run's files, for a network whose weights are that many bytes.

        Raises:
            RunError: it is too full, or a file as large as a checkpoint cannot be written.
        """
        present = (self.last, self.previous, self.best, self.results)
        there = sum(path.stat().st_size for path in present if path.exists())
        needed = WEIGHTS_KEPT * weights_bytes + OTHER_BYTES - there
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise RunError(
                f"the disk of {self.folder} has {free / 1e6:,.1f} MB left, the run needs about "
                f"{needed / 1e6:,.1f}: free some, or pass another --output-dir"
            )
        probe = self.path("_probe")  # quotas and limits on a file's size show only on writing
        with atomic_write(probe) as file:
            file.write(bytes(3 * weights_bytes))
        probe.unlink(missing_ok=True)

    def load_last(self) -> dict[str, Any]:
        """The state to resume from: the last one, or, where that is damaged, the one before it.

        Raises:
            RunError: neither can be used.
        """
        if not self.last.exists() and not self.previous.exists():
            others = sorted(path.name for path in self.folder.glob("*_last.pth"))
            hint = f"; there is {', '.join(others[:5])}: pass --resume FILE" if others else ""
            raise RunError(f"nothing to resume: {self.last} does not exist{hint}")
        if not self.last.exists():  # killed between the two moves of a save
            LOG.warning(f"{self.last} is missing. Going on from the checkpoint before it, {self.previous}")
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
            LOG.warning(f"{error}. Going on from the checkpoint before it, {self.previous}")
            return state

    def put_damaged_aside(self) -> None:
        """Move a damaged last state away, else the next save would put it in the good earlier one's place.

        For the holder of the run's lock alone: another process may be about to replace the file.
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
            LOG.warning(f"The damaged one is now {self.damaged}")
