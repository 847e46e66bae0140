"""The report of evaluate.py: it holds metrics and figures, escapes all text, and works in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.small_run import NAMES, Evaluated
from inspection import metrics, report
from inspection.report import Evaluation, draw_figures, render_page

NASTY = "<script>alert(\"1\")</script> & 'x' {{ 7 }}"


class Tags(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each tag of that name."""
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(evaluation: Evaluation, comparison: str = "") -> Tags:
    """The page with one small picture in place of every figure."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    keys = ("confusion_superclasses", "f1", "confusion", "confidently_wrong", "reliability", "history")
    keys += ("risk_coverage", "shifts")
    return Tags(render_page(evaluation, comparison, dict.fromkeys(keys, buffer.getvalue())))


def test_page_holds_figures_and_metrics_and_leads_nowhere_else(evaluated: Evaluated) -> None:
    html = evaluated.page.read_text("utf-8")
    tags = Tags(html)
    images = tags.of("img")
    assert len(images) == 8
    contents = [
        base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        for image in images
    ]
    for image, content in zip(images, contents, strict=True):
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            size = (image["width"], image["height"])
            assert (picture.format, *map(str, picture.size)) == ("PNG", *size)
        assert len(image["alt"]) > 40
    files = set(evaluated.folder.glob("small_*.png")) - {evaluated.folder / "small_training_plots.png"}
    assert len(files) == 7 and all(path.read_bytes() in contents for path in files)
    assert not re.search(r"https?:|//[a-z]", re.sub(r'src="[^"]*"', "", html))
    links = [value for _, found in tags.tags for key, value in found.items() if key in ("href", "src")]
    assert all(value.startswith(("#", "data:")) for value in links)
    assert [link["href"] for link in tags.of("a")] == [f"#{heading['id']}" for heading in tags.of("h2")]
    policy = next(meta["content"] for meta in tags.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert not list(evaluated.folder.glob(".*.tmp"))
    metrics = evaluated.metrics
    for text in (f"{metrics['top1']:.2f} %", f"{metrics['loss']:.4f} nats", f"{100 * metrics['ece']:.2f} %"):
        assert text in tags.text
    assert "so does the loss" in tags.text and "class_7 & <co>" in tags.text
    assert "a balanced subset of 150 of the 200 test images of CIFAR-100" in tags.text
    assert "synthetic" not in tags.text
    *details, _ = report.detail_rows(evaluated.evaluation)
    assert len(details) == 4 and all(text.split(" %")[0] in tags.text for _, text in details)
    top1 = evaluated.evaluation.shifts.top1_percent
    assert any(f"from {top1.min():.1f} to {top1.max():.1f} %" in image["alt"] for image in images)
    assert "a class-balanced fifth of the test images (30)" in tags.text and "is black" in tags.text
    assert len(tags.of("table")) == 9
    assert [heading for heading, _ in tags.tags if heading in ("h1", "h2", "h3")] == ["h1"] + ["h2"] * 9


def test_text_from_outside_never_becomes_markup(evaluated: Evaluated) -> None:
    plain = evaluated.evaluation
    names = tuple(f"{NASTY}{label}" for label in range(100))
    data = replace(plain.data, classes=names, superclasses=names[:20])
    hostile = page_of(replace(plain, name=NASTY, data=data), NASTY)
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in page_of(plain).tags]
    assert all(name in hostile.text for name in names)
    assert any(NASTY in image["alt"] for image in hostile.of("img"))
    assert hostile.of("title") == [{}] and f"{NASTY}: " in hostile.text


def test_page_marks_sorting_missing_values_and_synthetic_data(evaluated: Evaluated) -> None:
    """The table of confidence bins has empty ones, whose means are not defined."""
    evaluation = evaluated.evaluation
    tags = page_of(evaluation)
    assert sum(head.get("aria-sort") == "descending" for head in tags.of("th")) == 3
    cells = [cell["data-value"] for cell in tags.of("td") if "data-value" in cell]
    empty = int((evaluation.scores.calibration.counts == 0).sum())
    assert empty and cells.count("") >= 2 * empty and "nan" not in cells
    assert all(box["tabindex"] == "0" for box in tags.of("div") if box.get("role") == "region")
    data = replace(evaluation.data, name="synthetic")
    text = page_of(replace(evaluation, data=data, near_duplicate=None)).text
    assert "Near-duplicates" not in text
    assert "top-1 on synthetic data" in text and "These results say nothing about CIFAR-100." in text


def test_page_compares_two_networks_and_lists_the_classes_that_differ(evaluated: Evaluated) -> None:
    a = evaluated.evaluation
    assert "Only B" not in page_of(a).text
    logits = a.logits.copy()
    label = a.split.labels[0]
    logits[a.split.labels == label] = np.eye(100)[label]  # B is right on all of this class
    b = replace(a, logits=logits, scores=metrics.score(logits, a.split.labels, a.data.superclass_of))
    tags = page_of(replace(a, against=b))
    gained = int((~a.correct[a.split.labels == label]).sum())
    (row,) = report.class_changes(replace(a, against=b))
    assert gained > 0 and row == (a.data.classes[label], 0, gained, -gained)
    single, averaged = report.comparison_rows(replace(a, against=b))
    assert single[1] == f"{a.scores.top1_percent:.2f}" and single[2] == f"{b.scores.top1_percent:.2f}"
    assert single[3].startswith(f"-{100 * gained / 150:.2f} ± ") and single[4:6] == ("0", str(gained))
    assert averaged[3:] == ("+0.00 ± 0.00", "0", "0", "1")
    for cell in (*single, *averaged):
        assert cell in tags.text
    assert len(tags.of("h2")) == len(page_of(a).of("h2")) + 1
    same = page_of(replace(a, against=a))
    assert len(same.of("table")) == len(tags.of("table")) - 1, "no class differs"


@pytest.mark.parametrize("wrong", [0, 9])
def test_few_mistakes_are_drawn_and_none_are_said(evaluated: Evaluated, wrong: int) -> None:
    evaluation = evaluated.evaluation
    labels = evaluation.split.labels.copy()
    labels[:wrong] = (labels[:wrong] + 1) % 100
    evaluation = replace(evaluation, logits=np.eye(100)[labels])
    figures = draw_figures(evaluation)
    html = render_page(evaluation, "", figures)
    assert ("confidently_wrong" in figures) == (wrong > 0)
    for text in ("No image was misclassified.", "No class was predicted as another."):
        assert (text in html) == (wrong == 0)
    assert html.count("predicted: ") == wrong


# Runs in the page: notes errors, clicks headings, and leaves what it saw where --dump-dom shows it.
PROBE = """<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message)), true);
addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
addEventListener("load", () => {
  const images = [...document.images];
  const tables = [...document.querySelectorAll("table")];
  const table = tables.find(each => each.caption.textContent.startsWith("Classes"));
  const column = index => [...table.tBodies[0].rows].map(row => row.cells[index].textContent);
  const click = index => table.tHead.rows[0].cells[index].querySelector("button").click();
  const seen = {start: column(1)};
  for (const [key, index] of [["f1_up", 1], ["f1_down", 1], ["precision_down", 2], ["precision_up", 2],
                              ["names_up", 0], ["names_down", 0]]) {
    click(index);
    seen[key] = column(index);
  }
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
def test_page_works_in_a_browser(evaluated: Evaluated, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "page.html"
    page.write_text(evaluated.page.read_text("utf-8").replace("<head>", f"<head>{PROBE}", 1), "utf-8")
    flags = [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--virtual-time-budget=9000", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-dev-shm-usage", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert ":CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(Tags(found.group(0)).text)
    assert seen["problems"] == []
    assert len(seen["widths"]) == 8 and all(seen["widths"])
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
    assert missing, "some class is never predicted"
    assert seen["precision_up"] == [f"{value:.2f}" for value in known] + missing
    assert seen["precision_down"] == [f"{value:.2f}" for value in known[::-1]] + missing
