"""Which weights are taken where none are named."""

from pathlib import Path

import pytest

from core.errors import UsageError
from training import trained
from training.checkpoint import save_checkpoint
from training.recipe import Recipe


@pytest.fixture(autouse=True)
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the carried weights: empty at first."""
    path = tmp_path / "carried.pth"
    monkeypatch.setattr(trained, "CARRIED_WEIGHTS", path)
    return path


def lay(folder: Path, name: str, accuracy: float, **choices: object) -> Path:
    path = folder / f"{name}_best.pth"
    save_checkpoint(path, {"recipe": Recipe(**choices).to_dict(), "accuracy_percent": accuracy})
    return path


def test_the_best_run_on_all_images_comes_first(tmp_path: Path, carried: Path) -> None:
    carried.touch()
    lay(tmp_path, "good", 60.0)
    best = lay(tmp_path, "better", 70.0)
    lay(tmp_path, "lucky", 90.0, limit_test=100)
    lay(tmp_path, "easy", 95.0, limit_train=1000)
    lay(tmp_path, "drawn", 99.0, dataset="synthetic")
    (tmp_path / "broken_best.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    assert trained.find_weights(tmp_path) == best


def test_runs_on_part_of_the_images_come_after_the_carried_weights(tmp_path: Path, carried: Path) -> None:
    part = lay(tmp_path, "part", 90.0, limit_train=1000)
    assert trained.find_weights(tmp_path) == part
    carried.touch()
    assert trained.find_weights(tmp_path) == carried


def test_synthetic_runs_are_never_taken_unasked(tmp_path: Path) -> None:
    lay(tmp_path, "drawn", 99.0, dataset="synthetic")
    with pytest.raises(UsageError, match="train first, or pass --weights"):
        trained.find_weights(tmp_path)
