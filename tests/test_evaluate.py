"""evaluate.py on a small run: its figures are the run's own, and its page shows them in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, install_tiny_cifar, tiny_split
from PIL import Image
from test_html_page import Tags
from torch import nn

import dataset
import evaluate
import report
import synthetic
from checkpoint import load_checkpoint, save_checkpoint
from cli import Interrupts, run_main
from dataset import balanced_subset, load_dataset
from engine import Metrics, TrainStep
from engine import evaluate as engine_evaluate
from model import build_model
from recipe import Recipe
from run import Run
from run_files import RunFiles
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
    """A run of one epoch, without training: the figures of its history are the engine's."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model).to(memory_format=torch.channels_last)
    teach(model, data)
    optimizer = recipe.build_optimizer(model)
    step = TrainStep(model, recipe.build_criterion(), optimizer, recipe.build_scheduler(optimizer, 1))
    extra = {
        "classes": list(data.classes),
        "superclasses": list(data.superclasses),
        "superclass_of": data.superclass_of.tolist(),
    }
    files = RunFiles(folder, name)
    run = Run(files, recipe, model, step, 1, Interrupts(), resume_command="", extra=extra)
    split = balanced_subset(data.test, recipe.limit_test, recipe.seed) if recipe.limit_test else data.test
    batches = make_test_batches(split, recipe.test_batch_size, "cpu")
    run.finish_epoch(Metrics(4.6, 1.0, 200), engine_evaluate(model, batches, precision=recipe.precision))
    return run


