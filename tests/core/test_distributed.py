"""Distributed training: two gloo processes on the CPU, compared with one process."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train
from cifar import dataset
from cifar.dataset import load_dataset
from core import cli, distributed
from helpers import REPOSITORY
from helpers.tiny_cifar import TinyCifar
from model import build_model
from training import engine
from training import run as run_module
from training.recipe import Recipe
from utils import make_test_batches

PATIENCE_S = 240  # for a start on a busy machine; nothing takes a tenth of it on an idle one
TINY = [
    *("--yes", "--dataset", "synthetic", "--model", "resnet20", "--device", "cpu", "--precision", "fp32"),
    *("--compile", "off", "--workers", "0", "--name", "tiny_synthetic"),
]
LONG = ["--epochs", "200", "--lr", "0.05", "--batch-size", "64"]
LONG += ["--limit-train", "320", "--limit-test", "101"]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes that are killed at the test's end at the latest."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"} | more


def rank_environment(rank: str, port: str) -> dict[str, str]:
    """What torchrun sets for one of two ranks."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return environment(**place, RANK=rank, LOCAL_RANK=rank)


def torchrun(folder: Path, script: Path, *flags: str) -> subprocess.Popen:
    """`torchrun --nproc-per-node=2 script` in `folder`; its output goes to out.txt and err.txt there."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]
    command = [*launcher, free_port(), str(script), *TINY, "--output-dir", "output", *flags]
    return start(command, folder, "", environment(PYTHONPATH=str(REPOSITORY)))


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


# train.py with a network without BatchNorm, whose statistics would be those of each rank, as ResNet-20.
WITHOUT_BATCH_NORM = """
import functools, sys
from torch import nn
import model, train
from core.cli import run_main
def network(block, *, num_classes, **options):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, num_classes))
model.MODELS["resnet20"] = functools.partial(network, model.BasicBlock)
sys.exit(run_main(train.main, "train.py"))
"""


def test_two_processes_train_as_one(tmp_path: Path, started: list) -> None:
    script = tmp_path / "without_batch_norm.py"
    script.write_text(WITHOUT_BATCH_NORM)
    # 201 images in batches of 64 end in one of 9, 5 and 4 for the two processes; 151 test images are odd
    flags = ["--epochs", "2", "--lr", "0.01", "--batch-size", "64", "--augment", "none"]
    flags += ["--limit-train", "221", "--val-split", "20", "--limit-test", "151", "--test-batch-size", "40"]
    started.append(torchrun(tmp_path, script, *flags))
    command = [sys.executable, str(script), *TINY, *flags, "--output-dir", "alone"]
    started.append(start(command, tmp_path, "_alone", environment(PYTHONPATH=str(REPOSITORY))))
    for process, suffix in zip(started, ("", "_alone"), strict=True):
        assert process.wait(timeout=PATIENCE_S) == 0, (tmp_path / f"err{suffix}.txt").read_text()[-2000:]

    alone, together = tmp_path / "alone", tmp_path / "output"
    assert sorted(path.name for path in alone.iterdir()) == sorted(path.name for path in together.iterdir())
    ours, theirs = (load(folder / "tiny_synthetic_last.pth") for folder in (alone, together))
    torch.testing.assert_close(theirs["model"], ours["model"], rtol=0, atol=1e-5)
    for our_row, their_row in zip(ours["history"], theirs["history"], strict=True):
        assert their_row == pytest.approx(our_row, abs=1e-3)
    first, second = (row["train_loss"] for row in ours["history"])
    assert abs(second - first) > 0.01, "a test of nothing: the network hardly learnt"
    ours, theirs = (load(folder / "tiny_synthetic_training_results.pth") for folder in (alone, together))
    for kind in ("best", "last"):
        assert theirs["final_test"][kind] == pytest.approx(ours["final_test"][kind], abs=1e-3)
        assert theirs["final_test"][kind]["images"] == 151
    assert (tmp_path / "out.txt").read_text().count("Epoch [1/2]") == 1  # only rank 0 prints


# train.py with a look-alike of CIFAR-100.
WITH_TINY_CIFAR = """
import sys
import pytest
import train
from cifar import dataset
from core.cli import run_main
from helpers.tiny_cifar import install_tiny_cifar, tiny_contents
install_tiny_cifar(pytest.MonkeyPatch(), tiny_contents())
dataset.SOURCES = ["/nowhere.tar.gz"]
sys.exit(run_main(train.main, "train.py"))
"""
ON_TWO_MACHINES = ["--yes", "--model", "resnet20", "--lr", "0.05", "--epochs", "2", "--batch-size", "60"]
ON_TWO_MACHINES += ["--val-split", "20", "--workers", "0", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def two_machines(tmp_path: Path, tiny_cifar: TinyCifar) -> list[Path]:
    """Two folders with WITH_TINY_CIFAR as tiny.py, the data set in the first, its archive in the second."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        (folder / "tiny.py").write_text(WITH_TINY_CIFAR)
    tiny_cifar.lay(folders[0] / "data")
    (folders[1] / "mine.tar.gz").write_bytes(tiny_cifar.archive)
    return folders


