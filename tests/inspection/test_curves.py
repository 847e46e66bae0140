"""Training figures: valid files, the given data in the lines, sane views of awkward curves."""

import math
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
from inspection import curves

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


def finder_curve(points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Rates 1e-4 to 1 and a loss that falls from 4.6 to 4.3, then explodes to about 30."""
    rates = np.logspace(-4, 0, points)
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
        label
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        if not low <= tick.get_loc() <= high
        for label in (tick.label1, tick.label2)
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
def test_file_is_a_png_of_the_stated_size_and_the_same_bytes_again(tmp_path: Path, kind: str) -> None:
    write, size = WRITERS[kind]
    path = write(tmp_path / "a.png")
    assert path == tmp_path / "a.png"
    with Image.open(path) as image:
        image.verify()
        assert (image.format, image.size) == ("PNG", size)
    assert write(tmp_path / "b.png").read_bytes() == path.read_bytes()
    assert b"matplotlib" not in path.read_bytes().lower()


def test_a_users_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    rates, losses = finder_curve()
    curves.plot_lr_finder(rates, losses, 0.1, tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 25, "savefig.bbox": "tight", "lines.linewidth": 9}):
        curves.plot_lr_finder(rates, losses, 0.1, tmp_path / "theirs.png")
        assert matplotlib.rcParams["font.size"] == 25
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()


def test_history_lines_carry_the_rows() -> None:
    rows = make_rows(100)
    loss, accuracy, rate, gap = curves.history_figure(rows, milestones=MILESTONES).axes
    for axes, what in ((loss, "loss"), (accuracy, "acc_percent")):
        lines = lines_by_label(axes)
        for split in ("train", "test"):
            assert list(lines[split].get_xdata()) == list(range(1, 101))
            assert list(lines[split].get_ydata()) == [row[f"{split}_{what}"] for row in rows]
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


@pytest.mark.parametrize(("count", "scale"), [(5, "linear"), (100, "log")])
def test_rate_axis_is_logarithmic_only_when_the_rate_spans(count: int, scale: str) -> None:
    assert curves.history_figure(make_rows(count)).axes[2].get_yscale() == scale


def test_target_and_best_epoch_are_marked() -> None:
    rows = make_rows(30)
    lines = lines_by_label(curves.history_figure(rows, target_accuracy=70, best_epoch=29).axes[1])
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


@pytest.mark.parametrize("smooth", [False, True])
def test_finder_lines_carry_the_curve_and_the_suggestion(smooth: bool) -> None:
    rates, losses = finder_curve()
    smoothed = losses + 0.01 if smooth else None
    axes = curves.lr_finder_figure(rates, losses, 0.1, smoothed=smoothed).axes[0]
    assert axes.get_xscale() == "log"
    lines = lines_by_label(axes)
    assert list(lines["loss"].get_xdata()) == list(rates)
    assert list(lines["loss"].get_ydata()) == list(losses)
    assert ("loss, smoothed" in lines) == smooth
    assert [text.get_text() for text in axes.texts] == ["suggested 1.00e-01"]
    assert [0.1, 0.1] in [list(line.get_xdata()) for line in axes.lines]


def test_an_exploding_loss_does_not_flatten_the_view() -> None:
    rates, losses = finder_curve()
    axes = curves.lr_finder_figure(rates, losses, 0.1).axes[0]
    bottom, top = axes.get_ylim()
    assert 4.0 < bottom < losses.min()
    assert 4.6 < top < 5.5
    assert "loss climbs to 30.4, above this view" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        (np.where(np.arange(200) < 180, finder_curve()[1], np.nan), "not finite at 20 of 200"),
        (np.where(np.arange(200) < 180, finder_curve()[1], np.inf), "not finite at 20 of 200"),
        (np.full(200, 4.605), ""),
        (np.full(200, np.nan), "no finite loss"),
        (np.linspace(4.6, 9.0, 200), ""),
        (np.zeros(200), ""),
    ],
    ids=["nan at the end", "inf at the end", "flat", "all nan", "never falls", "zero"],
)
def test_awkward_curves_are_drawn_in_full_and_said(tmp_path: Path, losses: np.ndarray, note: str) -> None:
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


def test_a_suggestion_at_the_edge_is_named_inside() -> None:
    assert curves.lr_finder_figure(*finder_curve(), 1.0).axes[0].texts[0].get_ha() == "right"


@pytest.mark.parametrize("count", [1, 100])
def test_no_text_is_clipped_or_overlaps_another(count: int) -> None:
    title = "A_long_run_name: resnet56 on synthetic images (not CIFAR-100), subset of 2,560 images " * 2
    rows = make_rows(count, val_loss=2.0, val_acc_percent=41.0)
    figure = curves.history_figure(
        rows, milestones=MILESTONES, title=title, target_accuracy=70, best_epoch=count
    )
    finder = curves.lr_finder_figure(*finder_curve(), 0.1, title=title)
    for drawn in (figure, finder):
        texts = shown_texts(drawn)
        for index, (text, box) in enumerate(texts):
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1
            assert inside, text
            for other, other_box in texts[index + 1 :]:
                assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path: Path) -> None:
    curves.plot_lr_finder([0.1, 0.2], [2, 1], None, tmp_path / "f.png", title="$\\broken{ run$")


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "h.png"
    with pytest.raises(RunError, match="cannot write"):
        curves.plot_lr_finder([0.1], [1], None, path / "missing" / "f.png")
    path.write_bytes(b"old")

    def break_off(*_: object, **__: object) -> None:
        raise MemoryError("while drawing")

    monkeypatch.setattr(curves.Figure, "savefig", break_off)
    with pytest.raises(MemoryError):
        curves.plot_history(make_rows(2), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_never_loads_pyplot(tmp_path: Path) -> None:
    """A display is not needed, and no figure of another program is touched."""
    code = (
        "import sys\n"
        "from inspection import curves, eda_plots, evaluation_plots\n"
        "curves.plot_lr_finder([0.1, 0.2], [1, 2], 0.1, sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "f.png")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
