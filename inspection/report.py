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
from inspection.evaluation_plots import (
    confusion_figure,
    per_class_bars_figure,
    reliability_figure,
    risk_coverage_figure,
    shift_figure,
)
from inspection.inference import SHIFTS_PX, VIEWS, ShiftAccuracy
from inspection.metrics import ConfusedPair, PairedTest, RiskCoverage, Scores
from inspection.style import png_bytes
from model import count_parameters
from training.checkpoint import LoadedModel
from training.history import history_rows, weights_epoch

PAIRS = 25  # confused pairs in the table
COMPARISON_COLUMNS = ("Prediction", "A (%)", "B (%)", "A - B (points)", "Only A", "Only B", "McNemar's p")
WORST, WORST_COLUMNS = 24, 8  # confidently wrong images, and how many of them in a row


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """A network's predictions for N test images of K classes, and how they were made.

    `name` begins the names of the report's files; `split` holds the images, `logits` is float32 [N, K];
    `averaged_logits`, log-probabilities averaged over VIEWS, and `averaged`, their metrics, are None without
    --tta. The evaluation that is reported also has its accuracy on shifted images, bool [N] for CIFAR-100
    (whether a test image has a near-duplicate among the training images), and `against`, the evaluation of
    another network on the same images, or None.
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
    averaged_logits: np.ndarray | None
    averaged: Scores | None
    shifts: ShiftAccuracy | None = None
    near_duplicate: np.ndarray | None = None
    against: "Evaluation | None" = None

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
    def correct(self) -> np.ndarray:
        """bool [N]: whether the prediction is the label."""
        return self.predictions == self.split.labels

    @cached_property
    def comparisons(self) -> list[tuple[str, Scores, Scores, PairedTest]]:
        """(kind of prediction, own metrics, those of `against`, test): by a single view, and by VIEWS."""
        a, b, labels = self, self.against, self.split.labels
        if b is None:
            return []
        kinds = [("single view", a.scores, b.scores, a.logits, b.logits)]
        if a.averaged:
            averages = a.averaged_logits, b.averaged_logits
            kinds.append((f"{len(VIEWS)} views", a.averaged, b.averaged, *averages))
        return [
            (kind, own, other, metrics.paired_test(x.argmax(axis=1) == labels, y.argmax(axis=1) == labels))
            for kind, own, other, x, y in kinds
        ]

    @property
    def near_duplicate_rows(self) -> list[tuple[str, int, float]]:
        """("without" or "with" a near-duplicate, images, top-1 in percent: NaN for no images)."""
        if self.near_duplicate is None:
            return []
        masks = {"without": ~self.near_duplicate, "with": self.near_duplicate}
        return [(name, int(m.sum()), metrics.percent(self.correct[m])) for name, m in masks.items()]

    @cached_property
    def risk_coverage(self) -> RiskCoverage:
        """Selective prediction by the confidence."""
        return metrics.risk_coverage(self.logits, self.split.labels)

    @property
    def risk_rows(self) -> list[tuple[int, float]]:
        """(coverage, risk), in percent, at every tenth, rounded up to whole images."""
        risk, count = self.risk_coverage.risk_percent, len(self.split)
        return [(tenth, float(risk[-(-count * tenth // 100) - 1])) for tenth in range(10, 101, 10)]

    @cached_property
    def cross_fitted(self) -> tuple[Scores, tuple[float, float]]:
        """The metrics with a temperature fitted by two-fold cross-fitting, and the two temperatures."""
        logits, temperatures = metrics.cross_fit_temperature(self.logits, self.split.labels)
        return metrics.score(logits, self.split.labels, self.data.superclass_of), temperatures

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


def detail_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(metric, value) of what the page shows further down, ready to print."""
    scaled, temperatures = evaluation.cross_fitted
    top1, images = evaluation.shifts
    fitted = "with the temperatures {:.2f} and {:.2f}".format(*temperatures)
    return [
        *(
            (f"Top-1, {name} a near-duplicate", f"{percent:.2f} % of {count:,} images")
            for name, count, percent in evaluation.near_duplicate_rows
        ),
        ("Calibration error, two-fold cross-fit", f"{100 * scaled.calibration.ece:.2f} % {fitted}"),
        ("Area under risk against coverage", f"{evaluation.risk_coverage.area_percent:.2f} %"),
        ("Top-1, shifted images", f"{top1.min():.2f} to {top1.max():.2f} % of {images:,} images"),
    ]


def comparison_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The cells of COMPARISON_COLUMNS for each of `comparisons`, ready to print."""
    return [
        (
            kind,
            f"{own.top1_percent:.2f}",
            f"{other.top1_percent:.2f}",
            f"{test.difference_percent:+.2f} ± {test.standard_error_percent:.2f}",
            f"{test.gained:,}",
            f"{test.lost:,}",
            f"{test.p_value:.2g}",
        )
        for kind, own, other, test in evaluation.comparisons
    ]


def class_changes(evaluation: Evaluation) -> list[tuple[str, int, int, int]]:
    """(class, images that this network alone classifies correctly, that the other alone does, difference).

    Of all classes in which the networks differ, by a single view, the highest difference first.
    """
    names, labels, other = evaluation.data.classes, evaluation.split.labels, evaluation.against.correct
    gained, lost = (
        np.bincount(labels[mask], minlength=len(names)).tolist()
        for mask in (evaluation.correct & ~other, other & ~evaluation.correct)
    )
    rows = [(name, g, b, g - b) for name, g, b in zip(names, gained, lost, strict=True) if g or b]
    return sorted(rows, key=lambda row: -row[3])


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
        "risk_coverage": risk_coverage_figure(evaluation.risk_coverage, f"Risk and coverage: {title}"),
        "shifts": shift_figure(
            evaluation.shifts.top1_percent,
            SHIFTS_PX,
            f"Shifted images: {evaluation.subject}, a fifth of {evaluation.data_note}",
        ),
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
        comparison_columns=[(column, None) for column in COMPARISON_COLUMNS],
        comparison_rows=comparison_rows(evaluation),
        class_changes=class_changes(evaluation) if evaluation.against else [],
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
        shifts_px=SHIFTS_PX,
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
    if other := evaluation.against:
        rows.append(("Compared with", f"{other.trained.path.name} ({other.subject}), {other.setting_note}"))
    if evaluation.averaged:
        views = f"{len(VIEWS)}: shifted by a pixel in four directions or not, mirrored or not; equal weights"
        rows.append(("Views", views))
    return rows + list(versions().items())
