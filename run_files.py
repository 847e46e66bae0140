"""The files of a run: their names, whether they are taken, and which state a run goes on from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint as ckpt
from cli import LOG
from errors import RunError
from files import atomic_write_text


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
        if not self.last.exists():  # killed between the two moves of a save
            LOG.warning(f"{self.last} is missing. Going on from the checkpoint before it, {self.previous}")
            return ckpt.load_checkpoint(self.previous)
        try:
            return ckpt.load_checkpoint(self.last)
        except RunError as error:
            if not self.previous.exists():
                raise
            state = ckpt.load_checkpoint(self.previous)
            # out of the way, so that the next save does not put it in the good one's place
            damaged = self.path("_last.damaged.pth")
            os.replace(self.last, damaged)
            LOG.warning(f"{error}. It is now {damaged}; going on from the one before it, {self.previous}")
            return state
