"""Evaluate a trained network on the test images: metrics, figures and an HTML report.

    python evaluate.py                                         the best run in output/
    python evaluate.py --weights output/CNN_Model_best.pth     a given checkpoint
    python evaluate.py --tta --json metrics.json               also averaged over views; metrics as JSON

By default it tests exactly as the run did: the data, the subset of it, batch size and precision are those
of the checkpoint's recipe, so that the metrics in its history are reproduced.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core  # noqa: F401 (before torch: it sets up torch's threads)

# isort: split
import torch

from cifar.dataset import balanced_subset, load_dataset
from core.cli import (
    LOG,
    Parser,
    add_data_dir,
    add_processor,
    add_weights,
    plain_name,
    run_main,
    start_log,
    whole_number,
)
from core.errors import RunError
from core.files import atomic_write_text, check_output
from core.machine import choose_device, set_up_torch, versions
from inspection.inference import VIEWS, averaged_log_probabilities, timed_logits
from inspection.metrics import Scores, per_class, score
from inspection.report import Evaluation, confused_pairs, score_rows, write_report
from training.checkpoint import LoadedModel, find_weights, load_model
from training.engine import Metrics
from training.history import LoggedMetrics, find_logged_metrics, weights_epoch
from training.recipe import Recipe
from training.run import RunFiles
from training.settings import DEFAULT_NAME
from utils import make_test_batches

UNITS = {"top1": "percent", "top5": "percent", "superclass": "percent", "loss": "nats per image"}
UNITS |= {"ece": "fraction, 15 bins", "images_per_s": "without loading"}


def build_parser() -> Parser:
    """The parser of evaluate.py."""
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_weights(parser, "folder for figures and NAME_report.html")
    images = parser.add_argument_group("test images")
    add_data_dir(images)
    which = images.add_mutually_exclusive_group()
    text = "test on a class-balanced subset of N images (default: the images the run was tested on)"
    which.add_argument("--limit-test", type=whole_number(1), metavar="N", help=text)
    text = "test on all images, even if the run used a subset"
    which.add_argument("--all-test", action="store_true", help=text)
    how = parser.add_argument_group("method")
    text = f"also average the probabilities over {len(VIEWS)} views of each image: shifted by a pixel in "
    text += f"four directions or not, mirrored or not ({len(VIEWS)} times the work)"
    how.add_argument("--tta", action="store_true", help=text)
    add_processor(how)
    text = "images per batch (default: as the run was tested)"
    how.add_argument("--batch-size", type=whole_number(1), metavar="N", help=text)
    results = parser.add_argument_group("results")
    results.add_argument("--name", type=plain_name, help="start of the file names (default: the run's name)")
    results.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics as JSON")
    return parser


@dataclass(frozen=True)
class Reproduction:
    """Whether the run's own metrics are reproduced: `equal` is None where there is nothing to compare."""

    text: str
    equal: bool | None
    recorded: LoggedMetrics | None


