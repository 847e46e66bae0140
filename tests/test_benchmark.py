"""benchmark.py: its JSON, its arithmetic, and that it measures the project's own functions."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import benchmark
import benchmark_pairs
import measuring
import plain_recipe
import plain_side
from benchmark_setting import Setting, build_parser, setting_of
from cifar.dataset import Split
from core.cli import run_main
from core.errors import RunError, UsageError
from measuring import Pair, Sample
from model import build_model, count_macs

TINY = [
    *("--quick", "--model", "resnet20", "--device", "cpu", "--rounds", "2", "--images", "20"),
    *("--batch-size", "10", "--precision", "fp32", "--workers", "0"),
]


@pytest.fixture
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peaks from arrays so small that they take no time."""
    monkeypatch.setattr(measuring, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(measuring, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(measuring, "CONVOLUTIONS", ((2, 16, 8),))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the functions of interest was called in this process."""
    counts: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object, **options: object) -> object:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("make_train_loader", "make_test_batches", "train_one_epoch", "evaluate"):
        counted(benchmark_pairs, name)
    counted(benchmark_pairs.TrainStep, "__call__")
    counted(plain_recipe, "train_step")
    return counts


def tiny_setting(*flags: str) -> Setting:
    return setting_of(build_parser().parse_args([*TINY, *flags]))


def tiny_data() -> tuple[Split, Split]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return Split(images, np.arange(20)), Split(images[:4], np.arange(4))


def sample(rate: float, core_rate: float | None = None) -> Sample:
    return Sample(100, 100 / rate, 100 / (core_rate or rate))


def test_the_command_gives_a_table_and_the_same_as_json(
    small_peaks: None,
    calls: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """One run: the schema, the calls to the project's functions, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    monkeypatch.setattr(benchmark, "precision_name", lambda precision, _: f"{precision} (TF32)")
    flags = [*TINY, "--data-dir", str(tmp_path / "none"), "--batch-sizes", "4", "--json", "speed.json"]
    assert benchmark.main(flags) == 0

    runs = 3  # two rounds and the unmeasured one
    assert calls["train_one_epoch"] == runs
    assert calls["evaluate"] == 2 * runs  # alone, and in the epoch
    assert calls["__call__"] == (2 + 5 + 2) * runs  # two steps of 10, five of 4, and the epoch's two
    assert calls["train_step"] == 0  # the plain recipe's are another process's
    assert calls["make_train_loader"] == calls["make_test_batches"] == 1
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]

    result = json.loads((tmp_path / "speed.json").read_text())
    assert set(result) >= {"loader", "step", "evaluation", "epoch", "batch_sizes", "machine", "setting"}
    assert {"images_per_s_per_core", "images_per_s", "ratio", "workers"} <= set(result["loader"])
    for name in ("step", "evaluation", "epoch"):
        entry = result[name]
        assert entry["ratio"] == pytest.approx(entry["images_per_s"] / entry["plain_images_per_s"])
        low, high = entry["images_per_s_spread"]
        assert 0 < low <= entry["images_per_s"] <= high
    assert set(result["batch_sizes"]) == {"4"}
    for name in ("matrix_gflop_per_s", "convolution_gflop_per_s", "copy_gbyte_per_s"):
        assert result["machine"][name] > 0
    assert result["machine"]["data"] == "random images (CIFAR-100 is not there)"
    assert result["setting"]["epoch_test_images"] == 4
    assert result["epoch"]["seconds"] == pytest.approx(50_000 / result["epoch"]["images_per_s"])

    printed = capsys.readouterr().out
    for words in ("loader, one core", "training step", "evaluation", "epoch, with its test", "random images"):
        assert words in printed
    assert "plain: fp32 (TF32), NCHW, eager; project: fp32 (TF32), channels_last, eager" in printed
    assert f"{result['step']['ratio']:.2f}" in printed
    assert max(len(line) for line in printed.splitlines()) <= 120


def test_both_sides_do_the_same_work_under_the_same_names(calls: Counter[str]) -> None:
    setting, data = tiny_setting("--batch-sizes", "4", "10"), tiny_data()
    plain = plain_side.plain_works(setting, data)
    project = benchmark_pairs.project_works(setting, data, benchmark_pairs.make_step(setting))
    assert list(plain) == list(project) == ["loader 0", "step 10", "step 4", "evaluation", "epoch"]
    for name, work in plain.items():
        calls.clear()
        assert work() == project[name]()
        assert (
            calls["train_step"] == calls["__call__"] == {"step 10": 2, "step 4": 5, "epoch": 2}.get(name, 0)
        )


def test_the_plain_sides_errors_are_one_line() -> None:
    with plain_side.PlainSide(tiny_setting(), tiny_data()) as plain:
        assert plain.measure("evaluation").images == 4
        with pytest.raises(RunError, match="the plain recipe failed: KeyError: 'no such work'"):
            plain.measure("no such work")
        with pytest.raises(RunError, match="the plain recipe's process ended with exit code 0"):
            plain.measure("evaluation")
    assert not multiprocessing.active_children()


def test_ratio_is_of_medians_and_spread_of_rounds() -> None:
    samples = [(sample(100), sample(250)), (sample(110), sample(220)), (sample(400), sample(300))]
    entry = measuring.summary(samples)
    assert entry["images_per_s"] == pytest.approx(250)
    assert entry["plain_images_per_s"] == pytest.approx(110)
    assert entry["ratio"] == pytest.approx(250 / 110)
    assert entry["images_per_s_spread"] == pytest.approx([220, 300])
    assert entry["plain_images_per_s_spread"] == pytest.approx([100, 400])
    assert entry["ratio_spread"] == pytest.approx([0.75, 2.5])


def test_processor_time_is_kept_apart_from_the_clock() -> None:
    samples = [(sample(10, core_rate=100), sample(40, core_rate=150))]
    assert measuring.summary(samples)["ratio"] == pytest.approx(4)
    assert measuring.summary(samples)["cpu_time_ratio"] == pytest.approx(1.5)
    per_core = measuring.summary(samples, per_core=True)
    assert per_core["images_per_s_per_core"] == pytest.approx(150)
    assert per_core["ratio"] == pytest.approx(1.5)
    assert "cpu_time_ratio" not in measuring.summary(samples, own_cpu=False)


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def work(name: str) -> Sample:
        order.append(name)
        return sample(1)

    pairs = [Pair(lambda n=n: work(n + " plain"), lambda n=n: work(n + " project")) for n in "ab"]
    ticks: list[object] = []
    measuring.measure(pairs, 2, lambda: ticks.append(None))
    assert order == ["a plain", "a project", "b plain", "b project"] * 3
    assert [len(pair.samples) for pair in pairs] == [2, 2]
    assert len(ticks) == 2 * 2 * 3


def test_flops_and_bytes_of_a_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    moved = 3 * 32 * 32 + 4 * 32 * 32 + 5 * 4 * 32 * 32
    assert measuring.step_bytes(model, 4) == 3 * 4 * moved
    assert model.training and int(model[1].num_batches_tracked) == 0
    network = build_model("resnet20")
    setting = tiny_setting()
    machine = {"convolution_gflop_per_s": 100.0, "matrix_gflop_per_s": 200.0, "copy_gbyte_per_s": 10.0}
    got = benchmark.achieved({"images_per_s": 1000.0}, setting, network, machine)
    assert got["gflop_per_s"] == pytest.approx(6 * count_macs(network) * 1000 / 1e9)
    assert got["of_convolution_peak"] == pytest.approx(got["gflop_per_s"] / 100)
    assert got["of_copy_rate"] == pytest.approx(got["gbyte_per_s_estimated"] / 10)


@pytest.mark.parametrize(
    ("arithmetic", "memory", "words"), [(0.7, 0.5, "arithmetic"), (0.5, 0.7, "memory"), (0.1, 0.2, "neither")]
)
def test_the_bound_is_the_nearest_limit(arithmetic: float, memory: float, words: str) -> None:
    assert words in benchmark.bound({"of_convolution_peak": arithmetic, "of_copy_rate": memory})


def test_plain_side_is_the_reference_recipe_a_sample_at_a_time() -> None:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), np.arange(5))
    images, labels = next(iter(plain_recipe.make_loader(split, 4, train=False)))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32 and images.is_contiguous()
    assert labels.tolist() == [0, 1, 2, 3]
    expected = plain_side.normalize(torch.from_numpy(split.images[:4]))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    names = [type(step).__name__ for step in plain_recipe.train_pipeline().transforms]
    assert names == [
        *("HorizontalFlip", "Affine", "CoarseDropout", "ColorJitter", "Normalize", "ToTensorV2"),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "9", "--batch-size", "10"], "--images 9 is not from the batch size, 10, to 50000"),
        (["--images", "50001"], "--images 50001 is not"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_measured(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        benchmark.main([*flags, "--device", "cpu"])


def test_an_error_is_one_line(capsys: pytest.CaptureFixture) -> None:
    flags = ["--images", "9", "--batch-size", "10", "--device", "cpu"]
    assert run_main(lambda: benchmark.main(flags), "benchmark.py") == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: error: --images 9") and error.count("\n") == 1


def test_images_are_the_real_ones_where_they_are(real_data_dir: Path) -> None:
    splits, note = benchmark.load_images(real_data_dir, 50, 10)
    assert note == "CIFAR-100"
    assert [len(split.labels) for split in splits] == [50, 10]