def on_each(folders: list[Path], started: list, flags: list[str], *launcher: str) -> list[int]:
    """Run tiny.py in every folder, by torchrun with the options `launcher` where there are any; exit codes.

    Its output goes to out.txt and err.txt there. Nothing may be left of it.
    """
    port, first = free_port(), len(started)
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    for rank, folder in enumerate(folders):
        own = {"PYTHONPATH": paths, "CIFAR_DATA": str(folder / "data")}
        env = (
            environment(**own) if launcher else rank_environment(str(rank), port) | own | {"LOCAL_RANK": "0"}
        )
        options = [*launcher, f"--node-rank={rank}", f"--master-port={port}"]
        torchrun = ["-m", "torch.distributed.run", *options] if launcher else []
        started.append(start([sys.executable, *torchrun, "tiny.py", *flags], folder, "", env))
    return [process.wait(timeout=PATIENCE_S) for process in started[first:]]


def outputs(folders: list[Path], name: str) -> list[str]:
    """The files' text, without the lines that torch 2.8 itself prints of its connections."""
    texts = ((folder / f"{name}.txt").read_text() for folder in folders)
    return [re.sub(r"^\[Gloo\].*\n", "", text, flags=re.MULTILINE) for text in texts]


def test_two_machines_without_a_common_disk_train_and_resume_as_one(
    two_machines, started, tiny_cifar
) -> None:
    first, second = two_machines
    launcher = ["--nnodes=2", "--master-addr=127.0.0.1", "--nproc-per-node=1"]
    flags = [*ON_TWO_MACHINES, "--data-url", (second / "mine.tar.gz").as_uri()]
    codes = on_each(two_machines, started, flags, *launcher)
    assert codes == [0, 0], outputs(two_machines, "err")
    content = {path.name: path.read_bytes() for path in (second / "data" / dataset.FOLDER).iterdir()}
    assert content == tiny_cifar.members
    said = f"CIFAR-100 is not in {second / 'data'}: downloading it to {second / 'data'}"
    assert [said in err for err in outputs(two_machines, "err")] == [False, True]
    out, silent = outputs(two_machines, "out")
    assert out.count("Epoch [2/2]") == 1 and silent == ""
    assert not (second / "output").exists()
    results = load(first / "output" / "CNN_Model_training_results.pth")
    assert {test["images"] for test in results["final_test"].values()} == {100}

    # from the state after the first epoch, which is on the first machine only: to the same results
    resume = ["--resume", "output/CNN_Model_last.prev.pth", "--workers", "0", "--device", "cpu"]
    assert on_each(two_machines, started, resume) == [0, 0], outputs(two_machines, "err")
    assert "Resumed output/CNN_Model_last.prev.pth: epoch 2" in outputs(two_machines, "out")[0]
    again = load(first / "output" / "CNN_Model_training_results.pth")
    for key in ("history", "final_test"):
        assert again[key] == results[key]
    assert all(torch.equal(again["model"][name], value) for name, value in results["model"].items())

    assert on_each(two_machines, started, ["--resume"]) == [0, 0], outputs(two_machines, "err")
    assert "The run is finished" in outputs(two_machines, "out")[0]
    assert not (second / "output").exists()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_machine_without_data_ends_the_run_on_both(two_machines, started, broken) -> None:
    folders = [two_machines[1], two_machines[0]] if broken == 0 else two_machines
    assert on_each(folders, started, ON_TWO_MACHINES) == [1, 1]
    errors = outputs(folders, "err")
    assert "train.py: error: CIFAR-100 could not be downloaded:\n  /nowhere.tar.gz: " in errors[broken]
    line = f"train.py: error: the machine of rank {broken} has no data: CIFAR-100 could not be downloaded\n"
    assert line in errors[1 - broken]
    assert all(error.count("error:") == 1 and "Traceback" not in error for error in errors)


