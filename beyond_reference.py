"""What train.py does only for recipes beyond the reference's: test averaged weights, load a teacher."""

from pathlib import Path

import torch
from torch import nn

from cifar.dataset import ImageData, Split
from core import distributed
from core.errors import RunError, UsageError
from training.engine import Metrics, evaluate
from training.recipe import Recipe
from training.run import Run
from training.run_files import RunFiles
from training.trained import load_model
from utils import make_test_batches

# Images, of the training set, that SWA's BatchNorm statistics are measured on after each epoch.
STATISTICS_IMAGES = 5000


def test_average(run: Run, chosen_on: list[tuple]) -> Metrics | None:
    """The figures of the averaged weights on the same images; None where no average is kept."""
    if run.averaging is None:
        return None
    run.averaging.refresh()
    # Each rank has averaged BatchNorm statistics of its own; rank 0's are the ones in the checkpoints.
    distributed.broadcast_buffers(run.averaging.network)
    return evaluate(
        run.averaging.network,
        chosen_on,
        precision=run.recipe.precision,
        title="test of averaged weights",
        after_batch=run.after_test_batch,
    )


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
        raise RunError(f"--teacher {recipe.teacher} knows other classes than {data.name} has")
    return teacher.model


def bn_update_batches(split: Split, recipe: Recipe, device: torch.device) -> list[tuple]:
    """The images that SWA's BatchNorm statistics are measured on: the same on every process, unaugmented."""
    if recipe.swa_start is None:
        return []
    few = Split(split.images[:STATISTICS_IMAGES], split.labels[:STATISTICS_IMAGES])
    return make_test_batches(few, recipe.batch_size, device)
