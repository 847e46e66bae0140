"""Evaluate a trained network on the test images: figures, pictures, and a page to read.

    python evaluate.py                                         the best run in output/
    python evaluate.py --weights output/CNN_Model_best.pth     a certain checkpoint
    python evaluate.py --tta --json figures.json               also averaged over views; figures for programs

By default it tests exactly as the run did: the data, the subset of it, batch size and precision are those
of the checkpoint's recipe, so that the history's figure comes out again.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar.dataset import ImageData, Split, balanced_subset, load_dataset
from core.cli import LOG, run_main, start_log, whole_number
from core.errors import RunError
from core.files import atomic_write_text
from core.machine import choose_device, device_name, precision_name, set_up_torch
from inspection.inference import VIEWS, averaged_log_probabilities, timed_logits
from inspection.metrics import Scores, confusion_matrix, per_class, score
from inspection.report import Evaluation, confused_pairs, score_rows, write_report
from model import count_parameters
from training.checkpoint import versions
from training.engine import Metrics
from training.flags import DEFAULT_NAME, Parser, add_data_folder, add_processor, add_weights, plain_name
from training.recipe import Recipe
from training.recorded import Reproduction, compare, history_rows, weights_epoch
from training.run_files import RunFiles
from training.trained import LoadedModel, find_weights, load_model
from utils import make_test_batches

UNITS = {"top1": "percent", "top5": "percent", "superclass": "percent", "loss": "nats per image"}
UNITS |= {"ece": "fraction, 15 bins", "images_per_s": "without loading"}


def build_parser() -> Parser:
    """The parser of evaluate.py."""
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_weights(parser, "folder for pictures and NAME_report.html")
    images = parser.add_argument_group("test images")
    add_data_folder(images)
    which = images.add_mutually_exclusive_group()
    which.add_argument(
        "--limit-test",
        type=whole_number(1),
        metavar="N",
        help="test on a class-balanced subset of N images (default: those that the run was tested on)",
    )
    which.add_argument("--all-test", action="store_true", help="test on all images, whatever the run did")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--tta",
        action="store_true",
        help=f"also average the probabilities over {len(VIEWS)} views of each image: shifted by a pixel in "
        f"four directions or not, mirrored or not ({len(VIEWS)} times the work)",
    )
    add_processor(how)
    how.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="images a step (default: as the run was tested)",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--name", type=plain_name, help="beginning of the files' names (default: the run's name)"
    )
    results.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser


@dataclass(frozen=True)
class Outcome:
    """One test of a network: its images, how it is made, and what came out.

    `measured` is the engine's result; `scores` and `augmented` (with --tta) are all figures.
    """

    trained: LoadedModel
    data: ImageData
    split: Split
    device: torch.device
    precision: str
    batch_size: int
    measured: Metrics
    logits: np.ndarray
    images_per_s: float
    scores: Scores
    augmented: Scores | None

    @property
    def subject(self) -> str:
        """Which network and weights, in a few words."""
        epoch = weights_epoch(self.trained.state)
        which = "weights within an epoch" if epoch is None else f"epoch {epoch}"
        return f"{self.trained.recipe.model}, {which}"

    @property
    def data_note(self) -> str:
        """Which images, in words that name synthetic data as such, and a subset."""
        count, whole = len(self.split), len(self.data.test)
        of = "all" if count == whole else f"a balanced subset of {count:,} of the"
        return f"{of} {whole:,} test images of {data_name(self.trained.recipe)}"

    @property
    def setting_note(self) -> str:
        """Device, precision and batch size in words."""
        precision = precision_name(self.precision, self.device)
        return f"{device_name(self.device)}, {precision}, batches of {self.batch_size:,}"


def data_name(recipe: Recipe) -> str:
    """The data set in words."""
    return "CIFAR-100" if recipe.dataset == "cifar100" else "the synthetic data (not CIFAR-100)"


def main(argv: list[str] | None = None) -> int:
    """Weights, test, comparison with the run's own figure, results."""
    args = build_parser().parse_args(argv)
    start_log(None)
    device = choose_device(args.device)
    trained = load_model(args.weights or find_weights(args.output_dir), device)
    files = RunFiles(args.output_dir, args.name or run_name(trained))
    files.prepare()
    test = run_test(args, trained, device)
    agreement = compare(
        test.measured,
        trained.state,
        trained.recipe,
        images_of_run=trained.recipe.limit_test or len(test.data.test),
        changes=changes(test),
    )
    evaluation = evaluation_of(test, agreement, files.name)
    say(test, evaluation, agreement)
    if args.json:
        figures = json_figures(test, agreement)
        atomic_write_text(args.json, json.dumps(figures, indent=2, allow_nan=False) + "\n")
        LOG.info(f"Figures: {args.json}")
    LOG.info(f"Report: {write_report(evaluation, args.output_dir)}")
    return 0