def test_one_process_resumes_what_two_were_interrupted_in(tmp_path, started, monkeypatch) -> None:
    two = torchrun(tmp_path, REPOSITORY / "train.py", *LONG)
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
    test = train.make_splits(load_dataset("synthetic", tmp_path), Recipe.from_dict(best["recipe"]))[1]
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
    flags = [*TINY, *LONG, "--output-dir", "output"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *flags]
    port = free_port()
    for rank in ("0", "1"):
        started.append(start(command, tmp_path, rank, rank_environment(rank, port)))
    first, second = started
    wait_for((tmp_path / "output" / "tiny_synthetic_last.pth").exists, first, "checkpoint")
    second.kill()
    assert first.wait(timeout=60) == 1
    assert running_in(tmp_path) == []
    error = (tmp_path / "err0.txt").read_text()
    assert "another process of this run ended" in error and "Traceback" not in error
    assert outputs([tmp_path], "out1") == [""]
    assert load(tmp_path / "output" / "tiny_synthetic_last.pth")["kind"] == "last"
    assert not (tmp_path / "output" / "tiny_synthetic.lock").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "65"], "--batch-size 65 does not divide by 2 processes"),
        (["--sync-bn"], "--sync-bn needs CUDA, and this run is on cpu: leave --sync-bn out"),
    ],
)
def test_what_two_processes_cannot_do_is_one_line_and_exit_code_2(
    flags, message, rank, tmp_path, monkeypatch, capsys
):
    for name, value in rank_environment(rank, "1").items():
        monkeypatch.setenv(name, value)
    delays: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", delays.append)
    monkeypatch.chdir(tmp_path)
    assert cli.run_main(lambda: train.main([*TINY, *flags]), "train.py") == 2
    assert capsys.readouterr() == ("", f"train.py: error: {message}\n")
    assert delays == ([] if rank == "0" else [cli.ERROR_DELAY_S])  # rank 0 speaks first
    assert list(tmp_path.iterdir()) == []


PLACE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 1)),
        ({"RANK": "1"}, (0, 1, 1)),  # left over from something else: there is one process
        (PLACE, (1, 4, 2)),
        (PLACE | {"WORLD_SIZE": "many"}, "the environment variable WORLD_SIZE is 'many': torchrun sets it"),
        (PLACE | {"WORLD_SIZE": "9" * 5000}, "the environment variable WORLD_SIZE is '9999"),
        (PLACE | {"WORLD_SIZE": "0"}, "the environment variable WORLD_SIZE is '0'"),
        (PLACE | {"LOCAL_WORLD_SIZE": "0"}, "the environment variable LOCAL_WORLD_SIZE is '0'"),
        (PLACE | {"RANK": "-1"}, "the environment variable RANK is '-1'"),
        (PLACE | {"RANK": "4"}, "WORLD_SIZE is 4 but RANK is 4: start with torchrun, or unset WORLD_SIZE"),
        (PLACE | {"RANK": ""}, "WORLD_SIZE is 4 but RANK is missing"),
        (PLACE | {"MASTER_ADDR": ""}, "WORLD_SIZE is 4 but MASTER_ADDR is missing"),
    ],
)
def test_the_launchers_environment(monkeypatch, capsys, variables, expected) -> None:
    for name in PLACE:
        monkeypatch.setenv(name, variables.get(name, ""))
    monkeypatch.setattr(distributed, "_enabled", False)

    def read() -> tuple[int, int, int]:
        return distributed.rank(), distributed.world_size(), distributed.local_world_size()

    assert read() == (0, 1, 1)  # what scripts see that do not train
    if isinstance(expected, str):
        assert cli.run_main(distributed.enable, "train.py") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"train.py: error: {expected}") and error.count("\n") == 1
    else:
        distributed.enable()
        assert read() == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_says_so_and_ends_when_asked(tmp_path: Path, number: int) -> None:
    port = free_port()
    command = [sys.executable, str(REPOSITORY / "train.py"), *TINY]
    process = start(command, tmp_path, "0", rank_environment("0", port))
    try:
        line = f"Waiting for 1 more process(es) at 127.0.0.1:{port}"
        wait_for(lambda: line in (tmp_path / "out0.txt").read_text(), process, line)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE_S) == -number
    finally:
        process.kill()
        process.wait()


