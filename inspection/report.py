"""The report of an evaluation: its figures as PNG files, and one HTML page with everything in it.

The page's text and look are in report.html.j2; it embeds its figures and loads nothing from elsewhere.
"""

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np
import torch

from cifar.dataset import ImageData, Split
from core.files import atomic_write, atomic_write_text
from core.machine import device_name, precision_name, versions
from inspection import metrics
from inspection.curves import history_figure
from inspection.eda_plots import tile_figure
from inspection.evaluation_plots import confusion_figure, per_class_bars_figure, reliability_figure
from inspection.inference import VIEWS
from inspection.metrics import ConfusedPair, Scores
from inspection.style import png_bytes
from model import count_parameters
from training.checkpoint import LoadedModel
from training.history import history_rows, weights_epoch

PAIRS = 25  # confused pairs in the table
WORST, WORST_COLUMNS = 24, 8  # confidently wrong images, and how many of them in a row


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """A network's predictions for N test images of K classes, and how they were made.

    `name` begins the names of the report's files; `split` holds the images, `logits` is float32 [N, K];
    `averaged` holds the metrics averaged over VIEWS, or None.
    """

    name: str
    trained: LoadedModel
    data: ImageData
    split: Split
    device: torch.device
    precision: str
    batch_size: int
    images_per_s: float
    logits: np.ndarray
    scores: Scores
    averaged: Scores | None

    @property
    def subject(self) -> str:
        """The network and its weights, in a few words."""
        if not self.trained.state:  # weights of unknown training
            return self.trained.recipe.model
        epoch = weights_epoch(self.trained.state)
        which = "weights within an epoch" if epoch is None else f"epoch {epoch}"
        return f"{self.trained.recipe.model}, {which}"

    @property
    def synthetic(self) -> bool:
        """Whether the images are not those of CIFAR-100."""
        return self.data.name == "synthetic"

    @property
    def data_note(self) -> str:
        """The images in words, which name synthetic data as such, and a subset."""
        count, total = len(self.split), len(self.data.test)
        which = "all" if count == total else f"a balanced subset of {count:,} of the"
        name = "the synthetic data (not CIFAR-100)" if self.synthetic else "CIFAR-100"
        return f"{which} {total:,} test images of {name}"

    @property
    def setting_note(self) -> str:
        """Device, precision and batch size in words."""
        precision = precision_name(self.precision, self.device)
        return f"{device_name(self.device)}, {precision}, batches of {self.batch_size:,}"

    @cached_property
    def predictions(self) -> np.ndarray:
        """int64 [N]: the class of the largest logit."""
        return self.logits.argmax(axis=1)

    @cached_property
    def matrix(self) -> np.ndarray:
        """int64 [K, K]: images by true and predicted class."""
        return metrics.confusion_matrix(self.split.labels, self.predictions, len(self.data.classes))

    @cached_property
    def superclass_matrix(self) -> np.ndarray:
        """int64 [S, S]: images by true and predicted superclass."""
        return metrics.superclass_matrix(self.matrix, self.data.superclass_of, len(self.data.superclasses))

    @cached_property
    def worst(self) -> np.ndarray:
        """int64 [<= WORST]: the indices of the most confident wrong predictions."""
        return metrics.confidently_wrong(self.logits, self.split.labels, WORST)


def score_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """(metric, value) with units, ready to print; a third column where there is an average over views."""
    columns = [
        (
            f"{scores.top1_percent:.2f} %",
            f"{scores.top5_percent:.2f} %",
            f"{scores.superclass_percent:.2f} %",
            f"{scores.loss:.4f} nats",
            f"{100 * scores.calibration.ece:.2f} %",
        )
        for scores in (evaluation.scores, evaluation.averaged)
        if scores
    ]
    names = ("Top-1 accuracy", "Top-5 accuracy", "Superclass accuracy", "Loss", "Calibration error")
    return list(zip(names, *columns, strict=True))


def confused_pairs(evaluation: Evaluation, count: int = PAIRS) -> list[tuple[str, str, ConfusedPair]]:
    """(class, class, counts) of the pairs of classes confused most often."""
    names = evaluation.data.classes
    return [(names[p.first], names[p.second], p) for p in metrics.most_confused(evaluation.matrix, count)]


def write_report(evaluation: Evaluation, comparison: str, folder: Path) -> Path:
    """Write NAME_*.png and NAME_report.html to `folder`; return the page's path.

    Args:
        comparison: a sentence for the page: how these metrics compare with those of the training run.

    Raises:
        RunError: a file cannot be written.
    """
    figures = draw_figures(evaluation)
    for key, png in figures.items():
        with atomic_write(folder / f"{evaluation.name}_{key}.png") as file:
            file.write(png)
    recipe, history = evaluation.trained.recipe, history_rows(evaluation.trained.state)
    if history:  # on the page only: the run has left its own plots
        title = f"Training: {recipe.model} on {recipe.data_note}"
        figure = history_figure(history, milestones=recipe.milestone_epochs, title=title)
        figures["history"] = png_bytes(figure)
    path = folder / f"{evaluation.name}_report.html"
    atomic_write_text(path, render_page(evaluation, comparison, figures))
    return path


