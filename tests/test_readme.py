"""The README: its commands exist, its links lead somewhere, and its results are those of the histories."""

import argparse
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
from training import flags

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
PARSERS = {
    "train.py": flags.build_parser,
    "evaluate.py": evaluate.build_parser,
    "predict.py": predict.build_parser,
    "export.py": export.build_parser,
    "experiments.py": experiments.build_parser,
    "benchmark.py": benchmark.build_parser,
}
SCRIPT = re.compile(
    rf"(?:python|torchrun --nproc-per-node=\d+) ({'|'.join(map(re.escape, PARSERS))})([^`|&\n]*)"
)
COMMANDS = sorted({(script, words.strip()) for script, words in SCRIPT.findall(README.replace("\\\n", " "))})


def test_its_commands_are_found() -> None:
    assert {script for script, _ in COMMANDS} == set(PARSERS) and len(COMMANDS) >= 20


@pytest.mark.parametrize(("script", "words"), COMMANDS, ids=" ".join)
def test_a_command_parses(script: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR_DATA", raising=False)
    arguments = shlex.split(words)
    parser: argparse.ArgumentParser = PARSERS[script]()
    if "--help" in arguments:
        assert parser.format_help()
        return
    parser.parse_args(arguments)


def test_its_links_lead_to_files() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets and [target for target in targets if not (REPOSITORY / target).exists()] == []


def test_its_results_are_those_of_the_histories() -> None:
    results = README.split("## Results")[1].split("\n## ")[0]
    own, published = (
        csv_by_epoch(REPOSITORY / target) for target in re.findall(r"\]\(([^)]+history\.csv)\)", results)
    )
    cells = r" \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) %"
    shown = re.findall(rf"^\| (\d+){cells}{cells} \|$", results, re.MULTILINE)
    assert [int(epoch) for epoch, *_ in shown] == [1, 10, 20, 40, 41, 70, 71, 85, 86, 100]
    for epoch, *values in shown:
        assert values == four_figures(own[int(epoch)]) + four_figures(published[int(epoch)]), f"epoch {epoch}"


def csv_by_epoch(path: Path) -> dict[int, dict[str, str]]:
    with open(path, newline="") as file:
        return {int(row["epoch"]): row for row in csv.DictReader(file)}


def four_figures(row: dict[str, str]) -> list[str]:
    """Loss and accuracy, in training and in the test, as the README shows them."""
    columns = ("train_loss", "train_acc_percent", "test_loss", "test_acc_percent")
    return [f"{float(row[name]):.{digits}f}" for name, digits in zip(columns, (4, 2, 4, 2), strict=True)]


def test_the_layout_names_files_that_exist() -> None:
    layout = README.split("## Layout")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+\.py)`", layout)
    assert names and [name for name in names if not (REPOSITORY / name).exists()] == []
