"""Training figures: valid files, the given data in the lines, sane views of awkward curves."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.text
import numpy as np
import pytest
from PIL import Image

from core.errors import RunError
from helpers import REPOSITORY
from inspection import curves, style

MILESTONES = (40, 70, 85)


def make_rows(count: int, **extra: float | str | None) -> list[dict]:
    """A history of `count` epochs, with the reference's rates."""
    return [
        {
            "epoch": epoch,
            "learning_rate": 0.1 * 0.2 ** sum(epoch > milestone for milestone in MILESTONES),
            "train_loss": 4.6 - 4 * progress,
            "train_acc_percent": 85 * progress,
            "test_loss": 4.6 - 3.6 * progress,
            "test_acc_percent": 74 * progress,
            **extra,
        }
        for epoch in range(1, count + 1)
        for progress in [1 - math.exp(-epoch / 20)]
    ]


def finder_curve() -> tuple[np.ndarray, np.ndarray]:
    """Rates 1e-4 to 1 and a loss that falls from 4.6 to 4.3, then explodes to about 30."""
    rates = np.logspace(-4, 0, 200)
    x = np.log10(rates)
    explosion = np.where(x > -0.3, (x + 0.3) ** 2 * 290, 0)
    return rates, 4.6 - 0.3 / (1 + np.exp(-(x + 1.5) * 4)) + explosion


def lines_by_label(axes) -> dict:
    return {line.get_label(): line for line in axes.lines}


def shown_texts(figure) -> list:
    """(text, its box in pixels) of everything written on the figure, as it is drawn."""
    figure.canvas.draw()
    # The labels of ticks outside the axes' limits exist, but are not drawn.
    hidden = {
        tick.label1
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        if not low <= tick.get_loc() <= high
    }
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
    boxes = [(text, text.get_window_extent()) for text in texts if text.get_visible() and text not in hidden]
    return [(text, box) for text, box in boxes if box.width > 0]


# Each figure's writer, with its size in pixels.
WRITERS: dict[str, tuple[Callable[[Path], Path], tuple[int, int]]] = {
    "history": (lambda path: curves.plot_history(make_rows(300), path, milestones=MILESTONES), (1560, 1080)),
    "one epoch": (lambda path: curves.plot_history(make_rows(1), path, best_epoch=1), (1560, 1080)),
    "finder": (lambda path: curves.plot_lr_finder(*finder_curve(), 0.1, path), (1200, 720)),
    "one rate": (lambda path: curves.plot_lr_finder([1e-4], [4.6], 1e-4, path), (1200, 720)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_file_is_a_png_of_the_stated_size_and_its_bytes_depend_on_the_input_alone(tmp_path, kind) -> None:
    write, size = WRITERS[kind]
    path = write(tmp_path / "a.png")
    assert path == tmp_path / "a.png"
    with Image.open(path) as image:
        image.verify()
        assert (image.format, image.size) == ("PNG", size)
    with matplotlib.rc_context({"font.size": 25, "savefig.bbox": "tight", "lines.linewidth": 9}):
        assert write(tmp_path / "b.png").read_bytes() == path.read_bytes()
        assert matplotlib.rcParams["font.size"] == 25
    assert b"matplotlib" not in path.read_bytes().lower()


def test_history_lines_carry_the_rows() -> None:
    rows = make_rows(100)
    loss, accuracy, rate, gap = curves.history_figure(rows, milestones=MILESTONES).axes
    for axes, what in ((loss, "loss"), (accuracy, "acc_percent")):
        lines = lines_by_label(axes)
        for split in ("train", "test"):
            assert list(lines[split].get_xdata()) == list(range(1, 101))
            assert list(lines[split].get_ydata()) == [row[f"{split}_{what}"] for row in rows]
    assert rate.get_yscale() == "log"
    assert list(lines_by_label(rate)["learning rate"].get_ydata()) == [row["learning_rate"] for row in rows]
    expected = [row["train_acc_percent"] - row["test_acc_percent"] for row in rows]
    assert list(lines_by_label(gap)["train minus test"].get_ydata()) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "inside"), [(100, [40.5, 70.5, 85.5]), (70, [40.5])])
def test_milestones_are_drawn_where_the_rate_drops_and_named_once(count: int, inside: list[float]) -> None:
    figure = curves.history_figure(make_rows(count), milestones=MILESTONES)
    for axes in figure.axes:
        verticals = [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]
        assert verticals == inside
    legends = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    named = ", ".join(str(int(drop)) for drop in inside)
    assert [text for text in legends if "drops" in text] == [f"drops after epoch {named}"]


