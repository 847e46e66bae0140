"""README and CONTRIBUTING: commands parse, links and names lead to files, results are the histories'."""

import csv
import re
import shlex
from pathlib import Path

import pytest

import benchmark
import evaluate
import experiments
import export
import predict
from training import settings

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {name: (REPOSITORY / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README = PAGES["README.md"]
PARSERS = {
    "train.py": settings.build_parser,
    "evaluate.py": evaluate.build_parser,
    "predict.py": predict.build_parser,
    "export.py": export.build_parser,
    "experiments.py": experiments.build_parser,
    "benchmark.py": benchmark.build_parser,
}
SCRIPT = re.compile(rf"(?:python|torchrun(?: --[\w=-]+)+) ({'|'.join(map(re.escape, PARSERS))})([^`|&\n]*)")
COMMANDS = sorted(
    {
        (script, words.strip())
        for page in PAGES.values()
        for script, words in SCRIPT.findall(page.replace("\\\n", " "))
    }
)


@pytest.mark.parametrize(("script", "words"), COMMANDS)
def test_a_command_parses(script: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {script for script, _ in COMMANDS} == set(PARSERS)
    monkeypatch.delenv("CIFAR_DATA", raising=False)
    if "--help" not in words:
        PARSERS[script]().parse_args(shlex.split(words))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_lead_to_files(page: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in target]
    names = re.findall(r"`([\w/]+\.(?:py|toml))`", PAGES[page])
    assert names and [name for name in {*targets, *names} if not (REPOSITORY / name).exists()] == []


def test_the_layout_shows_every_module() -> None:
    picture = README.split("## Layout")[1].split("```")[1]
    shown, package = set(), ""
    for indent, name in re.findall(r"^( *)(\S+)", picture, re.MULTILINE):
        if name.endswith("/"):
            package = name
        else:
            shown.add(package + name if indent else name)
    folders = (".", "core", "cifar", "training", "inspection")
    found = [path for folder in folders for path in (REPOSITORY / folder).glob("[!_]*.py")]
    assert shown == {path.relative_to(REPOSITORY).as_posix() for path in found}


def test_the_reference_runs_table_is_that_of_the_histories() -> None:
    folder = REPOSITORY / "docs" / "runs" / "resnet56_reference"
    page = (folder / "README.md").read_text("utf-8")
    own, published = (csv_by_epoch(folder / name) for name in ("history.csv", "published_history.csv"))
    cells = r" \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) %"
    shown = re.findall(rf"^\| (\d+){cells}{cells} \|$", page, re.MULTILINE)
    assert [int(epoch) for epoch, *_ in shown] == [1, 10, 20, 40, 41, 70, 71, 85, 86, 100]
    for epoch, *values in shown:
        assert values == four_metrics(own[int(epoch)]) + four_metrics(published[int(epoch)]), f"epoch {epoch}"


def csv_by_epoch(path: Path) -> dict[int, dict[str, str]]:
    with open(path, newline="") as file:
        return {int(row["epoch"]): row for row in csv.DictReader(file)}


def four_metrics(row: dict[str, str]) -> list[str]:
    """Loss and accuracy, in training and in the test, as the README shows them."""
    columns = ("train_loss", "train_acc_percent", "test_loss", "test_acc_percent")
    return [f"{float(row[name]):.{digits}f}" for name, digits in zip(columns, (4, 2, 4, 2), strict=True)]
