"""Evaluate a trained network on the test images: metrics, figures and an HTML report.

    python evaluate.py                                         the best run in output/
    python evaluate.py --weights output/CNN_Model_best.pth     a given checkpoint
    python evaluate.py --tta --json metrics.json               also averaged over views; metrics as JSON
    python evaluate.py --weights A.pth --against B.pth         is A better than B?

By default it tests exactly as the run did: the data, the subset of it, batch size and precision are those
of the checkpoint's recipe, so that the metrics in its history are reproduced. The report's map of shifted
images costs as much as five more passes over the test images.
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
import numpy as np
import torch

from cifar.dataset import ImageData, Split, balanced_choice, load_dataset, near_duplicates
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
from core.errors import RunError, UsageError
from core.files import atomic_write_text, check_output
from core.machine import choose_device, set_up_torch, versions
from inspection.inference import SHIFTS_PX, VIEWS, averaged_log_probabilities, shift_accuracy, timed_logits
from inspection.metrics import Scores, per_class, score
from inspection.report import (
    COMPARISON_COLUMNS,
    Evaluation,
    class_changes,
    comparison_rows,
    confused_pairs,
    detail_rows,
    score_rows,
    write_report,
)
from training.checkpoint import LoadedModel, find_weights, load_model
from training.engine import Metrics
from training.history import LoggedMetrics, find_logged_metrics, weights_epoch
from training.recipe import Recipe
from training.run import RunFiles
from training.settings import DEFAULT_NAME
from utils import make_test_batches

# Rounding differs between devices, precisions and versions, and half precision rounds the weights: of 10,000
# images a few then change their class. In percentage points of top-1.
SAME_WITHIN = 0.1
UNITS = {"top1": "percent", "top5": "percent", "superclass": "percent", "loss": "nats per image"}
UNITS |= {"ece": "fraction, 15 bins", "images_per_s": "without loading"}
UNITS |= {"risk_coverage": "percent", "shifts": "rows moved down, columns right"}


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
    text = "compare with this checkpoint on the same images: paired difference, McNemar's test, classes"
    how.add_argument("--against", type=Path, metavar="FILE", help=text)
    add_processor(how)
    text = "images per batch (default: as the run was tested)"
    how.add_argument("--batch-size", type=whole_number(1), metavar="N", help=text)
    results = parser.add_argument_group("results")
    results.add_argument("--name", type=plain_name, help="start of the file names (default: the run's name)")
    results.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics as JSON")
    return parser


@dataclass(frozen=True)
class Reproduction:
    """Whether the run's own accuracy is reproduced, but for rounding (SAME_WITHIN).

    `equal` is None where there is nothing to compare with.
    """

    text: str
    equal: bool | None
    recorded: LoggedMetrics | None


def load_against(path: Path, device: torch.device, model_name: str | None) -> LoadedModel:
    """The network of --against: a checkpoint of train.py may hold another one than --model names."""
    try:
        return load_model(path, device)
    except RunError:
        if model_name is None:
            raise
        return load_model(path, device, model_name)


def main(argv: list[str] | None = None) -> int:
    """Load the weights, test, compare with the run's own metrics, write the results."""
    args = build_parser().parse_args(argv)
    start_log(None)
    device = choose_device(args.device)
    trained = load_model(args.weights or find_weights(args.output_dir), device, args.model)
    against = load_against(args.against, device, args.model) if args.against else None
    if against and against.path.samefile(trained.path):
        raise UsageError(f"--against {against.path} is the file that is evaluated: name another checkpoint")
    files = RunFiles(args.output_dir, args.name or run_name(trained))
    files.prepare()
    check_output(files.path("_report.html"), [".html"])
    if args.json:
        check_output(args.json, [".json"], [trained.path] + ([against.path] if against else []))
    evaluation = run_test(args, trained, against, device, files.name)
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


def run_test(
    args: argparse.Namespace,
    trained: LoadedModel,
    against: LoadedModel | None,
    device: torch.device,
    name: str,
) -> Evaluation:
    """Test both networks on the images that the flags, or else the recipe of `trained`, name.

    `trained` is tested on shifted images too.

    Raises:
        RunError: there is no such data, its classes are not a network's, or weights give NaN.
    """
    recipe = trained.recipe
    set_up_torch(recipe.seed, device, deterministic=False)  # as train.py, so that the kernels are the same
    data = load_dataset(recipe.dataset, args.data_dir, url=args.data_url)
    for each in filter(None, (trained, against)):
        if data.classes != each.classes or data.superclass_of.tolist() != list(each.superclass_of):
            raise RunError(
                f"{each.path} was trained on other classes ({len(each.classes)}) than those of the test data "
                f"({data.name}, {len(data.classes)})"
            )
    limit = None if args.all_test else args.limit_test or recipe.limit_test
    indices = np.flatnonzero(balanced_choice(data.test, limit or len(data.test), recipe.seed))
    split = Split(data.test.images[indices], data.test.labels[indices])
    evaluation = measure(args, trained, data, split, device, name)
    method = {"batch_size": evaluation.batch_size, "precision": evaluation.precision}
    return dataclasses.replace(
        evaluation,
        shifts=shift_accuracy(trained.model, split, **method),
        near_duplicate=None if evaluation.synthetic else np.isin(indices, near_duplicates()),
        against=against and measure(args, against, data, split, device, name),
    )


