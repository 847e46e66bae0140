"""benchmark.py: its table and JSON, its arithmetic, and what the two sides do."""

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
from benchmark import BESIDE_BUSY_CORE, ROWS, ProjectSide, Setting, busy_core, plain_process
from cifar.augment import train_transform
from cifar.dataset import Split
from core.cli import run_main
from core.errors import RunError
from helpers.driver import wait_until_gone
from inspection import plain_recipe
from inspection.plain_recipe import PlainRecipe
from model import build_model, count_macs
from utils import normalize

TINY = Setting("resnet20", 10, "fp32", "cpu", False, workers=0, rounds=2, images=20, steps=3)


@pytest.fixture
def data() -> tuple[Split, Split]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return Split(images, np.arange(20)), Split(images[:4], np.arange(4))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """The processes that the test starts."""
    started, start = [], subprocess.Popen

    def popen(*arguments: object, **options: object) -> subprocess.Popen:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return started


def test_the_table_and_the_json(tmp_path, monkeypatch, capsys) -> None:
    """One run of the command on random images, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "CONVOLUTIONS", ((2, 16, 8),))
    monkeypatch.setattr(benchmark, "precision_name", lambda precision, _: f"{precision} (TF32)")
    flags = "--quick --model resnet20 --device cpu --rounds 2 --images 20 --batch-size 10 --precision fp32"
    flags += " --workers 0 --data-dir none --json speed.json"
    assert benchmark.main(flags.split()) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]

    result = json.loads((tmp_path / "speed.json").read_text())
    for entry in (result[row] for row in ROWS):
        assert entry["ratio"] == pytest.approx(entry["images_per_s"] / entry["plain_images_per_s"])
        low, high = entry["images_per_s_spread"]
        assert 0 < low <= entry["images_per_s"] <= high
    flops = 6 * count_macs(build_model("resnet20")) * result["step"]["images_per_s"]
    assert result["step"]["gflop_per_s"] == pytest.approx(flops / 1e9)
    peak = result["machine"]["convolution_gflop_per_s"]
    assert result["step"]["of_convolution_peak"] == pytest.approx(flops / 1e9 / peak)
    assert result["epoch"]["seconds"] == pytest.approx(50_000 / result["epoch"]["images_per_s"])
    assert result["machine"]["data"] == "random images (CIFAR-100 is not there)"

    printed = capsys.readouterr().out
    positions = [re.search(rf"^{row}  +\d", printed, re.MULTILINE).start() for row in ROWS]
    assert positions == sorted(positions)
    assert f"{result['step']['ratio']:.2f} (" in printed and "fp32 (TF32)" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_both_sides_do_the_same_work(data: tuple[Split, Split]) -> None:
    """Every method: as many images, in as many optimizer steps."""
    train, test = ((split.images, split.labels) for split in data)
    numbers = {"batch_size": TINY.batch_size, "steps": TINY.steps, "workers": 0}
    device, model = torch.device("cpu"), build_model("resnet20")
    plain = PlainRecipe(model, train=train, test=test, device=device, **numbers)
    project = ProjectSide(TINY, *data)
    done: Counter[str] = Counter()
    for side, optimizer in ((plain, plain.optimizer), (project, project.train_step.optimizer)):
        optimizer.register_step_post_hook(lambda *_, side=side: done.update([type(side).__name__]))
    work = {"loader": (20, 0), "step": (30, 3), "evaluation": (4, 0), "epoch": (20, 2)}
    assert set(work) == set(ROWS.values())
    for method, (images, steps) in work.items():
        done.clear()
        assert getattr(plain, method)() == getattr(project, method)() == images
        assert done["PlainRecipe"] == done["ProjectSide"] == steps


def test_the_plain_process_reports_errors_in_one_line(data, monkeypatch, tmp_path, capfd) -> None:
    with plain_process(TINY, *data) as measure_plain:
        assert measure_plain("evaluation") > 0
        with pytest.raises(RunError, match=r"the plain recipe failed: AttributeError: .*no_such_work"):
            measure_plain("no_such_work")
        with pytest.raises(RunError, match="the plain recipe failed: its process ended with exit code 0"):
            measure_plain("evaluation")
    assert capfd.readouterr().err == ""

    monkeypatch.setattr(benchmark, "PLAIN_RECIPE", tmp_path / "ends_at_once.py")
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(3)")
    many = Split(np.zeros((200, 32, 32, 3), np.uint8), np.zeros(200, np.int64))  # more than a pipe holds
    with pytest.raises(RunError, match="exit code 3"), plain_process(TINY, many, many) as measure_plain:
        measure_plain("evaluation")


def test_the_plain_process_and_its_loader_processes_end_with_the_block(data, processes) -> None:
    setting = replace(TINY, workers=1)
    with pytest.raises(KeyboardInterrupt), plain_process(setting, *data) as measure_plain:
        measure_plain("loader")
        raise KeyboardInterrupt
    assert wait_until_gone(processes[0].pid) == []  # it leads its process group


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RunError("the plain recipe failed")])
def test_a_core_is_busy_in_its_row_alone_and_the_process_ends_with_it(processes, error) -> None:
    running: list[tuple[str, int]] = []

    def work(method: str) -> float:
        living = [process for process in processes if process.poll() is None]
        running.append((method, len(living)))
        if error and living:
            raise error
        return 1

    with pytest.raises((KeyboardInterrupt, RunError)) if error else contextlib.nullcontext():
        benchmark.measure(work, work, TINY)
    rows = [(method, int(row == BESIDE_BUSY_CORE)) for row, method in ROWS.items() for _ in range(2)]
    first_round = [row for row in rows if row != ("step", 1)]
    assert running == first_round + (rows[: rows.index(("step", 1)) + 1] if error else rows * 2)
    assert all(process.poll() is not None for process in processes)


def test_the_busy_core_ends_with_its_standard_input_as_where_the_benchmark_is_killed(processes) -> None:
    with busy_core():
        assert processes[0].poll() is None
        processes[0].stdin.close()
        assert processes[0].wait(60) == 0


def test_a_busy_core_that_does_not_start_is_reported(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "BUSY_CORE", "raise SystemExit(3)")
    with pytest.raises(RunError, match="busy core ended with exit code 3"), busy_core():
        pytest.fail("measured beside no busy core")


def test_a_gpu_has_no_row_beside_a_busy_core() -> None:
    assert TINY.rows == tuple(ROWS)
    assert replace(TINY, device="cuda:0").rows == ("loader", "step", "evaluation", "epoch")


def test_the_plain_recipe_imports_the_network_alone() -> None:
    """So that no setting of the project reaches it."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", code, str(benchmark.PLAIN_RECIPE)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.split()
    assert "albumentations" in loaded
    assert not {"core", "cifar", "training", "inspection", "utils"} & set(loaded)


