"""benchmark.py: its table and JSON, its arithmetic, and what the two sides do."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
from benchmark import ProjectSide, Row, Setting, make_rows, plain_process
from cifar.augment import train_transform
from cifar.dataset import Split
from core.cli import run_main
from core.errors import RunError, UsageError
from inspection import plain_recipe
from inspection.plain_recipe import PlainRecipe
from model import build_model, count_macs
from utils import normalize

TINY = [
    *("--quick", "--model", "resnet20", "--device", "cpu", "--rounds", "2", "--images", "20"),
    *("--batch-size", "10", "--precision", "fp32", "--workers", "0"),
]
LOADER = "loader, in the training process"


def tiny_setting(*flags: str) -> Setting:
    return benchmark.setting_from(benchmark.build_parser().parse_args([*TINY, *flags]))


@pytest.fixture
def data() -> tuple[Split, Split]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return Split(images, np.arange(20)), Split(images[:4], np.arange(4))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the project's functions was called in this process."""
    counts: Counter[str] = Counter()

    def count_calls(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object, **options: object) -> object:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("make_train_loader", "make_test_batches", "train_one_epoch", "evaluate"):
        count_calls(benchmark, name)
    count_calls(benchmark.TrainStep, "__call__")
    return counts


def test_the_table_and_the_json_hold_what_the_projects_functions_reach(
    calls: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """One run of the command on random images, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "CONVOLUTIONS", ((2, 16, 8),))
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    monkeypatch.setattr(benchmark, "precision_name", lambda precision, _: f"{precision} (TF32)")
    flags = [*TINY, "--data-dir", str(tmp_path / "none"), "--batch-sizes", "4", "--json", "speed.json"]
    assert benchmark.main(flags) == 0

    runs = 3  # two rounds and the unmeasured one
    assert calls["train_one_epoch"] == runs
    assert calls["evaluate"] == 2 * runs  # alone, and in the epoch
    assert calls["__call__"] == (2 + 5 + 2) * runs  # two steps of 10, five of 4, and the epoch's two
    assert calls["make_train_loader"] == calls["make_test_batches"] == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]

    result = json.loads((tmp_path / "speed.json").read_text())
    for entry in (
        *(result[name] for name in ("loader", "step", "evaluation", "epoch")),
        result["batch_sizes"]["4"],
    ):
        assert entry["ratio"] == pytest.approx(entry["images_per_s"] / entry["plain_images_per_s"])
        low, high = entry["images_per_s_spread"]
        assert 0 < low <= entry["images_per_s"] <= high
    assert result["loader"]["workers"] == 0
    assert result["loader"]["images_per_s_per_core"] == result["loader"]["images_per_s"]
    flops = 6 * count_macs(build_model("resnet20")) * result["step"]["images_per_s"]
    assert result["step"]["gflop_per_s"] == pytest.approx(flops / 1e9)
    peak = result["machine"]["convolution_gflop_per_s"]
    assert result["step"]["of_convolution_peak"] == pytest.approx(flops / 1e9 / peak)
    assert result["epoch"]["seconds"] == pytest.approx(50_000 / result["epoch"]["images_per_s"])
    assert result["machine"]["data"] == "random images (CIFAR-100 is not there)"
    assert result["setting"]["epoch_test_images"] == 4

    printed = capsys.readouterr().out
    rows = (LOADER, "training step", "evaluation", "epoch with its test", "step at batch 4")
    positions = [printed.index(f"\n{name} ") for name in rows]
    assert positions == sorted(positions)
    assert f"{result['step']['ratio']:.2f} (" in printed and "random images" in printed
    assert max(len(line) for line in printed.splitlines()) <= 120


def test_both_sides_do_the_same_work(
    data: tuple[Split, Split], calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row, with the plain recipe in this process too: as many images, in as many steps."""
    setting = tiny_setting("--batch-sizes", "4", "10", "4")
    arrays = ((split.images, split.labels) for split in data)
    plain = PlainRecipe(
        build_model("resnet20"),
        **dict(zip(("train", "test"), arrays, strict=True)),
        batch_size=10,
        workers=setting.workers,
        step_sizes=setting.batch_sizes,
        device=setting.device,
    )
    plain_step = plain.optimizer.step
    monkeypatch.setattr(plain.optimizer, "step", lambda: (calls.update(["plain"]), plain_step()))
    monkeypatch.setattr(benchmark, "images_per_s", lambda work, _: work())
    rows = make_rows(
        setting, lambda method, **options: getattr(plain, method)(**options), ProjectSide(setting, *data)
    )
    done = {}
    for row in rows:
        calls.clear()
        images = row.plain()
        assert row.project() == images
        assert calls["plain"] == calls["__call__"]
        done[row.name] = (images, calls["plain"])
    assert done == {
        LOADER: (20, 0),
        "training step": (20, 2),
        "evaluation": (4, 0),
        "epoch with its test": (20, 2),
        "step at batch 4": (20, 5),
    }


def test_the_plain_process_reports_errors_in_one_line(
    data: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with plain_process(tiny_setting(), *data) as measure_plain:
        assert measure_plain("evaluation") > 0
        with pytest.raises(RunError, match=r"the plain recipe failed: AttributeError: .*no_such_work"):
            measure_plain("no_such_work")
        with pytest.raises(RunError, match="the plain recipe failed: its process ended with exit code 0"):
            measure_plain("evaluation")
    assert capfd.readouterr().err == ""

    monkeypatch.setattr(benchmark, "PLAIN_RECIPE", tmp_path / "ends_at_once.py")
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(3)")
    many = Split(np.zeros((200, 32, 32, 3), np.uint8), np.zeros(200, np.int64))  # more than a pipe holds
    with (
        pytest.raises(RunError, match="exit code 3"),
        plain_process(tiny_setting(), many, many) as measure_plain,
    ):
        measure_plain("evaluation")


def test_the_plain_process_ends_with_its_block(
    data: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "EXIT_TIMEOUT_S", 120.0)  # on a loaded machine
    processes = []
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *args, **options: processes.append(start(*args, **options)) or processes[0],
    )
    with pytest.raises(KeyboardInterrupt), plain_process(tiny_setting(), *data) as measure_plain:
        measure_plain("evaluation")
        raise KeyboardInterrupt
    assert processes[0].returncode == 0


def test_the_plain_recipe_imports_the_network_alone() -> None:
    """So that no setting of the project reaches it."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", code, str(benchmark.PLAIN_RECIPE)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.split()
    assert "albumentations" in loaded
    assert not {"core", "cifar", "training", "inspection", "utils"} & set(loaded)


def test_the_plain_recipe_is_the_reference_recipe(data: tuple[Split, Split]) -> None:
    """Its numbers are copies of the project's: normalisation and augmentation."""
    images = data[0].images
    dataset = plain_recipe.PlainDataset((images, data[0].labels), plain_recipe.TEST_TRANSFORM)
    image, label = dataset[3]
    assert label == 3 and image.dtype == torch.float32
    torch.testing.assert_close(image, normalize(torch.from_numpy(images))[3], rtol=0, atol=1e-5)

    def described(transforms: list) -> list[tuple[str, dict]]:
        return [(type(step).__name__, step.get_transform_init_args()) for step in transforms]

    *augmentations, _, _ = plain_recipe.TRAIN_TRANSFORM.transforms
    assert described(augmentations) == described(train_transform("reference").transforms)


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    rates = {"a plain": [7, 100, 110, 400], "a project": [7, 250, 220, 300]}
    rates |= {"b plain": [1, 2, 3, 4], "b project": [5, 6, 7, 8]}

    def work(name: str) -> float:
        order.append(name)
        return rates[name][order.count(name) - 1]

    rows = [Row(n, lambda n=n: work(n + " plain"), lambda n=n: work(n + " project")) for n in "ab"]
    ticks: list[None] = []
    summaries = benchmark.measure(rows, 3, lambda: ticks.append(None))
    assert order == ["a plain", "a project", "b plain", "b project"] * 4
    assert len(ticks) == len(order)
    assert summaries["a"] == {
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
        (["--images", "9", "--batch-size", "10"], r"--images takes 10 \(the batch size\) to 50000, not 9"),
        (["--images", "50001"], "--images takes .* not 50001"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    argv = [*flags, "--device", "cpu"]
    with pytest.raises(UsageError, match=message):
        benchmark.main(argv)
    assert run_main(lambda: benchmark.main(argv), "benchmark.py") == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: error: --") and error.count("\n") == 1


def test_the_images_are_the_real_ones_where_they_are(real_data_dir: Path) -> None:
    train, test, name = benchmark.load_images(real_data_dir, 50, 10)
    assert name == "CIFAR-100"
    assert [len(split.labels) for split in (train, test)] == [50, 10]