@dataclass(frozen=True)
class Finished:
    """A small run, and what evaluate.py made of it."""

    folder: Path
    data_dir: Path
    run: Run
    code: int
    figures: dict[str, Any]

    @property
    def flags(self) -> list[str]:
        return ["--data-dir", str(self.data_dir), "--output-dir", str(self.folder), "--device", "cpu"]

    @property
    def page(self) -> Path:
        return self.folder / "small_report.html"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder, data_dir = tmp_path_factory.mktemp("output"), tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        contents = {"train": tiny_split(1, seed=1), "test": tiny_split(2, seed=2), "meta": NAMES}
        install_tiny_cifar(patch, contents).lay(data_dir)
        data = load_dataset("cifar100", data_dir)
        recipe = Recipe(model="resnet20", epochs=2, limit_test=150, test_batch_size=64, seed=3)
        run = make_run(folder, data, recipe, "small")
        done = Finished(folder, data_dir, run, -1, {})
        code = evaluate.main([*done.flags, "--tta", "--json", str(folder / "figures.json")])
        figures = json.loads((folder / "figures.json").read_text())
        yield Finished(folder, data_dir, run, code, figures)


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where no report is looked at, leave out the drawing; what would have been drawn is in the list."""
    shown: list[Any] = []

    def write(evaluation: Any, folder: Path) -> Path:
        shown.append(evaluation)
        return folder / f"{evaluation.name}_report.html"

    monkeypatch.setattr(evaluate, "write_report", write)
    return shown


def figures_of(finished: Finished, *flags: str) -> dict[str, Any]:
    """Run evaluate.py with more flags; its JSON."""
    path = finished.folder / "more.json"
    assert evaluate.main([*finished.flags, *flags, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_top1_and_loss_equal_the_history_to_the_last_bit(finished: Finished) -> None:
    row = finished.run.history[0]
    assert finished.code == 0
    assert finished.figures["top1"] == row["test_acc_percent"]
    assert finished.figures["loss"] == row["test_loss"]
    assert finished.figures["recorded"] == {"top1": row["test_acc_percent"], "loss": row["test_loss"]}
    assert finished.figures["equals_recorded"] is True
    assert 10 < row["test_acc_percent"] < 90, "right and wrong answers, or this proves little"


def test_json_holds_every_figure(finished: Finished) -> None:
    figures = finished.figures
    assert {"top1", "top5", "loss", "superclass", "ece", "images"} <= set(figures)
    assert figures["images"] == 150
    assert figures["top1"] <= figures["top5"] <= 100 and figures["top1"] <= figures["superclass"] <= 100
    assert 0 < figures["ece"] < 1
    assert (figures["dataset"], figures["model"], figures["epoch"]) == ("cifar100", "resnet20", 1)
    assert (figures["precision"], figures["batch_size"], figures["device"]) == ("fp32", 64, "cpu")
    classes = figures["per_class"]
    assert set(classes) == set(NAMES["fine_label_names"])
    assert sum(entry["images"] for entry in classes.values()) == 150
    hits = sum(entry["images"] * entry["recall"] / 100 for entry in classes.values())
    assert 100 * hits / 150 == pytest.approx(figures["top1"])
    assert figures["tta"]["views"] == 10 and set(figures["tta"]) == {
        "top1", "top5", "loss", "superclass", "ece", "views",
    }  # fmt: skip
    assert figures["tta"]["loss"] != figures["loss"]


def test_results_of_a_finished_run_and_its_last_state_compare_too(finished, without_report, capsys) -> None:
    finished.run.finish()
    for path in (finished.run.files.results, finished.run.files.last):
        assert figures_of(finished, "--weights", str(path))["equals_recorded"] is True
    assert "Top-1 equals the history's for epoch 1 exactly; so does the loss." in capsys.readouterr().out


def test_more_images_are_tested_on_request_and_compare_with_nothing(finished, without_report, capsys) -> None:
    assert figures_of(finished, "--all-test")["images"] == 200
    assert "150 images, this on 200" in capsys.readouterr().out
    figures = figures_of(finished, "--limit-test", "100")
    assert (figures["images"], figures["equals_recorded"]) == (100, None)
    assert without_report[0].data == "all 200 test images of CIFAR-100"
    assert without_report[1].data == "a balanced subset of 100 of the 200 test images of CIFAR-100"
    assert without_report[1].name == "small"


def test_other_weights_than_recorded_are_told(finished, without_report, tmp_path, capsys) -> None:
    state = load_checkpoint(finished.run.files.best)
    state["model"]["fc.bias"] += torch.linspace(0, 3, 100)
    path = tmp_path / "changed.pth"
    save_checkpoint(path, state)
    figures = figures_of(finished, "--weights", str(path), "--batch-size", "50")
    assert figures["equals_recorded"] is False
    out = capsys.readouterr().out
    assert "Warning: top-1 is" in out and "Different here: batches of 50." in out


def test_bf16_is_the_engines_bf16(finished, without_report) -> None:
    figures = figures_of(finished, "--precision", "bf16")
    split = balanced_subset(load_dataset("cifar100", finished.data_dir).test, 150, 3)
    measured = engine_evaluate(finished.run.model, make_test_batches(split, 64, "cpu"), precision="bf16")
    assert (figures["top1"], figures["loss"]) == (measured.accuracy_percent, measured.loss)
    assert figures["loss"] != finished.figures["loss"]


def test_a_run_on_synthetic_images_is_evaluated_on_them_and_says_so(
    finished, without_report, tmp_path, capsys, monkeypatch
) -> None:
    few = [np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8), np.arange(100)] * 2
    monkeypatch.setattr(synthetic, "generate", lambda: few)
    data = load_dataset("synthetic", tmp_path)
    make_run(tmp_path, data, Recipe(model="resnet20", dataset="synthetic", epochs=2), "drawn")
    figures = figures_of(finished, "--weights", str(tmp_path / "drawn_best.pth"))
    assert (figures["dataset"], figures["images"]) == ("synthetic", 100)
    assert "all 100 test images of the synthetic data (not CIFAR-100)" in capsys.readouterr().out
    assert without_report[0].synthetic and "synthetic" in without_report[0].data
    page = Tags(report.report_page(without_report[0], fake_pictures()))
    assert "on synthetic data" in page.text
    assert "No figure here says anything about CIFAR-100." in page.text


def fake_pictures() -> dict[str, Any]:
    """One small file under every key, for what the words of the page say."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    keys = ("confusion_superclasses", "f1", "confusion", "confidently_wrong", "reliability")
    return {key: report.Picture(buffer.getvalue(), "alt", "caption") for key in keys}


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--weights", "nowhere.pth"], 1, "nowhere.pth does not exist"),
        (["--limit-test", "201"], 2, "cannot take 201 of 200 images"),
        (["--output-dir", "{file}"], 1, "is a file, not a folder"),
        (["--output-dir", "{empty}"], 2, "no trained weights"),
        (["--json", "{empty}/no/f.json"], 1, "cannot write"),
    ],
)
def test_mistakes_are_one_line(finished, without_report, tmp_path, capsys, flags, code, words) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    places = {"file": tmp_path / "file", "empty": tmp_path / "empty"}
    flags = [flag.format(**places) for flag in flags]
    weights = (
        []
        if "{empty}" in str(flags) or words.startswith("no ")
        else ["--weights", str(finished.run.files.best)]
    )
    assert run_main(lambda: evaluate.main([*finished.flags, *weights, *flags]), "evaluate.py") == code
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1
    assert words in error


def test_weights_of_other_classes_are_refused(finished, tmp_path, capsys) -> None:
    state = load_checkpoint(finished.run.files.best)
    state["classes"] = list(reversed(state["classes"]))
    save_checkpoint(tmp_path / "x.pth", state)
    flags = [*finished.flags, "--weights", str(tmp_path / "x.pth")]
    assert run_main(lambda: evaluate.main(flags), "evaluate.py") == 1
    assert "other classes" in capsys.readouterr().err


