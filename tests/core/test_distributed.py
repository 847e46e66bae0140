"""Several processes as one run: two gloo processes on the CPU against one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from cifar.dataset import Split, load_dataset
from core import cli, distributed
from helpers.small_net import batches_of, make_step, small_net
from helpers.small_net import train as small_net_train
from model import build_model
from training import engine
from training import run as run_module
from training.recipe import Recipe
from utils import TrainBatchSampler, make_test_batches, make_train_loader

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 240  # for a start on a busy machine; nothing takes a tenth of it on an idle one
TINY = [
    *("--yes", "--dataset", "synthetic", "--model", "resnet20", "--device", "cpu", "--precision", "fp32"),
    *("--compile", "off", "--workers", "0", "--name", "tiny_synthetic"),
]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes, each the leader of a group of its own, that are killed at the test's end at the latest."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"} | more


def torchrun(folder: Path, *flags: str) -> subprocess.Popen:
    """`torchrun --nproc-per-node=2 train.py` in `folder`, its output in out.txt and err.txt there."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]
    command = [*launcher, free_port(), str(REPOSITORY / "train.py"), *TINY, "--output-dir", "output", *flags]
    return start(command, folder, "", environment())


def start(command: list[str], folder: Path, suffix: str, env: dict[str, str]) -> subprocess.Popen:
    with open(folder / f"out{suffix}.txt", "w") as out, open(folder / f"err{suffix}.txt", "w") as err:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=env)


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def wait_for(condition: object, process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s"
        time.sleep(0.05)


def running_in(folder: Path) -> list[int]:
    """The processes (Linux: from /proc) whose working folder is `folder`, zombies left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and Path(os.readlink(entry / "cwd")) == folder.resolve():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)


def test_two_processes_with_sync_bn_train_as_one(
    tmp_path: Path, started: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 201 images in batches of 64 end in one of 9, 5 and 4 for the two processes; 151 test images are odd.
    # The rate is low because an untrained network amplifies rounding: at 0.1, weights that differ by 1e-7
    # of their size differ by 0.05 after five steps in one process too.
    flags = ["--epochs", "1", "--lr", "0.001", "--batch-size", "64", "--augment", "none"]
    flags += ["--limit-train", "221", "--val-split", "20", "--limit-test", "151", "--test-batch-size", "40"]
    two = torchrun(tmp_path, *flags, "--sync-bn")
    started.append(two)
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, *flags, "--sync-bn", "--output-dir", "alone"]) == 0
    assert two.wait(timeout=PATIENCE_S) == 0, (tmp_path / "err.txt").read_text()[-2000:]

    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("alone", "output")]
    assert files[0] == files[1]
    ours, theirs = (load(tmp_path / name / "tiny_synthetic_last.pth") for name in ("alone", "output"))
    torch.manual_seed(0)
    start_weights = build_model("resnet20").state_dict()
    moved = 0.0
    for name, value in ours["model"].items():
        torch.testing.assert_close(theirs["model"][name], value, rtol=0, atol=1e-4, msg=name)
        if "running" not in name and "num_batches" not in name:
            moved = max(moved, float((value - start_weights[name]).abs().max()))
    assert moved > 1e-3, "a test of nothing: the weights hardly moved"
    for key, value in ours["history"][0].items():
        assert theirs["history"][0][key] == pytest.approx(value, abs=1e-3), key

    tests = [
        load(tmp_path / n / "tiny_synthetic_training_results.pth")["final_test"] for n in ("alone", "output")
    ]
    for kind in ("best", "last"):
        assert tests[1][kind]["images"] == tests[0][kind]["images"] == 151
        assert tests[1][kind]["loss"] == pytest.approx(tests[0][kind]["loss"], abs=1e-3)
    assert (tmp_path / "out.txt").read_text().count("Epoch [1/1]") == 1  # the main process alone speaks


def test_an_interrupt_saves_and_one_process_goes_on(
    tmp_path: Path, started: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--epochs", "200", "--lr", "0.05", "--batch-size", "64", "--limit-train", "320"]
    two = torchrun(tmp_path, *flags, "--limit-test", "101")
    started.append(two)
    history = tmp_path / "output" / "tiny_synthetic_history.csv"
    wait_for(history.exists, two, "history")
    two.send_signal(signal.SIGINT)
    two.wait(timeout=PATIENCE_S)
    assert two.returncode != 0
    assert running_in(tmp_path) == []
    text = (tmp_path / "out.txt").read_text()
    assert text.count("Stopped in epoch") == 1
    assert (tmp_path / "err.txt").read_text().count("saving after this batch") == 1

    # the tested weights are those in the checkpoint, BatchNorm statistics and all
    best = load(tmp_path / "output" / "tiny_synthetic_best.pth")
    model = build_model("resnet20")
    model.load_state_dict(best["model"])
    test = train.splits(load_dataset("synthetic", tmp_path), Recipe.from_dict(best["recipe"]))[1]
    again = engine.evaluate(model, make_test_batches(test, 5000, "cpu"))
    row = best["history"][best["epoch"] - 1]
    assert again.images == 101
    assert again.loss == pytest.approx(row["test_loss"], rel=1e-4)
    assert again.accuracy_percent == pytest.approx(row["test_acc_percent"])

    state = load(tmp_path / "output" / "tiny_synthetic_last.pth")
    finish_epoch = run_module.Run.finish_epoch

    def finish_one_epoch(self: run_module.Run, *args: object) -> None:
        finish_epoch(self, *args)
        raise run_module.Interrupted

    monkeypatch.setattr(run_module.Run, "finish_epoch", finish_one_epoch)
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "output/tiny_synthetic_last.pth", "--device", "cpu", "--workers", "0"])
    resumed = load(tmp_path / "output" / "tiny_synthetic_last.pth")
    assert resumed["epoch"] == state["epoch"] + 1
    assert resumed["history"][:-1] == state["history"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_the_death_of_a_process_ends_the_other(tmp_path: Path, started: list) -> None:
    """Without torchrun, which would end it too: within seconds, with one line, and its files are whole."""
    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        *TINY,
        "--output-dir",
        "output",
        "--epochs",
        "200",
    ]
    command += ["--lr", "0.05", "--batch-size", "64", "--limit-train", "320", "--limit-test", "100"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for rank in ("0", "1"):
        started.append(start(command, tmp_path, rank, environment(**place, RANK=rank, LOCAL_RANK=rank)))
    first, second = started
    wait_for((tmp_path / "output" / "tiny_synthetic_last.pth").exists, first, "checkpoint")
    second.kill()
    assert first.wait(timeout=60) == 1
    assert running_in(tmp_path) == []
    error = (tmp_path / "err0.txt").read_text()
    assert "another process of this run ended" in error and "Traceback" not in error
    assert (tmp_path / "out1.txt").read_text() == ""
    assert load(tmp_path / "output" / "tiny_synthetic_last.pth")["kind"] == "last"
    assert not (tmp_path / "output" / "tiny_synthetic.lock").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_batch_that_does_not_divide_is_one_line_and_exit_code_2(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "ERROR_DELAY_S", 0.0)
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--batch-size", "65"]
    assert cli.run_main(lambda: train.main(flags), "train.py") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "train.py: error: --batch-size 65 does not divide by 2 processes\n"
    assert list(tmp_path.iterdir()) == []


def test_other_processes_hold_their_message_back(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)

    def fail() -> int:
        raise cli.UsageError("no")

    assert cli.run_main(fail, "train.py") == 2 and waits == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.run_main(fail, "train.py") == 2 and waits == [cli.ERROR_DELAY_S]


def test_only_the_loss_of_another_process_is_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[pair.cc:525] Connection closed by peer [127.0.0.1]:4711")
    assert not distributed.is_peer_failure(closed)  # one process has no other
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.is_peer_failure(closed)
    assert distributed.is_peer_failure(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not distributed.is_peer_failure(RuntimeError("shapes do not fit"))
    assert not distributed.is_peer_failure(ValueError("Connection closed by peer"))


def test_each_process_draws_its_own_augmentations_on_its_own_part() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    split = Split(np.repeat(image[None], 64, axis=0), np.arange(64))

    def batch(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        loader = make_train_loader(split, batch_size=32, seed=0, rank=rank, world_size=world_size)
        return next(iter(loader))

    (first, first_labels), (second, second_labels) = batch(0, 2), batch(1, 2)
    assert torch.equal(torch.cat([first_labels, second_labels]), batch(0, 1)[1])
    assert not torch.equal(first, second)
    differ = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert sum(differ) > len(differ) / 2


def in_two_processes(folder: Path, worker: str) -> list[dict]:
    """The `result` of the Python code `worker` on each of two ranks; it may use small_net and `rank`."""
    before = "import torch\nfrom core import distributed\nfrom helpers import small_net\nrank = distributed.rank()\n"
    before += "torch.set_num_threads(1)\ndistributed.start(torch.device('cpu'))\n"
    after = "\ntorch.save(result, f'rank{rank}.pt')\ndistributed.stop()\n"
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": paths}
    command = [sys.executable, "-c", before + worker + after]
    processes = [start(command, folder, r, environment(**place, RANK=r, LOCAL_RANK=r)) for r in ("0", "1")]
    try:
        codes = [process.wait(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "".join((folder / f"err{rank}.txt").read_text()[-2000:] for rank in (0, 1))
    return [load(folder / f"rank{rank}.pt") for rank in (0, 1)]


# 23 images in global batches of 8, 8 and 7: the last one gives 3 to the first rank and 4 to the second.
RAGGED_EPOCH = """
from pathlib import Path
from core.cli import Interrupts
from training.recipe import Recipe
from training.run import Run
from training.run_files import RunFiles
from utils import TrainBatchSampler

sizes, all_reduce = [], torch.distributed.all_reduce
torch.distributed.all_reduce = lambda values: (sizes.append(values.numel()), all_reduce(values))
[(images, labels)] = small_net.batches_of(23)
result = {}
for sync_bn in (False, True):
    sampler = TrainBatchSampler(23, 8, seed=0, rank=rank, world_size=2)
    batches = [(images[request.indices], labels[request.indices]) for request in sampler]
    model = small_net.small_net()
    step = small_net.make_step(model, sync_bn=sync_bn)
    run = Run(RunFiles(Path(), "run"), Recipe(), model, step, 3, Interrupts(), resume_command="")
    sizes.clear()
    small_net.train(step, batches, global_size=sampler.global_size, after_batch=run.after_train_batch)
    result[sync_bn] = {"sizes": list(sizes), "gradients": [p.grad for p in model.parameters()]}
"""


def test_a_step_adds_no_all_reduce_and_a_ragged_batch_gives_the_gradients_of_one_process(
    tmp_path: Path,
) -> None:
    ranks = in_two_processes(tmp_path, RAGGED_EPOCH)
    # one for each batch, on interrupt and checkpoint together; one for the epoch's metrics
    assert [rank[False]["sizes"] for rank in ranks] == [[2, 2, 2, 3]] * 2

    [(images, labels)] = batches_of(23)
    model = small_net()
    requests = TrainBatchSampler(23, 8, seed=0, rank=0, world_size=1)
    small_net_train(make_step(model), [(images[r.indices], labels[r.indices]) for r in requests])
    for weight, *found in zip(model.parameters(), *(rank[True]["gradients"] for rank in ranks), strict=True):
        for gradient in found:
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-5)


def test_uneven_parts_count_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._loss_weight(5, 5) == 1.0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine._loss_weight(5, 7) == pytest.approx(10 / 7)


# Compilation fails on the rank `broken`, forward with sync_bn, else backward. A rank has 3, 4 and 4 images.
COMPILATION = """
from training import engine
broken, result = BROKEN, {}
for sync_bn in (False, True):
    def compiled(model, device):
        def run(images):
            if rank == broken and sync_bn:
                raise RuntimeError("no compiler")
            logits = model(images)
            if rank == broken:
                logits.register_hook(lambda gradient: 1 / 0)
            ran.append(type(model).__name__)
            return logits
        return run
    ran, engine.compiled = [], compiled
    for compile_batch_size in (None, 8):
        model = small_net.small_net()
        batches = [(images[rank::2], labels[rank::2]) for images, labels in small_net.batches_of(6, 8, 8)]
        step = small_net.make_step(model, sync_bn=sync_bn, compile_batch_size=compile_batch_size)
        small_net.train(step, batches)
        result[sync_bn, compile_batch_size] = model.state_dict()
    result[sync_bn, "ran"] = ran
"""


@pytest.mark.parametrize("broken", [None, 0, 1])
def test_a_compilation_that_fails_on_one_rank_is_given_up_on_both(tmp_path: Path, broken: int | None) -> None:
    ranks = in_two_processes(tmp_path, COMPILATION.replace("BROKEN", str(broken)))
    for result in ranks:
        for sync_bn in (False, True):
            for name, value in result[sync_bn, None].items():
                assert torch.equal(result[sync_bn, 8][name], value), name
                assert torch.equal(ranks[0][sync_bn, 8][name], value), name
            used = result[sync_bn, "ran"].count("DistributedDataParallel")
            assert used == (2 if broken is None else 0)


def test_one_process_gets_its_input_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    values, model = torch.arange(3.0), build_model("resnet20")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert distributed.sum_over_ranks(values) is values
    assert distributed.broadcast_object(values) is values
    assert distributed.wrap_ddp(model, torch.device("cpu"), sync_bn=True) is model
    distributed.broadcast_buffers(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert distributed.is_main() and distributed.world_size() == 1
    assert distributed.any_rank(torch.device("cpu"), False, True) == [False, True]
