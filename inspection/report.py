"""The report of an evaluation: its pictures as PNG files, and one HTML page that holds everything."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from core.files import atomic_write, atomic_write_text
from inspection import evaluation_plots as draw
from inspection.curves import history_figure
from inspection.html_page import Column, Section, key_figures, page, paragraph, picture, table
from inspection.metrics import (
    ClassScores,
    ConfusedPair,
    Scores,
    confidently_wrong,
    confusion_matrix,
    log_softmax,
    most_confused,
    per_class,
    superclass_matrix,
    superclass_order,
)
from inspection.style import png_bytes

PAIRS = 25  # confused pairs in the table
WORST = 24  # confidently wrong images in the grid


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A network's answers to N images of K classes, and where they come from.

    `logits` is float [N, K], `images` uint8 [N, 32, 32, 3], `labels` int [N], `superclass_of` int [K].
    `subject` says which weights these are, `data` on what images they were tested ("synthetic ...");
    both stand beside every figure. `notes` are sentences, `facts` (what, value) pairs; `history` holds the
    rows of the training run that `training` names, or is empty.
    """

    name: str
    subject: str
    data: str
    images: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    superclass_of: np.ndarray
    scores: Scores
    augmented: Scores | None = None
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    training: str = ""
    history: tuple[dict[str, Any], ...] = ()
    milestones: tuple[int, ...] = ()

    @property
    def predictions(self) -> np.ndarray:
        """int64 [N]: the class of the largest logit."""
        return self.logits.argmax(axis=1)

    @property
    def matrix(self) -> np.ndarray:
        """int64 [K, K]: images by true and predicted class."""
        return confusion_matrix(self.labels, self.predictions, len(self.classes))

    @property
    def grouped(self) -> np.ndarray:
        """int64 [S, S]: images by true and predicted superclass."""
        return superclass_matrix(self.matrix, self.superclass_of, len(self.superclasses))


class Picture(NamedTuple):
    """A PNG file's content, what it shows in words, and the caption of the page."""

    png: bytes
    alt: str
    caption: str


def score_rows(evaluation: Evaluation) -> list[tuple[str, str, str | None]]:
    """(what, plain figure, figure averaged over views or None), ready to print."""
    columns = [evaluation.scores] + ([evaluation.augmented] if evaluation.augmented else [])
    shown = [
        (
            f"{scores.top1_percent:.2f} %",
            f"{scores.top5_percent:.2f} %",
            f"{scores.superclass_percent:.2f} %",
            f"{scores.loss:.4f} nats",
            f"{100 * scores.calibration.ece:.2f} %",
        )
        for scores in columns
    ]
    names = ("Top-1 accuracy", "Top-5 accuracy", "Superclass accuracy", "Loss", "Calibration error")
    averaged = shown[1] if evaluation.augmented else (None,) * len(names)
    return list(zip(names, shown[0], averaged, strict=True))


def confused_pairs(evaluation: Evaluation, count: int = PAIRS) -> list[tuple[str, str, ConfusedPair]]:
    """(class, class, counts) of the classes most often taken for each other."""
    names = evaluation.classes
    return [(names[p.first], names[p.second], p) for p in most_confused(evaluation.matrix, count)]


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Write NAME_*.png and NAME_report.html to `folder`; return the page's path.

    Raises:
        RunError: a file cannot be written.
    """
    pictures = draw_pictures(evaluation)
    for key, drawn in pictures.items():
        with atomic_write(folder / f"{evaluation.name}_{key}.png") as file:
            file.write(drawn.png)
    if evaluation.history:  # the run's own plots are in its folder already: on the page only
        pictures["history"] = _history_picture(evaluation)
    path = folder / f"{evaluation.name}_report.html"
    atomic_write_text(path, report_page(evaluation, pictures))
    return path


def draw_pictures(evaluation: Evaluation) -> dict[str, Picture]:
    """The pictures by the end of their file's name; none of mistakes where there are none."""
    title = f"{evaluation.subject}, {evaluation.data}"
    pictures = {
        "reliability": _reliability_picture(evaluation, title),
        "confusion_superclasses": _superclass_picture(evaluation, title),
        "f1": _f1_picture(evaluation, title),
        "confusion": _class_picture(evaluation, title),
    }
    worst = confidently_wrong(evaluation.logits, evaluation.labels, WORST)
    if len(worst):
        pictures["confidently_wrong"] = _mistakes_picture(evaluation, worst, title)
    return pictures


def _drawn(figure: Figure, alt: str, caption: str) -> Picture:
    return Picture(png_bytes(figure), alt, caption)