def run_name(trained: LoadedModel) -> str:
    """The name of the run in the checkpoint, else, where that is no plain name, that of the file."""
    for name in (trained.state.get("name"), trained.path.stem):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return plain_name(str(name or "?"))
    return DEFAULT_NAME


def run_test(args: argparse.Namespace, trained: LoadedModel, device: torch.device) -> Outcome:
    """One pass over the images that the flags, or else the recipe, ask for; with --tta one more a view.

    Raises:
        RunError: there is no such data, its classes are not the network's, or the weights give NaN.
    """
    recipe = trained.recipe
    set_up_torch(recipe.seed, device, deterministic=False)  # as train.py, so that the kernels are the same
    data = load_dataset(recipe.dataset, args.data_dir, url=args.data_url)
    if data.classes != trained.classes or data.superclass_of.tolist() != list(trained.superclass_of):
        raise RunError(f"{trained.path} was trained on other classes than those of {data_name(recipe)}")
    limit = None if args.all_test else args.limit_test or recipe.limit_test
    split = balanced_subset(data.test, limit, recipe.seed) if limit else data.test
    batch_size, precision = args.batch_size or recipe.test_batch_size, args.precision or recipe.precision
    batches = make_test_batches(split, batch_size, device)

    measured, logits, images_per_s = timed_logits(trained.model, batches, precision=precision)
    scores = score(logits.numpy(), split.labels, data.superclass_of)
    # the engine's own, which the run's history holds: the same up to rounding of the loss
    scores = dataclasses.replace(scores, top1_percent=measured.accuracy_percent, loss=measured.loss)
    augmented = None
    if args.tta:
        averaged = averaged_log_probabilities(trained.model, batches, precision=precision)
        augmented = score(averaged.numpy(), split.labels, data.superclass_of)
    done = measured, logits.numpy(), images_per_s, scores, augmented
    return Outcome(trained, data, split, device, precision, batch_size, *done)


def changes(test: Outcome) -> list[str]:
    """How this test differs from the run's own, as far as flags can tell."""
    recipe = test.trained.recipe
    found = [] if test.precision == recipe.precision else [f"precision {test.precision}"]
    return found + ([] if test.batch_size == recipe.test_batch_size else [f"batches of {test.batch_size:,}"])


def evaluation_of(test: Outcome, agreement: Reproduction, name: str) -> Evaluation:
    """What the report shows."""
    trained, data = test.trained, test.data
    notes = [agreement.text]
    if trained.state.get("chosen_on") == "test":
        notes.append("The epoch was chosen on the test images, which flatters its figures.")
    return Evaluation(
        name=name,
        subject=test.subject,
        data=test.data_note,
        images=test.split.images,
        labels=test.split.labels,
        logits=test.logits,
        classes=data.classes,
        superclasses=data.superclasses,
        superclass_of=data.superclass_of,
        scores=test.scores,
        augmented=test.augmented,
        synthetic=data.name == "synthetic",
        notes=tuple(notes),
        facts=facts_of(test),
        training=f"{trained.recipe.model} on {trained.recipe.data_note}",
        history=tuple(history_rows(trained.state)),
        milestones=trained.recipe.milestone_epochs,
    )