def measure(
    args: argparse.Namespace,
    trained: LoadedModel,
    data: ImageData,
    split: Split,
    device: torch.device,
    name: str,
) -> Evaluation:
    """One pass over `split`; with --tta one more per view. The flags come before the network's recipe."""
    recipe = trained.recipe
    batch_size, precision = args.batch_size or recipe.test_batch_size, args.precision or recipe.precision
    batches = make_test_batches(split, batch_size, device)

    measured, logits, images_per_s = timed_logits(trained.model, batches, precision=precision)
    scores = score(logits.numpy(), split.labels, data.superclass_of)
    # the engine's own, as in the run's history: the same up to rounding of the loss
    scores = dataclasses.replace(scores, top1_percent=measured.accuracy_percent, loss=measured.loss)
    averaged_logits = averaged = None
    if args.tta:
        averaged_logits = averaged_log_probabilities(trained.model, batches, precision=precision).numpy()
        averaged = score(averaged_logits, split.labels, data.superclass_of)
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
        averaged_logits=averaged_logits,
        averaged=averaged,
    )


def changed_settings(evaluation: Evaluation) -> list[str]:
    """How this test differs from the run's own, as far as flags can tell."""
    recipe, precision, batch_size = evaluation.trained.recipe, evaluation.precision, evaluation.batch_size
    changes = [] if precision == recipe.precision else [f"precision {precision}"]
    weights = evaluation.trained.state.get("model", {}).values()
    changes += ["weights in half precision"] * any(value.dtype == torch.float16 for value in weights)
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
    points = measured.accuracy_percent - recorded.accuracy_percent
    different = ", ".join(changes) or "device or number of threads"
    if abs(points) <= SAME_WITHIN:
        images = round(abs(points) / 100 * measured.images)
        text = f"Top-1 equals {recorded.where} but for {images} image{'s' * (images != 1)}"
        return Reproduction(f"{text}, as rounding explains. Different here: {different}.", True, recorded)
    text = (
        f"Warning: top-1 is {measured.accuracy_percent:.4f} %, {recorded.where} is "
        f"{recorded.accuracy_percent:.4f} %. Different here: {different}."
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
    for name, text in detail_rows(evaluation):
        LOG.info(f"  {name:<37} {text}")
    pairs = [f"{a} / {b} {pair.total}" for a, b, pair in confused_pairs(evaluation, 5)]
    LOG.info(f"  Most confused: {', '.join(pairs) or 'none'}")
    if evaluation.against:
        print_comparison(evaluation)
    (LOG.warning if reproduction.equal is False else LOG.info)(reproduction.text)


def print_comparison(evaluation: Evaluation) -> None:
    """Both accuracies, their paired difference with its test, and the classes that differ most."""
    other = evaluation.against
    LOG.info(f"A: {evaluation.trained.path}, B: {other.trained.path} ({other.subject}, {other.setting_note})")
    for name, *values in [COMPARISON_COLUMNS, *comparison_rows(evaluation)]:
        LOG.info(f"  {name:<20} " + " ".join(f"{value:>14}" for value in values))
    changes = class_changes(evaluation)
    gains, losses = [row for row in changes if row[3] > 0], [row for row in changes[::-1] if row[3] < 0]
    for name, rows in (("A", gains), ("B", losses)):
        classes = [f"{label} {abs(n)} ({gained} / {lost})" for label, gained, lost, n in rows[:5]]
        LOG.info(f"  {name} is right more often on: {', '.join(classes) or 'no class'}")


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
        **json_details(evaluation),
        "against": evaluation.against and json_comparison(evaluation),
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


def json_details(evaluation: Evaluation) -> dict[str, Any]:
    """Near-duplicates (null for synthetic images), calibration with a temperature, risk, shifted images."""
    near, curve, shifts = evaluation.near_duplicate_rows, evaluation.risk_coverage, evaluation.shifts
    scaled, temperatures = evaluation.cross_fitted
    ece, loss = scaled.calibration.ece, finite(scaled.loss)
    return {
        "near_duplicates": {key: {"images": n, "top1": finite(top1)} for key, n, top1 in near} or None,
        "cross_fitted": {"temperatures": temperatures, "ece": ece, "loss": loss},
        "risk_coverage": {"area": curve.area_percent, "risk_at_coverage": dict(evaluation.risk_rows)},
        "shifts": {"pixels": SHIFTS_PX, "top1": shifts.top1_percent.tolist(), "images": shifts.images},
    }


def json_comparison(evaluation: Evaluation) -> dict[str, Any]:
    """The other network's metrics, and the comparison; only the one that is evaluated has `gained` right."""
    other = evaluation.against
    return {
        "weights": str(other.trained.path),
        "model": other.trained.recipe.model,
        "epoch": weights_epoch(other.trained.state),
        "precision": other.precision,
        **json_scores(other.scores),
        "tta": other.averaged and json_scores(other.averaged),
        "paired": {kind: test._asdict() for kind, *_, test in evaluation.comparisons},
        "per_class": {
            name: {"gained": gained, "lost": lost} for name, gained, lost, _ in class_changes(evaluation)
        },
    }


def finite(value: float) -> float | None:
    """`value` as JSON can hold it: NaN and infinity become None."""
    return float(value) if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(run_main(main, "evaluate.py"))