def test_a_name_that_is_no_plain_name_does_not_leave_the_folder(finished, without_report, tmp_path) -> None:
    state = load_checkpoint(finished.run.files.best)
    state["name"] = "../../evil"
    save_checkpoint(tmp_path / "mine.pth", state)
    figures_of(finished, "--weights", str(tmp_path / "mine.pth"))
    assert without_report[0].name == "mine"


def test_the_script_refuses_contradictions_with_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--all-test", "--limit-test", "5"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "not allowed with" in done.stderr


def test_page_holds_its_pictures_and_leads_nowhere_else(finished: Finished) -> None:
    html = finished.page.read_text("utf-8")
    tags = Tags(html)
    images = tags.of("img")
    assert len(images) == 6
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert (picture.format, str(picture.width)) == ("PNG", image["width"])
        assert len(image["alt"]) > 40
    files = sorted(path.name for path in finished.folder.glob("small_*.png"))
    inside = {base64.b64decode(image["src"].partition(",")[2]) for image in images}
    pictures = [name for name in files if name != "small_training_plots.png"]
    assert len(pictures) == 5
    assert all((finished.folder / name).read_bytes() in inside for name in pictures)
    assert not re.search(r"https?:|//[a-z]", re.sub(r'src="[^"]*"', "", html))
    leading = [value for _, found in tags.tags for key, value in found.items() if key in ("href", "src")]
    assert all(value.startswith(("#", "data:")) for value in leading)
    assert not list(finished.folder.glob(".*.tmp"))


def test_page_says_what_the_json_says(finished: Finished) -> None:
    tags = Tags(finished.page.read_text("utf-8"))
    figures = finished.figures
    for text in (f"{figures['top1']:.2f} %", f"{figures['loss']:.4f} nats", f"{100 * figures['ece']:.2f} %"):
        assert text in tags.text
    assert "so does the loss" in tags.text and "class_7 & <co>" in tags.text
    assert "a balanced subset of 150 of the 200 test images of CIFAR-100" in tags.text
    assert len(tags.of("table")) == 6
    assert all("data-sortable" in table for table in tags.of("table"))
    assert [heading for heading, _ in tags.tags if heading in ("h1", "h2", "h3")] == ["h1"] + ["h2"] * 6


# Runs in the page: notes errors, clicks headings, and leaves what it saw where --dump-dom shows it.
PROBE = """<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message)), true);
addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
addEventListener("load", () => {
  const images = [...document.images];
  const table = [...document.querySelectorAll("table")].find(t => t.caption.textContent.includes("worst F1")
    && t.tBodies[0].rows.length === 100);
  const column = index => [...table.tBodies[0].rows].map(row => row.cells[index].textContent);
  const click = index => table.tHead.rows[0].cells[index].querySelector("button").click();
  const seen = {start: column(1)};
  click(1); seen.f1_up = column(1);
  click(1); seen.f1_down = column(1);
  click(2); seen.precision_down = column(2);
  click(2); seen.precision_up = column(2);
  click(0); seen.names_up = column(0);
  click(0); seen.names_down = column(0);
  seen.sorted = [...table.tHead.rows[0].cells].map(cell => cell.getAttribute("aria-sort"));
  seen.widths = images.map(image => image.complete && image.naturalWidth);  // 0 for a broken image
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.problems = problems;
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = JSON.stringify(seen);
  document.body.append(note);
});
</script>"""


@pytest.mark.parametrize("width", [1280, 500])  # pixels; Chromium makes no narrower window
def test_page_works_in_a_browser(finished: Finished, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "page.html"
    page.write_text(finished.page.read_text("utf-8").replace("<head>", f"<head>{PROBE}", 1), "utf-8")
    flags = [
        f"--window-size={width},900",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=9000",
    ]
    flags += ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    done = subprocess.run(
        [browser, *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    parsed = Tags(found.group(0))
    seen = json.loads(parsed.text)
    assert seen["problems"] == []
    assert len(seen["widths"]) == 6 and all(seen["widths"])
    assert seen["overflow"] <= 0, "the page itself never scrolls sideways"
    assert seen["names_up"] != seen["names_down"] == seen["names_up"][::-1]
    assert set(seen["names_up"]) == set(NAMES["fine_label_names"])
    assert seen["sorted"] == ["descending", None, None, None, None, None, None]
    f1 = sorted(float(text) for text in seen["start"])
    assert f1[0] < 10 <= f1[-1], "sorted as text, 100.00 would come before 20.00"
    assert [float(text) for text in seen["f1_up"]] == f1
    assert seen["f1_down"] == seen["start"] == [f"{value:.2f}" for value in f1[::-1]]
    known = sorted(float(text) for text in seen["precision_up"] if text != "-")
    missing = ["-"] * (100 - len(known))
    assert missing, "some class is never named"
    assert seen["precision_up"] == [f"{value:.2f}" for value in known] + missing
    assert seen["precision_down"] == [f"{value:.2f}" for value in known[::-1]] + missing