def test_the_plain_recipe_is_the_reference_recipe(data: tuple[Split, Split]) -> None:
    """Its numbers are copies of the project's: normalisation and augmentation."""
    images, labels = data[0].images, data[0].labels
    image, label = plain_recipe.PlainDataset((images, labels), plain_recipe.TEST_TRANSFORM)[3]
    assert label == 3 and image.dtype == torch.float32
    torch.testing.assert_close(image, normalize(torch.from_numpy(images))[3], rtol=0, atol=1e-5)

    def described(transforms: list) -> list[tuple[str, dict]]:
        return [(type(step).__name__, step.get_transform_init_args()) for step in transforms]

    *augmentations, _, _ = plain_recipe.TRAIN_TRANSFORM.transforms
    assert described(augmentations) == described(train_transform("reference").transforms)


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    rates = {"plain step": [7, 100, 110, 400], "project step": [7, 250, 220, 300]}

    def work(name: str) -> float:
        order.append(name)
        return rates.get(name, [1] * 4)[order.count(name) - 1]

    setting = replace(TINY, device="cuda:0", rounds=3)
    plain, project = (lambda row, side=side: work(f"{side} {row}") for side in ("plain", "project"))
    summaries = benchmark.measure(plain, project, setting)
    assert order == [f"{side} {row}" for row in setting.rows for side in ("plain", "project")] * 4
    assert summaries["step"] == {
        "images_per_s": 250,
        "images_per_s_spread": [220, 300],
        "plain_images_per_s": 110,
        "plain_images_per_s_spread": [100, 400],
        "ratio": pytest.approx(250 / 110),  # of the medians
        "ratio_spread": [0.75, 2.5],  # of each round's ratio
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--images 9 --batch-size 10", "--images takes 10 (the batch size) to 50000, not 9"),
        ("--images 50001", "--images takes 128 (the batch size) to 50000, not 50001"),
        ("--json no/such/x.json", "cannot write no/such/x.json: there is no folder no/such"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert run_main(lambda: benchmark.main([*flags.split(), "--device", "cpu"]), "benchmark.py") == 2
    assert capsys.readouterr().err == f"benchmark.py: error: {message}\n"


def test_the_images_are_the_real_ones_where_they_are(real_data_dir: Path) -> None:
    train, test, name = benchmark.load_images(real_data_dir, 50)
    assert (len(train), len(test), name) == (50, 10, "CIFAR-100")
