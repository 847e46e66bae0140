"""The page that evaluate.py leaves: it holds the figures and pictures, and works in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from test_html_page import Tags

from helpers.small_run import NAMES, Evaluated


def test_page_holds_its_pictures_and_leads_nowhere_else(evaluated: Evaluated) -> None:
    html = evaluated.page.read_text("utf-8")
    tags = Tags(html)
    images = tags.of("img")
    assert len(images) == 6
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert (picture.format, str(picture.width)) == ("PNG", image["width"])
        assert len(image["alt"]) > 40
    files = sorted(path.name for path in evaluated.folder.glob("small_*.png"))
    inside = {base64.b64decode(image["src"].partition(",")[2]) for image in images}
    pictures = [name for name in files if name != "small_training_plots.png"]
    assert len(pictures) == 5
    assert all((evaluated.folder / name).read_bytes() in inside for name in pictures)
    assert not re.search(r"https?:|//[a-z]", re.sub(r'src="[^"]*"', "", html))
    leading = [value for _, found in tags.tags for key, value in found.items() if key in ("href", "src")]
    assert all(value.startswith(("#", "data:")) for value in leading)
    assert not list(evaluated.folder.glob(".*.tmp"))


def test_page_says_what_the_json_says(evaluated: Evaluated) -> None:
    tags = Tags(evaluated.page.read_text("utf-8"))
    figures = evaluated.figures
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
def test_page_works_in_a_browser(evaluated: Evaluated, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "page.html"
    page.write_text(evaluated.page.read_text("utf-8").replace("<head>", f"<head>{PROBE}", 1), "utf-8")
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