def test_only_errors_about_another_process_are_peer_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[pair.cc:525] Connection closed by peer [127.0.0.1]:4711")
    assert not distributed.is_peer_failure(closed)  # one process has no other
    monkeypatch.setattr(distributed, "_enabled", True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.is_peer_failure(closed)
    assert distributed.is_peer_failure(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not distributed.is_peer_failure(RuntimeError("shapes do not fit"))
    assert not distributed.is_peer_failure(ValueError("Connection closed by peer"))


def in_two_processes(folder: Path, started: list, worker: str) -> list:
    """The `result` of the Python code `worker` on each of two ranks; it may use small_net and `rank`."""
    before = "import torch\nfrom core import distributed\nfrom helpers import small_net\n"
    before += "torch.set_num_threads(1)\ndistributed.enable()\nrank = distributed.rank()\n"
    before += "distributed.start(torch.device('cpu'))\n"
    after = "\ntorch.save(result, f'rank{rank}.pt')\ndistributed.stop()\n"
    command = [sys.executable, "-c", before + worker + after]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))}
    port = free_port()
    started += [start(command, folder, rank, rank_environment(rank, port) | paths) for rank in ("0", "1")]
    codes = [process.wait(timeout=PATIENCE_S) for process in started]
    assert codes == [0, 0], "".join((folder / f"err{rank}.txt").read_text()[-2000:] for rank in (0, 1))
    return [load(folder / f"rank{rank}.pt") for rank in (0, 1)]


# Rank 1 comes only when rank 0 has said that it waits.
WAITING = """
import time
from pathlib import Path
distributed.SILENT_WAIT_S = 0
line = "Waiting for the data set on other processes"
while rank == 1 and line not in Path("out0.txt").read_text():
    time.sleep(0.05)
result = distributed.gather_objects(rank, "the data set")
"""


def test_every_rank_gets_the_objects_of_all_and_rank_0_says_what_it_waits_for(tmp_path, started) -> None:
    assert in_two_processes(tmp_path, started, WAITING) == [[0, 1]] * 2


# The data set is unavailable, and a person sits at the terminal of rank 0.
OFFER = """
import io, sys, train
from cifar.dataset import DatasetUnavailable
from training.recipe import Recipe
from training.settings import Settings, build_parser

def load_dataset(name, *_, **__):
    if name == "cifar100":
        raise DatasetUnavailable("no source")
    return name

train.load_dataset, train.is_interactive = load_dataset, lambda: rank == 0
sys.stdin = io.StringIO("y")
settings = Settings.from_args(build_parser().parse_args([]))
data, recipe = train.load_data(Recipe(precision=["bf16", "fp32"][rank]), settings)
result = data, recipe.dataset, recipe.precision
"""


def test_the_answer_and_the_precision_of_rank_0_hold_on_every_rank(tmp_path: Path, started: list) -> None:
    assert in_two_processes(tmp_path, started, OFFER) == [("synthetic", "synthetic", "bf16")] * 2
    assert [(tmp_path / f"out{rank}.txt").read_text().count("no source") for rank in (0, 1)] == [1, 0]