def test_target_and_best_epoch_are_marked_and_a_constant_rate_has_a_linear_axis() -> None:
    rows = make_rows(30)
    _, accuracy, rate, _ = curves.history_figure(rows, target_accuracy=70, best_epoch=29).axes
    assert rate.get_yscale() == "linear"
    lines = lines_by_label(accuracy)
    assert set(lines["target 70 %"].get_ydata()) == {70}
    best = rows[28]["test_acc_percent"]
    star = lines[f"best epoch 29: {best:.2f} %"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (29, best)


def test_validation_and_averaged_weights_are_drawn_when_present() -> None:
    rows = make_rows(10, val_loss=2.0, val_acc_percent=41.0, ema_test_acc_percent=50.0)
    loss, accuracy, _, gap = curves.history_figure(rows, best_epoch=4).axes
    assert set(lines_by_label(loss)) == {"train", "validation", "test"}
    named = set(lines_by_label(accuracy))
    assert named == {"train", "validation", "test", "test, averaged weights", "best epoch 4: 50.00 %"}
    assert "train minus validation" in lines_by_label(gap)
    # a run with a validation split does not measure the test images
    rows = [{key: row[key] for key in row if "test" not in key} for row in rows]
    loss, accuracy, *_ = curves.history_figure(rows, best_epoch=2).axes
    assert set(lines_by_label(loss)) == {"train", "validation"}
    assert "best epoch 2: 41.00 %" in lines_by_label(accuracy)


def test_missing_values_leave_gaps_not_errors() -> None:
    rows = make_rows(4)
    for row in rows[:-1]:
        row.update(test_loss=None, test_acc_percent=float("nan"))
    test = lines_by_label(curves.history_figure(rows).axes[0])["test"]
    assert np.isfinite(test.get_ydata()).tolist() == [False, False, False, True]
    assert test.get_marker() == "o", "a lone point needs a marker to be seen"


@pytest.mark.parametrize(("suggestion", "side"), [(1e-4, "left"), (0.1, "center"), (1.0, "right")])
def test_finder_draws_the_curve_and_the_suggestion_and_hides_the_explosion(suggestion, side: str) -> None:
    rates, losses = finder_curve()
    axes = curves.lr_finder_figure(rates, losses, suggestion, smoothed=losses + 0.01).axes[0]
    assert axes.get_xscale() == "log"
    lines = lines_by_label(axes)
    for name, values in (("loss", losses), ("loss, smoothed", losses + 0.01)):
        assert list(lines[name].get_xdata()) == list(rates)
        assert list(lines[name].get_ydata()) == list(values)
    assert [(text.get_text(), text.get_ha()) for text in axes.texts] == [
        (f"suggested {suggestion:.2e}", side)
    ]
    assert [suggestion] * 2 in [list(line.get_xdata()) for line in axes.lines]
    bottom, top = axes.get_ylim()
    assert 4.0 < bottom < losses.min()
    assert 4.6 < top < 5.5
    assert "loss climbs to 30.4, above this view" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        (np.where(np.arange(200) < 180, finder_curve()[1], np.inf), "not finite at 20 of 200"),
        (np.full(200, 4.605), ""),
        (np.full(200, np.nan), "no finite loss"),
        (np.linspace(4.6, 9.0, 200), ""),
        (np.zeros(200), ""),
    ],
    ids=["inf at the end", "flat", "all nan", "never falls", "zero"],
)
def test_awkward_curves_are_drawn_in_full_with_a_note(tmp_path: Path, losses: np.ndarray, note: str) -> None:
    rates, _ = finder_curve()
    axes = curves.lr_finder_figure(rates, losses, None).axes[0]
    assert note in axes.get_xlabel()
    assert "no suggestion" in axes.get_xlabel()
    bottom, top = axes.get_ylim()
    finite = losses[np.isfinite(losses)]
    if len(finite):
        assert bottom < finite.min() < top
        assert finite.max() < top
    else:
        curves.plot_lr_finder(rates, losses, 0.1, tmp_path / "f.png")


@pytest.mark.parametrize("count", [1, 100])
def test_no_text_is_clipped_or_overlaps_another(count: int) -> None:
    title = "A_long_run_name: $\\broken{ run$ on synthetic images (not CIFAR-100), 2,560 images " * 2
    rows = make_rows(count, val_loss=2.0, val_acc_percent=41.0)
    marks = {"milestones": MILESTONES, "target_accuracy": 70, "best_epoch": count}
    finder = curves.lr_finder_figure(*finder_curve(), 0.1, title=title)
    for drawn in (curves.history_figure(rows, title=title, **marks), finder):
        texts = shown_texts(drawn)
        for index, (text, box) in enumerate(texts):
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1
            assert inside, text
            for other, other_box in texts[index + 1 :]:
                assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "h.png"
    path.write_bytes(b"old")
    with pytest.raises(RunError, match="cannot write"):
        curves.plot_lr_finder([0.1], [1], None, path / "missing" / "f.png")
    monkeypatch.setattr(style, "png_bytes", lambda _: "not bytes")
    with pytest.raises(TypeError):
        curves.plot_history(make_rows(2), path)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])


@pytest.mark.parametrize("backend", ["", "module://not_installed.backend", "no such backend"])
def test_drawing_never_loads_pyplot_and_needs_no_backend(tmp_path: Path, backend: str) -> None:
    """A display is not needed, and no figure of another program is touched."""
    code = "import sys; from inspection import curves, eda_plots, evaluation_plots\n"
    code += "curves.plot_lr_finder([0.1, 0.2], [1, 2], 0.1, sys.argv[1])\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    environment = os.environ | {"MPLBACKEND": backend}
    command = [sys.executable, "-c", code, str(tmp_path / "f.png")]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