def _reliability_picture(evaluation: Evaluation, title: str) -> Picture:
    bins = evaluation.scores.calibration
    parts = bins.edges, bins.accuracy, bins.confidence, bins.counts, bins.ece
    return _drawn(
        draw.reliability_figure(*parts, f"Reliability: {title}"),
        f"Bars of accuracy by confidence in {len(bins.counts)} bins beside the diagonal of perfect "
        f"calibration, over a histogram of the images. Expected calibration error {100 * bins.ece:.2f} %.",
        "Accuracy against confidence; the table holds the same figures",
    )


def _superclass_picture(evaluation: Evaluation, title: str) -> Picture:
    return _drawn(
        draw.confusion_figure(evaluation.grouped, evaluation.superclasses, None, f"Superclasses: {title}"),
        f"Confusion matrix of {len(evaluation.superclasses)} superclasses, true by predicted; "
        f"{evaluation.scores.superclass_percent:.2f} % of the images lie on the diagonal.",
        "Images by true and predicted superclass",
    )


def _class_picture(evaluation: Evaluation, title: str) -> Picture:
    order, starts = superclass_order(evaluation.superclass_of)
    matrix = evaluation.matrix[np.ix_(order, order)]
    groups = [evaluation.superclasses[evaluation.superclass_of[order[start]]] for start in starts]
    return _drawn(
        draw.confusion_figure(matrix, groups, starts, f"Classes by superclass: {title}"),
        f"Confusion matrix of {len(order)} classes, true by predicted, ordered by superclass; "
        f"{evaluation.scores.top1_percent:.2f} % of the images lie on the diagonal. The table of confused "
        "pairs names its largest cells off the diagonal.",
        "Images by true and predicted class; lines part the superclasses",
    )


def _f1_picture(evaluation: Evaluation, title: str) -> Picture:
    return _drawn(
        draw.per_class_bars_figure(
            evaluation.classes, per_class(evaluation.matrix).f1, "F1 (%)", f"F1: {title}"
        ),
        "Bars of the F1 score of each class, from the best to the worst; the table holds the same figures.",
        "F1 score of each class, from the best to the worst",
    )


def _mistakes_picture(evaluation: Evaluation, worst: np.ndarray, title: str) -> Picture:
    confidence = np.exp(log_softmax(evaluation.logits[worst]).max(axis=1))
    names, guesses = evaluation.classes, evaluation.predictions[worst]
    captions = [
        f"is {names[label]}\nsaid {names[guess]}\n{100 * sure:.1f} %"
        for label, guess, sure in zip(evaluation.labels[worst], guesses, confidence, strict=True)
    ]
    said = "; ".join(caption.replace("\n", ", ") for caption in captions)
    return _drawn(
        draw.image_grid_figure(evaluation.images[worst], captions, 6, f"Confidently wrong: {title}"),
        f"{len(worst)} test images: {said}.",
        "The wrong answers given with most confidence; some labels are arguable",
    )


def _history_picture(evaluation: Evaluation) -> Picture:
    title = f"Training: {evaluation.training}"
    return _drawn(
        history_figure(evaluation.history, milestones=evaluation.milestones, title=title),
        f"Loss, accuracy, learning rate and generalisation gap over {len(evaluation.history)} epochs.",
        "The training run, epoch by epoch",
    )


def report_page(evaluation: Evaluation, pictures: dict[str, Picture]) -> str:
    """The page's HTML."""
    introduction = paragraph(f"{evaluation.subject}, tested on {evaluation.data}.")
    if evaluation.synthetic:
        introduction += paragraph(
            "Synthetic data: drawn images, not CIFAR-100. No figure here says anything about CIFAR-100.",
            note=True,
        )
    introduction += _scores_part(evaluation)
    introduction += "".join(paragraph(note) for note in evaluation.notes)
    sections = [
        Section("Superclasses", _superclass_part(evaluation, pictures)),
        Section("Classes", _class_part(evaluation, pictures)),
        Section("Confusions", _confusion_part(evaluation, pictures)),
        Section("Confidently wrong", _mistakes_part(pictures)),
        Section("Calibration", _calibration_part(evaluation, pictures)),
        Section("Where this comes from", _origin_part(evaluation, pictures)),
    ]
    kind = "synthetic data" if evaluation.synthetic else "CIFAR-100"
    title = f"{evaluation.name}: {evaluation.scores.top1_percent:.2f} % top-1 on {kind}"
    return page(title, introduction, sections)


def _shown(pictures: dict[str, Picture], key: str, least_width_px: int = 0) -> str:
    return picture(*pictures[key], least_width_px=least_width_px)


def _scores_part(evaluation: Evaluation) -> str:
    rows = score_rows(evaluation)
    tiles = [(name, plain) for name, plain, _ in rows] + [("Images", f"{evaluation.scores.images:,}")]
    part = key_figures(tiles)
    if evaluation.augmented:
        columns = [Column("Figure"), Column("Plain"), Column("Averaged")]
        rows = [tuple((cell or "").replace(" ", "\N{NO-BREAK SPACE}") for cell in row) for row in rows]
        part += table("Plain, and averaged over views of each image", columns, rows)
    return part


