"""What train.py refuses, in one line and before it touches data, and how it stops when it diverges."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import train as train_module
from core.cli import run_main
from helpers import REPOSITORY
from helpers.stand_ins import QUICK, load
from train import main


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "0"],  # by the flag's own parser
        ["--val-split", "50000"],
        ["--limit-train", "100"],  # by the recipe: fewer images than --batch-size
        ["--scheduler", "onecycle", "--milestones", "3"],
        ["--scheduler", "onecycle", "--max-lr", "0.4", "--lr", "0.1"],  # before the recipe is made
        ["--recipe", "best", "--resume"],
        ["--device", "cuda"],
    ],
    ids=" ".join,
)
def test_a_wrong_value_is_one_line_and_exit_2_before_data_is_touched(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, argv: list[str]
) -> None:
    quick.setattr(train_module, "load_dataset", lambda *_, **__: pytest.fail("data was touched"))
    quick.setattr(torch.cuda, "device_count", lambda: 0)
    try:
        code = run_main(lambda: main(["--yes", *argv]), "train.py")
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("train.py: error: ") and err.count("\n") == 1
    assert any(flag in err for flag in ["--batch-size", *argv] if flag.startswith("--"))
    assert not Path("output").exists()


@pytest.mark.parametrize("where", ["file", "under a file", "read-only"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_data_is_touched(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, where: str
) -> None:
    quick.setattr(train_module, "load_dataset", lambda *_, **__: pytest.fail("data was touched"))
    Path("taken").write_text("a file")
    folder = {"file": "taken", "under a file": "taken/deeper", "read-only": "closed"}[where]
    if where == "read-only":
        Path(folder).mkdir(mode=0o500)
        if os.name != "posix" or os.geteuid() == 0:
            pytest.skip("root writes anywhere")
    code = run_main(lambda: main([*QUICK, "--epochs", "1", "--output-dir", folder]), "train.py")
    err = capsys.readouterr().err
    assert code == 1 and err.startswith("train.py: error: ") and err.count("\n") == 1
    assert folder in err
    assert Path("taken").read_text() == "a file"


def test_a_diverging_run_stops_with_its_epoch_batch_and_rate_and_keeps_what_was_saved(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from training.recipe import Recipe

    class Diverges(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            Diverges.calls += 1
            return super().forward(logits, labels) * (math.nan if Diverges.calls == 5 else 1)

    quick.setattr(Recipe, "build_criterion", lambda self: Diverges())
    code = run_main(lambda: main([*QUICK, "--epochs", "4", "--lr", "0.03"]), "train.py")
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1
    assert "NaN or infinite in batch 2 of epoch 2/4 at learning rate 0.03" in err
    last = load("output/CNN_Model_last.pth")
    assert (last["epoch"], last["batches_done"]) == (2, 0)
    assert all(bool(torch.isfinite(value).all()) for value in last["model"].values())


def test_the_program_itself_refuses_a_wrong_value(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), "--batch-size", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train.py: error: argument --batch-size: takes a whole number from 1 to ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