def main(argv: list[str] | None = None) -> int:
    """Load the weights, test, compare with the run's own metrics, write the results."""
    args = build_parser().parse_args(argv)
    start_log(None)
    device = choose_device(args.device)
    trained = load_model(args.weights or find_weights(args.output_dir), device, args.model)
    files = RunFiles(args.output_dir, args.name or run_name(trained))
    files.prepare()
    check_output(files.path("_report.html"), [".html"])
    if args.json:
        check_output(args.json, [".json"], [trained.path])
    evaluation = run_test(args, trained, device, files.name)
    scores, recipe = evaluation.scores, trained.recipe
    reproduction = compare(
        Metrics(scores.loss, scores.top1_percent, scores.images),
        trained.state,
        recipe,
        images_of_run=recipe.limit_test or len(evaluation.data.test),
        changes=changed_settings(evaluation),
    )
    print_metrics(evaluation, reproduction)
    if args.json:
        metrics = json_metrics(evaluation, reproduction)
        atomic_write_text(args.json, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        LOG.info(f"Metrics: {args.json}")
    LOG.info(f"Report: {write_report(evaluation, reproduction.text, args.output_dir)}")
    return 0


def run_name(trained: LoadedModel) -> str:
    """The name of the checkpoint's run; if that is not a plain name, the checkpoint file's."""
    for name in (trained.state.get("name"), trained.path.stem):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return plain_name(str(name or "?"))
    return DEFAULT_NAME


def run_test(args: argparse.Namespace, trained: LoadedModel, device: torch.device, name: str) -> Evaluation:
    """One pass over the images that the flags, or else the recipe, name; with --tta one more per view.

    Raises:
        RunError: there is no such data, its classes are not the network's, or the weights give NaN.
    """
    recipe = trained.recipe
    set_up_torch(recipe.seed, device, deterministic=False)  # as train.py, so that the kernels are the same
    data = load_dataset(recipe.dataset, args.data_dir, url=args.data_url)
    if data.classes != trained.classes or data.superclass_of.tolist() != list(trained.superclass_of):
        message = f"{trained.path} was trained on other classes than those of the test data ({data.name})"
        raise RunError(message)
    limit = None if args.all_test else args.limit_test or recipe.limit_test
    split = balanced_subset(data.test, limit, recipe.seed) if limit else data.test
    batch_size, precision = args.batch_size or recipe.test_batch_size, args.precision or recipe.precision
    batches = make_test_batches(split, batch_size, device)

    measured, logits, images_per_s = timed_logits(trained.model, batches, precision=precision)
    scores = score(logits.numpy(), split.labels, data.superclass_of)
    # the engine's own, as in the run's history: the same up to rounding of the loss
    scores = dataclasses.replace(scores, top1_percent=measured.accuracy_percent, loss=measured.loss)
    averaged = None
    if args.tta:
        mean = averaged_log_probabilities(trained.model, batches, precision=precision)
        averaged = score(mean.numpy(), split.labels, data.superclass_of)
    return Evaluation(
        name=name,
        trained=trained,
        data=data,
        split=split,
        device=device,
        precision=precision,
        batch_size=batch_size,
        images_per_s=images_per_s,
        logits=logits.numpy(),
        scores=scores,
        averaged=averaged,
    )


def changed_settings(evaluation: Evaluation) -> list[str]:
    """How this test differs from the run's own, as far as flags can tell."""
    recipe, precision, batch_size = evaluation.trained.recipe, evaluation.precision, evaluation.batch_size
    changes = [] if precision == recipe.precision else [f"precision {precision}"]
    return changes + ([] if batch_size == recipe.test_batch_size else [f"batches of {batch_size:,}"])


def compare(
    measured: Metrics, state: Mapping[str, Any], recipe: Recipe, *, images_of_run: int, changes: list[str]
) -> Reproduction:
    """Whether `measured` is what the run logged for these weights.

    Args:
        state: the checkpoint.
        images_of_run: the number of test images of the run; on other images there is no comparison.
        changes: how this test differs from the run's ("precision bf16"), for the warning.
    """
    recorded = find_logged_metrics(state)
    if recorded is None:
        why = "its best epoch was chosen on validation images" if recipe.val_split else "none is in the file"
        return Reproduction(f"There is no test metric of these weights to compare with: {why}.", None, None)
    if measured.images != images_of_run:
        text = (
            f"Not compared with {recorded.where} ({recorded.accuracy_percent:.2f} %): that was measured on "
            f"{images_of_run:,} images, this on {measured.images:,}."
        )
        return Reproduction(text, None, recorded)
    if measured.accuracy_percent == recorded.accuracy_percent:
        difference = abs(measured.loss - recorded.loss)
        loss = "so does the loss" if difference == 0 else f"the loss differs by {difference:.1g} nats"
        return Reproduction(f"Top-1 equals {recorded.where} exactly; {loss}.", True, recorded)
    stored, now = state.get("versions"), versions()
    if isinstance(stored, dict):
        changes = changes + [f"{key} {now[key]}" for key in now if stored.get(key, now[key]) != now[key]]
    text = (
        f"Warning: top-1 is {measured.accuracy_percent:.4f} %, {recorded.where} is "
        f"{recorded.accuracy_percent:.4f} %. Different here: "
        f"{', '.join(changes) or 'device or number of threads'}."
    )
    return Reproduction(text, False, recorded)


def print_metrics(evaluation: Evaluation, reproduction: Reproduction) -> None:
    """The metrics as a small table, the pairs confused most often, and the comparison with the run."""
    LOG.info(f"{evaluation.trained.path}: {evaluation.subject}, {evaluation.data_note}")
    if evaluation.averaged:
        LOG.info(f"  {'':<20} {'single view':>12} {f'{len(VIEWS)} views':>12}")
    for metric, *values in score_rows(evaluation):
        LOG.info(f"  {metric:<20} " + " ".join(f"{value:>12}" for value in values))
    LOG.info(
        f"  {'Throughput':<20} {evaluation.images_per_s:>10,.0f} images/s "
        f"({evaluation.setting_note}, without loading)"
    )
    pairs = [f"{a} / {b} {pair.total}" for a, b, pair in confused_pairs(evaluation, 5)]
    LOG.info(f"  Most confused: {', '.join(pairs) or 'none'}")
    (LOG.warning if reproduction.equal is False else LOG.info)(reproduction.text)


def json_metrics(evaluation: Evaluation, reproduction: Reproduction) -> dict[str, Any]:
    """The metrics for programs; per class in percent, null where one is not defined."""
    trained, scores, averaged = evaluation.trained, evaluation.scores, evaluation.averaged
    recorded = reproduction.recorded
    return {
        **json_scores(scores),
        "images": scores.images,
        "images_per_s": evaluation.images_per_s,
        "tta": averaged and json_scores(averaged) | {"views": len(VIEWS)},
        "units": UNITS,
        "dataset": evaluation.data.name,
        "model": trained.recipe.model,
        "weights": str(trained.path),
        "epoch": weights_epoch(trained.state),
        "device": evaluation.device.type,
        "precision": evaluation.precision,
        "batch_size": evaluation.batch_size,
        "recorded": recorded and {"top1": recorded.accuracy_percent, "loss": recorded.loss},
        "equals_recorded": reproduction.equal,
        "per_class": {
            name: {"precision": finite(p), "recall": finite(r), "f1": finite(f1), "images": int(n)}
            for name, p, r, f1, n in zip(evaluation.data.classes, *per_class(evaluation.matrix), strict=True)
        },
    }


def json_scores(scores: Scores) -> dict[str, float | None]:
    """The five metrics under their short names."""
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
