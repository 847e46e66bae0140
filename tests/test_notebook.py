"""The notebook runs top to bottom on a subset of the data; the committed one shows all of the real data."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import REPOSITORY
from helpers.tiny_checkpoint import save_tiny_checkpoint

NOTEBOOK = REPOSITORY / "cifar100_eda.ipynb"
FIGURES = 15  # one more where there are trained weights
IMAGES = 600


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """Every output of a MIME type, in order."""
    return [output.data[kind] for output in outputs_of(notebook) if kind in output.get("data", {})]


def real_data() -> Path | None:
    """The folder of the real CIFAR-100, where it is."""
    for folder in (os.environ.get("CIFAR_DATA"), REPOSITORY / "data"):
        if folder and (Path(folder) / "cifar-100-python" / "train").is_file():
            return Path(folder).resolve()
    return None


def test_it_runs_top_to_bottom_on_a_part_of_the_data(tmp_path: Path) -> None:
    """On the real images, with a network's confusions; where they are absent on the synthetic, saying so."""
    data = real_data()
    (tmp_path / "output").mkdir()
    save_tiny_checkpoint(tmp_path / "output" / "tiny_best.pth")
    chosen = {"EDA_DATASET": "cifar100", "CIFAR_DATA": str(data)} if data else {"EDA_DATASET": "synthetic"}
    done = nbformat.read(NOTEBOOK, as_version=4)
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    settings = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "EDA_IMAGES": str(IMAGES)}
    client = NotebookClient(done, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=settings | chosen)
    # the pairs of different labels may be none
    assert len(shown(done, "image/png")) >= FIGURES - 1 + (data is not None)
    texts = shown(done, "text/markdown")
    assert any(f"{IMAGES} training and {IMAGES // 5} test images" in text for text in texts)
    assert ("not CIFAR-100" in texts[0]) == (data is None)
    assert any("tiny_best.pth" in text for text in texts) == (data is not None)
    assert not [output for output in outputs_of(done) if output.output_type in ("error", "stream")]
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "tiny_best.pth"], "it wrote files"


def test_what_is_committed_shows_all_real_data_ran_in_order_and_names_no_machine(committed) -> None:
    assert len(shown(committed, "image/png")) >= FIGURES
    texts = shown(committed, "text/markdown")
    assert "| training | 50,000 |" in texts[0] and "| test | 10,000 |" in texts[0]
    assert not any("ynthetic" in text or "part of the data" in text for text in texts)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for output in outputs_of(committed)} == {"display_data"}
    assert NOTEBOOK.stat().st_size < 3_000_000
    assert committed.metadata.kernelspec.name == "python3"
    for output in outputs_of(committed):
        text = json.dumps({kind: text for kind, text in output.data.items() if kind != "image/png"})
        # a slash after a quote, a blank or nothing begins a path; HTML's closing tags and ratios do not
        assert not re.search(r"(?<![\w<\]])/(tmp|work|root|home|usr)\b", text), text
    assert not any("/tmp" in cell.source or "/work" in cell.source for cell in committed.cells)


def test_results_are_in_no_text_cell(committed: nbformat.NotebookNode) -> None:
    """Numbers in text are computed by cells; only what is cited or chosen stands in prose."""
    cited = {"100", "80", "10", "32x32", "2009", "2020", "6", "41", "1902.00423", "255", "256"}
    chosen = {"2000", "16x16", "1", "0.8", "0.7", "0.6"}
    for cell in committed.cells:
        if cell.cell_type == "markdown":
            numbers = set(re.findall(r"\d[\dx]*(?:\.\d+)?", cell.source))
            assert numbers <= cited | chosen, (numbers - cited - chosen, cell.source)