def facts_of(test: Outcome) -> tuple[tuple[str, str], ...]:
    """(what, value) pairs that say how the figures were made."""
    recipe = test.trained.recipe
    limits = f"on {recipe.data_note}, {recipe.augment} augmentation, seed {recipe.seed}"
    facts = [
        ("Weights", test.trained.path.name),
        ("Network", f"{recipe.model}, {count_parameters(test.trained.model):,} parameters"),
        ("LoadedModel", f"{recipe.epochs} epochs of SGD, batch {recipe.batch_size}, {recipe.schedule_note}"),
        ("Training data", limits.removeprefix("on ")),
        ("Tested on", test.data_note),
        ("Test", test.setting_note),
        ("Throughput", f"{test.images_per_s:,.0f} images/s, without loading"),
    ]
    if test.augmented:
        facts.append(
            (
                "Views",
                f"{len(VIEWS)}: shifted by a pixel in 4 directions or not, mirrored or not; equal weights",
            )
        )
    return tuple(facts) + tuple(versions().items())


def say(test: Outcome, evaluation: Evaluation, agreement: Reproduction) -> None:
    """The figures as a small table, the most confused pairs, and whether the run's figure came out."""
    LOG.info(f"{test.trained.path}: {test.subject}, {test.data_note}")
    if test.augmented:
        LOG.info(f"  {'':<20} {'plain':>12} {f'{len(VIEWS)} views':>12}")
    for what, plain, averaged in score_rows(evaluation):
        LOG.info(f"  {what:<20} {plain:>12} {averaged or '':>12}".rstrip())
    LOG.info(
        f"  {'Throughput':<20} {test.images_per_s:>10,.0f} images/s ({test.setting_note}, without loading)"
    )
    pairs = [f"{a} / {b} {pair.total}" for a, b, pair in confused_pairs(evaluation, 5)]
    LOG.info(f"  Most confused: {', '.join(pairs) or 'none'}")
    (LOG.warning if agreement.equal is False else LOG.info)(agreement.text)


def json_figures(test: Outcome, agreement: Reproduction) -> dict[str, Any]:
    """The figures for programs; per class in percent, null where one is not defined."""
    trained, scores = test.trained, test.scores
    per = per_class(confusion_matrix(test.split.labels, test.logits.argmax(axis=1), len(test.data.classes)))
    recorded = agreement.recorded
    return {
        **plain_figures(scores),
        "images": scores.images,
        "images_per_s": test.images_per_s,
        "tta": None if test.augmented is None else plain_figures(test.augmented) | {"views": len(VIEWS)},
        "units": UNITS,
        "dataset": test.data.name,
        "model": trained.recipe.model,
        "weights": str(trained.path),
        "epoch": weights_epoch(trained.state),
        "device": test.device.type,
        "precision": test.precision,
        "batch_size": test.batch_size,
        "recorded": recorded and {"top1": recorded.accuracy_percent, "loss": recorded.loss},
        "equals_recorded": agreement.equal,
        "per_class": {
            name: {"precision": finite(p), "recall": finite(r), "f1": finite(f1), "images": int(n)}
            for name, p, r, f1, n in zip(test.data.classes, *per, strict=True)
        },
    }


def plain_figures(scores: Scores) -> dict[str, float | None]:
    """The five figures under their short names."""
    return {
        "top1": scores.top1_percent,
        "top5": scores.top5_percent,
        "loss": finite(scores.loss),
        "superclass": scores.superclass_percent,
        "ece": scores.calibration.ece,
    }


def finite(value: float) -> float | None:
    """`value` as JSON can hold it: NaN and infinity become None."""
    return float(value) if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(run_main(main, "evaluate.py"))