ALL_REDUCES = """
from pathlib import Path
from core.cli import Interrupts
from training.recipe import Recipe
from training.run import Run, RunFiles

sizes, all_reduce = [], torch.distributed.all_reduce
torch.distributed.all_reduce = lambda values: (sizes.append(values.numel()), all_reduce(values))
step = small_net.make_step(small_net.small_net(norm=False))
options = {"batches_per_epoch": 3, "interrupts": Interrupts(), "resume_command": ""}
run = Run(RunFiles(Path(), "run"), Recipe(), step, **options)
sizes.clear()
small_net.train(step, small_net.batches_of(4, 4, 4), after_batch=run.after_train_batch)
result = sizes
"""


def test_an_epoch_takes_one_all_reduce_a_batch_and_one_for_the_metrics(tmp_path: Path, started: list) -> None:
    """Interrupt and checkpoint are agreed on together."""
    assert in_two_processes(tmp_path, started, ALL_REDUCES) == [[2, 2, 2, 3]] * 2


# One image of the rank `broken` has a NaN.
NAN_ON_ONE_RANK = """
import math
from core.errors import RunError
from training.engine import evaluate
from utils import normalize
result = []
for broken in (0, 1):
    [(images, labels)] = small_net.batches_of(8)
    batch = normalize(images)
    if rank == broken:
        batch[3, 0, 0, 0] = math.nan
    try:
        evaluate(small_net.small_net(), [(batch, labels)])
    except RunError as error:
        result.append(str(error).partition(":")[0])
"""


def test_a_nan_in_one_ranks_test_images_is_an_error_on_both(tmp_path: Path, started: list) -> None:
    own = "the loss became NaN or infinite in batch 1 of the test"
    other = "the loss became NaN or infinite in another process's part of the test"
    assert in_two_processes(tmp_path, started, NAN_ON_ONE_RANK) == [[own, other], [other, own]]


# Compilation fails on the rank `broken`, in the forward pass or in the backward pass.
COMPILATION = """
from training import engine
broken, result = BROKEN, {}
for forward in (False, True):
    def compiled(model, device, **_):
        def run(images):
            ran.append((type(model).__name__, model.training))
            if rank == broken and forward:
                raise RuntimeError("no compiler")
            logits = model(images)
            if rank == broken:
                logits.register_hook(lambda gradient: 1 / 0)
            return logits
        return run
    ran, engine.compiled = [], compiled
    for compile_batch_size in (None, 8):
        model = small_net.small_net()
        batches = [(images[rank::2], labels[rank::2]) for images, labels in small_net.batches_of(6, 8, 8)]
        step = small_net.make_step(model, compile_batch_size=compile_batch_size)
        step.sync_bn = forward  # torch's SyncBatchNorm needs CUDA; the trial must avoid its collectives
        small_net.train(step, batches)
        result[forward, compile_batch_size] = model.state_dict()
    result[forward, "ran"] = ran
"""


@pytest.mark.parametrize("broken", [None, 0, 1])
def test_compilation_that_fails_on_one_rank_is_given_up_on_both(tmp_path, started, broken) -> None:
    ranks = in_two_processes(tmp_path, started, COMPILATION.replace("BROKEN", str(broken)))
    for result in ranks:
        for forward in (False, True):
            for name, value in result[forward, None].items():
                assert torch.equal(result[forward, 8][name], value), name
                assert torch.equal(ranks[0][forward, 8][name], value), name
            ran = result[forward, "ran"]
            trials = [call for call in ran if call[0] == "Sequential"]
            assert set(trials) == {("Sequential", not forward)}  # with SyncBatchNorm in evaluation mode
            used = [("DistributedDataParallel", True)] * 2 if broken is None else []
            assert ran == trials + used


def test_on_one_process_each_call_returns_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    values, model = torch.arange(3.0), build_model("resnet20")
    assert distributed.sum_over_ranks(values) is values
    assert distributed.broadcast_object(values) is values
    assert distributed.gather_objects(7, "it") == [7]
    assert distributed.wrap_ddp(model, torch.device("cpu"), sync_bn=True) is model
    distributed.broadcast_buffers(model)  # without a process group, a broadcast would fail
    assert distributed.is_main() and distributed.world_size() == 1
    assert distributed.any_rank(torch.device("cpu"), False, True) == [False, True]
