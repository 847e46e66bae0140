"""The README: its commands exist, its links lead somewhere, and its results are those of the histories."""

import argparse
import csv
import re
import shlex
from pathlib import Path

import pytest

import benchmark_setting
import evaluate
import experiments
import export
import flags
import predict

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
PARSERS = {
    "train.py": flags.build_parser,
    "evaluate.py": evaluate.build_parser,
    "predict.py": predict.build_parser,
    "export.py": export.build_parser,
    "experiments.py": experiments.parser,
    "benchmark.py": benchmark_setting.build_parser,
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


def test_its_results_are_those_of_the_history() -> None:
    results = README.split("## Results")[1].split("\n## ")[0]
    with open(REPOSITORY / re.search(r"\[history\]\((.+?\.csv)\)", results)[1], newline="") as file:
        history = {int(row["epoch"]): row for row in csv.DictReader(file)}
    row = re.compile(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) % \|", re.MULTILINE)
    shown = row.findall(results)
    assert shown
    for epoch, *values in shown:
        kept = history[int(epoch)]
        assert values == [
            f"{float(kept['train_loss']):.4f}",
            f"{float(kept['train_acc_percent']):.2f}",
            f"{float(kept['test_loss']):.4f}",
            f"{float(kept['test_acc_percent']):.2f}",
        ], f"epoch {epoch}"


def test_the_layout_names_files_that_exist() -> None:
    layout = README.split("## Layout")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+\.py)`", layout)
    assert names and [name for name in names if not (REPOSITORY / name).exists()] == []
