"""A small run and its evaluation, for tests of the metrics and of the report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evaluate
from cifar import dataset
from cifar.dataset import balanced_subset, load_dataset
from core.cli import Interrupts
from helpers.tiny_cifar import install_tiny_cifar, tiny_split
from inspection.report import Evaluation, write_report
from model import build_model
from training import checkpoint
from training.engine import Metrics, TrainStep
from training.engine import evaluate as engine_evaluate
from training.recipe import Recipe
from training.run import Run, RunFiles
from utils import make_test_batches

NAMES = {
    "fine_label_names": [f"class_{label} & <co>" for label in range(100)],
    "coarse_label_names": [f"group_{group}" for group in range(20)],
}


def teach(model: nn.Module, data: dataset.ImageData) -> None:
    """Fit the last layer to half of the test images, so that some answers are right and some are not."""
    (images, labels), *_ = make_test_batches(data.test, 1000, "cpu")
    features = {}
    hook = model.fc.register_forward_hook(lambda _m, inputs, _o: features.update(x=inputs[0]))
    with torch.no_grad():
        model.eval()(images)
        hook.remove()
        x = torch.cat([features["x"], torch.ones(len(labels), 1)], dim=1)[::2].double()
        wanted = nn.functional.one_hot(labels[::2], 100).double() * 8
        weights = torch.linalg.lstsq(x.T @ x + 1e-6 * torch.eye(x.shape[1]), x.T @ wanted).solution
        model.fc.weight.copy_(weights[:-1].T)
        model.fc.bias.copy_(weights[-1])


def make_run(folder: Path, data: dataset.ImageData, recipe: Recipe, name: str) -> Run:
    """A run of one epoch, without training: the test metrics of its history are the engine's."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model).to(memory_format=torch.channels_last)
    teach(model, data)
    optimizer = recipe.build_optimizer(model)
    step = TrainStep(model, recipe.build_criterion(), optimizer, recipe.build_scheduler(optimizer, 1))
    extra = {"classes": list(data.classes), "superclasses": list(data.superclasses)}
    extra["superclass_of"] = data.superclass_of.tolist()
    files = RunFiles(folder, name)
    options = {"batches_per_epoch": 1, "interrupts": Interrupts(), "resume_command": ""}
    run = Run(files, recipe, step, **options, extra=extra)
    split = balanced_subset(data.test, recipe.limit_test, recipe.seed) if recipe.limit_test else data.test
    batches = make_test_batches(split, recipe.test_batch_size, "cpu")
    run.finish_epoch(Metrics(4.6, 1.0, 200), engine_evaluate(model, batches, precision=recipe.precision))
    return run


@dataclass(frozen=True)
class Evaluated:
    """A small run, and what evaluate.py made of it: the JSON, the page, and what that shows."""

    folder: Path
    data_dir: Path
    flags: list[str]
    run: Run
    metrics: dict[str, Any]
    page: Path
    evaluation: Evaluation


def evaluate_small_run(patch: pytest.MonkeyPatch, folder: Path, data_dir: Path) -> Evaluated:
    """Make the run in `folder` on a look-alike CIFAR-100 in `data_dir`, and evaluate it."""
    contents = {"train": tiny_split(1, seed=1), "test": tiny_split(2, seed=2), "meta": NAMES}
    install_tiny_cifar(patch, contents).lay(data_dir)
    data = load_dataset("cifar100", data_dir)
    recipe = Recipe(model="resnet20", epochs=2, limit_test=150, test_batch_size=64, seed=3)
    run = make_run(folder, data, recipe, "small")
    # the run is on part of the images, which the included weights come before
    patch.setattr(checkpoint, "PRETRAINED_FOLDER", folder / "none")
    shown = []
    with pytest.MonkeyPatch.context() as spy:
        spy.setattr(evaluate, "write_report", lambda *args: shown.append(args[0]) or write_report(*args))
        flags = ["--data-dir", str(data_dir), "--output-dir", str(folder), "--device", "cpu"]
        assert evaluate.main([*flags, "--tta", "--json", str(folder / "metrics.json")]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    return Evaluated(folder, data_dir, flags, run, metrics, folder / "small_report.html", shown[0])