def draw_figures(evaluation: Evaluation) -> dict[str, bytes]:
    """PNG files by the end of their name; "confidently_wrong" is absent if no prediction is wrong."""
    title = f"{evaluation.subject}, {evaluation.data_note}"
    data, matrix = evaluation.data, evaluation.matrix
    order, starts = metrics.superclass_order(data.superclass_of)
    groups = [data.superclasses[data.superclass_of[order[start]]] for start in starts]
    by_group = matrix[np.ix_(order, order)]
    figures = {
        "reliability": reliability_figure(evaluation.scores.calibration, f"Reliability: {title}"),
        "confusion_superclasses": confusion_figure(
            evaluation.superclass_matrix, data.superclasses, None, f"Superclasses: {title}"
        ),
        "f1": per_class_bars_figure(data.classes, metrics.per_class(matrix).f1, "F1 (%)", f"F1: {title}"),
        "confusion": confusion_figure(by_group, groups, starts, f"Classes by superclass: {title}"),
    }
    if count := len(evaluation.worst):
        columns = min(WORST_COLUMNS, count)
        missing = -count % columns
        tiles = np.pad(
            evaluation.split.images[evaluation.worst],
            ((0, missing), (0, 0), (0, 0), (0, 0)),
            constant_values=255,
        )
        captions = ["\n".join(row) for row in mistake_rows(evaluation)] + [""] * missing
        figures["confidently_wrong"] = tile_figure(
            tiles.reshape(-1, columns, *tiles.shape[1:]),
            f"Confidently wrong: {title}",
            captions=np.reshape(captions, (-1, columns)).tolist(),
            scale=4,
        )
    return {key: png_bytes(figure) for key, figure in figures.items()}


def mistake_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """("true: apple", "predicted: pear", "99.9 %") of the most confident wrong predictions."""
    worst, names = evaluation.worst, evaluation.data.classes
    confidence = 100 * np.exp(metrics.log_softmax(evaluation.logits[worst]).max(axis=1))
    labels = zip(evaluation.split.labels[worst], evaluation.predictions[worst], confidence, strict=True)
    return [(f"true: {names[t]}", f"predicted: {names[p]}", f"{percent:.1f} %") for t, p, percent in labels]


def render_page(evaluation: Evaluation, comparison: str, figures: dict[str, bytes]) -> str:
    """The page's HTML; all text is escaped, so that no name can become markup.

    Args:
        figures: PNG files under the keys of `draw_figures`, and "history" if there is one.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **strict)
    bins = evaluation.scores.calibration
    # The size is in a PNG's header: the browser keeps room for a picture before it is decoded.
    embedded = {
        key: (*struct.unpack(">II", png[16:24]), base64.b64encode(png).decode("ascii"))
        for key, png in figures.items()
    }
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        scores=evaluation.scores,
        comparison=comparison,
        figures=embedded,
        views=len(VIEWS),
        score_rows=score_rows(evaluation),
        superclass_rows=_rows_by_f1(evaluation.data.superclasses, evaluation.superclass_matrix),
        class_rows=_class_rows(evaluation),
        pair_rows=[
            (a, b, pair.total, pair.first_as_second, pair.second_as_first)
            for a, b, pair in confused_pairs(evaluation)
        ],
        mistakes=[", ".join(row) for row in mistake_rows(evaluation)],
        confidence=100 * np.nansum(bins.confidence * bins.counts) / bins.counts.sum(),
        bin_rows=[
            (f"{low:.3f} to {high:.3f}", count, 100 * accuracy, 100 * confidence)
            for (low, high), count, accuracy, confidence in zip(
                pairwise(bins.edges), bins.counts, bins.accuracy, bins.confidence, strict=True
            )
        ],
        setup=_setup_rows(evaluation),
        epochs=len(history_rows(evaluation.trained.state)),
    )


def _rows_by_f1(names: Sequence[str], matrix: np.ndarray, *more: Sequence[str]) -> list[tuple]:
    """(name, F1, precision, recall, images, and a cell of each column of `more`), best F1 first."""
    scores = metrics.per_class(matrix)
    columns = names, scores.f1, scores.precision, scores.recall, scores.images, *more
    return [tuple(column[i] for column in columns) for i in np.argsort(-scores.f1, kind="stable")]


def _class_rows(evaluation: Evaluation) -> list[tuple]:
    """`_rows_by_f1` of the classes, with what each is most often predicted as, and its superclass."""
    data, mistakes = evaluation.data, evaluation.matrix.copy()
    np.fill_diagonal(mistakes, 0)
    rivals = [f"{data.classes[row.argmax()]} ({row.max()})" if row.any() else "" for row in mistakes]
    groups = [data.superclasses[group] for group in data.superclass_of]
    return _rows_by_f1(data.classes, evaluation.matrix, rivals, groups)


def _setup_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(what, value) pairs that say how the metrics were measured."""
    trained, recipe = evaluation.trained, evaluation.trained.recipe
    rows = [
        ("Weights", trained.path.name),
        ("Network", f"{recipe.model}, {count_parameters(trained.model):,} parameters"),
    ]
    if trained.trained_on:
        schedule = f"{recipe.epochs} epochs of SGD, batch {recipe.batch_size}, {recipe.schedule_note}"
        images = f"{trained.trained_on}, {recipe.augment} augmentation, seed {recipe.seed}"
        rows += [("Training", schedule), ("Training data", images)]
    rows += [
        ("Test data", evaluation.data_note),
        ("Test", evaluation.setting_note),
        ("Throughput", f"{evaluation.images_per_s:,.0f} images/s, without loading"),
    ]
    if evaluation.averaged:
        views = f"{len(VIEWS)}: shifted by a pixel in four directions or not, mirrored or not; equal weights"
        rows.append(("Views", views))
    return rows + list(versions().items())