_SCORE_COLUMNS = (
    Column("F1 (%)", ".2f"),
    Column("Precision (%)", ".2f"),
    Column("Recall (%)", ".2f"),
    Column("Images", ",d"),
)


def _score_cells(scores: ClassScores, index: int) -> tuple[float, ...]:
    """One class's cells of _SCORE_COLUMNS."""
    return tuple(column[index] for column in (scores.f1, scores.precision, scores.recall, scores.images))


def _superclass_part(evaluation: Evaluation, pictures: dict[str, Picture]) -> str:
    scores = per_class(evaluation.grouped)
    columns = [Column("Superclass"), *_SCORE_COLUMNS]
    order = np.argsort(-scores.f1, kind="stable")
    rows = [(evaluation.superclasses[i], *_score_cells(scores, i)) for i in order]
    right, within = evaluation.scores.top1_percent, evaluation.scores.superclass_percent
    share = ""
    if right < 100:
        share = f" {100 * (within - right) / (100 - right):.0f} % of the wrong answers stay within it."
    text = f"An answer is right here if it is any class of the true superclass: {within:.2f} % are."
    return (
        paragraph(text + share)
        + _shown(pictures, "confusion_superclasses", 720)
        + table("Superclasses from the best to the worst F1", columns, rows, sorted_by=1)
    )


def _class_part(evaluation: Evaluation, pictures: dict[str, Picture]) -> str:
    scores, matrix = per_class(evaluation.matrix), evaluation.matrix
    columns = [Column("Class"), *_SCORE_COLUMNS, Column("Most often taken for"), Column("Superclass")]
    rows = []
    for i in np.argsort(-scores.f1, kind="stable"):
        others = np.where(np.arange(len(matrix)) == i, 0, matrix[i])
        rival = f"{evaluation.classes[others.argmax()]} ({others.max()})" if others.any() else ""
        group = evaluation.superclasses[evaluation.superclass_of[i]]
        rows.append((evaluation.classes[i], *_score_cells(scores, i), rival, group))
    text = (
        "Precision: how many of the images said to be of a class are. Recall: how many of its images are "
        "said to be. F1: their harmonic mean."
    )
    caption = "Classes from the best to the worst F1"
    return (
        paragraph(text) + _shown(pictures, "f1", 960) + table(caption, columns, rows, sorted_by=1, tall=True)
    )


def _confusion_part(evaluation: Evaluation, pictures: dict[str, Picture]) -> str:
    columns = [Column("One"), Column("Other")]
    columns += [Column(name, ",d") for name in ("Both ways", "One said to be other", "Other said to be one")]
    pairs = confused_pairs(evaluation)
    rows = [(a, b, p.total, p.first_as_second, p.second_as_first) for a, b, p in pairs]
    found = table("Pairs of classes most often confused", columns, rows, sorted_by=2)
    return (found if rows else paragraph("No class was taken for another.")) + _shown(
        pictures, "confusion", 720
    )


def _mistakes_part(pictures: dict[str, Picture]) -> str:
    if "confidently_wrong" not in pictures:
        return paragraph("No image was classified wrongly.")
    return _shown(pictures, "confidently_wrong", 720)


def _calibration_part(evaluation: Evaluation, pictures: dict[str, Picture]) -> str:
    bins = evaluation.scores.calibration
    right = evaluation.scores.top1_percent
    sure = 100 * np.nansum(bins.confidence * bins.counts) / bins.counts.sum()
    word = "overconfident" if sure > right else "underconfident"
    columns = [Column("Confidence above", ".3f"), Column("up to", ".3f"), Column("Images", ",d")]
    columns += [Column("Accuracy (%)", ".2f"), Column("Mean confidence (%)", ".2f")]
    rows = zip(
        bins.edges[:-1], bins.edges[1:], bins.counts, 100 * bins.accuracy, 100 * bins.confidence, strict=True
    )
    text = (
        f"On average the network is {sure:.2f} % sure and {right:.2f} % right: {word}. The expected "
        f"calibration error, {100 * bins.ece:.2f} %, is the mean distance of the two over "
        f"{len(bins.counts)} bins of equal width, weighted by their images (Guo et al. 2017)."
    )
    bin_table = table("Bins of confidence", columns, list(rows))
    return paragraph(text) + _shown(pictures, "reliability", 480) + bin_table


def _origin_part(evaluation: Evaluation, pictures: dict[str, Picture]) -> str:
    facts = table("How these figures were made", [Column("What"), Column("Value")], evaluation.facts)
    return facts + (_shown(pictures, "history", 900) if "history" in pictures else "")
