"""Training on a GPU, on synthetic images, for whoever has one: `python -m pytest -m cuda -n 0`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core.cli import LOG
from core.machine import fastest_precision
from helpers import REPOSITORY
from helpers.driver import digests
from model import build_model
from training.engine import TrainStep
from training.recipe import Recipe
from training.techniques import build_techniques

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RUN = ["train.py", "--dataset", "synthetic", "--device", DEVICE.type, "--model", "resnet20"]
SHORT = [*RUN, "--yes", "--lr", "0.05", "--limit-train", "2560", "--limit-test", "500", "--epochs", "3"]


def run(*command: object, answers: str = "", **environment: str) -> str:
    """Run a script of the repository; what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=os.environ | environment,
        input=answers,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    "techniques",
    [
        {},
        {"accumulate": 2},
        {"sam": "sam"},
        {"sam": "sam", "sam_start": 2},  # compiled anew, without CUDA graphs
        {"mix": "both"},
        {"ema_decay": 0.9},
        {"image_sizes": (24, 32)},
    ],
    ids=str,
)
def test_compiled_steps_agree_with_eager_ones(techniques: dict, caplog, monkeypatch) -> None:
    monkeypatch.setattr(LOG, "propagate", True)  # to caplog
    precision = fastest_precision(DEVICE)
    recipe = Recipe(model="resnet20", lr=0.01, epochs=2, milestones=(1,), precision=precision, **techniques)
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 64, 32, 32, 3), dtype=torch.uint8, generator=draws).to(DEVICE)
    labels = torch.randint(0, 100, (6, 64), generator=draws).to(DEVICE)
    losses = {}
    for compile_batch_size in (None, 64):
        torch.manual_seed(0)
        model = build_model(recipe.model).to(DEVICE, memory_format=torch.channels_last)
        optimizer = recipe.build_optimizer(model)
        step = TrainStep(
            model,
            recipe.build_criterion(),
            optimizer,
            recipe.build_scheduler(optimizer, 3),
            precision=precision,
            compile_batch_size=compile_batch_size,
            techniques=build_techniques(recipe, model, classes=100, batches_per_epoch=3),
        )
        model.train()
        losses[compile_batch_size] = [
            step(*batch)[0].item() / 64 for batch in zip(images, labels, strict=True)
        ]
    assert step.compiled is not None and "torch.compile failed" not in caplog.text
    assert losses[64] == pytest.approx(losses[None], rel=0.05)


def test_a_run_is_evaluated_on_a_machine_without_cuda(tmp_path: Path) -> None:
    assert f"Device:   {torch.cuda.get_device_name(DEVICE)}, " in run(*SHORT, "--output-dir", tmp_path)
    weights = tmp_path / "CNN_Model_synthetic_best.pth"
    flags = ["--limit-test", "200", "--output-dir", tmp_path]
    assert "Top-1 accuracy" in run("evaluate.py", "--weights", weights, *flags, CUDA_VISIBLE_DEVICES="")


def test_a_deterministic_run_repeats_and_resumes_after_a_kill_to_the_same_bytes(tmp_path: Path) -> None:
    whole, again, cut = (tmp_path / name for name in ("whole", "again", "cut"))
    flags = [*SHORT, "--deterministic", "--output-dir"]
    for folder in (whole, again):
        run(*flags, folder)
    expected = digests(whole, "CNN_Model_synthetic")
    assert digests(again, "CNN_Model_synthetic") == expected
    with subprocess.Popen(
        [sys.executable, *flags, str(cut)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        log, end = cut / "CNN_Model_synthetic_log.txt", time.monotonic() + 300
        while not (log.exists() and "Epoch [1/" in log.read_text("utf-8")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.kill()
    run(
        "train.py",
        "--resume",
        cut / "CNN_Model_synthetic_last.pth",
        "--device",
        DEVICE.type,
        "--deterministic",
    )
    assert digests(cut, "CNN_Model_synthetic") == expected


def test_two_epochs_of_resnet56_by_three_answers(tmp_path: Path) -> None:
    flags = ["--model", "resnet56", "--compile", "on", "--output-dir", tmp_path]
    output = run(*RUN, *flags, answers="y\ny\n2\n")
    assert "LR finder: suggested LR" in output and "Epoch [2/2]" in output
    assert "torch.compile failed" not in output
