"""Training under torch.compile: it agrees with eager training, and goes on without a compiler."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from core.cli import LOG
from core.errors import RunError
from helpers import REPOSITORY
from helpers.small_net import batches_of, make_step, same_weights, small_net, train
from training import engine
from training.techniques import Techniques


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    level = LOG.level
    LOG.setLevel(logging.INFO)  # whatever a test before this one left
    LOG.addHandler(handler)
    yield lines
    LOG.removeHandler(handler)
    LOG.setLevel(level)


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))), None)


@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile of CPU code is fragile on Windows")
def test_compiled_and_eager_training_agree_and_a_short_batch_compiles_nothing(monkeypatch, warnings_logged):
    import torch._dynamo
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool of processes
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batches = batches_of(*[16] * 19, 5)
    losses = []
    for compile_batch_size in (None, 16):
        step = make_step(small_net(), compile_batch_size=compile_batch_size)
        losses.append([step(images, labels)[0].item() / len(labels) for images, labels in batches])
    assert warnings_logged == [] and step.compiled is not None
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("wrong", ["loss", "gradient norm"])
def test_a_compiled_network_that_computes_something_else_is_not_used(
    monkeypatch, warnings_logged, wrong
) -> None:
    def compiled(
        model: nn.Module, device: torch.device, **_: object
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        calls = []

        def run(images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            logits = model(images)
            if len(calls) < engine.TRIALS:  # as where CUDA graphs are replayed
                return logits
            if wrong == "loss":
                return logits.flip(1) * 2
            logits.register_hook(lambda gradient: gradient * 2)
            return logits

        return run

    monkeypatch.setattr(engine, "compiled", compiled)
    batches = batches_of(8, 8)
    eager, fallen_back = small_net(), small_net()
    metrics = train(make_step(eager), batches)
    assert train(make_step(fallen_back, compile_batch_size=8), batches) == metrics
    assert len(warnings_logged) == 1 and f"training eagerly: the {wrong} is " in warnings_logged[0]
    assert same_weights(fallen_back, eager)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_failed_compilation_is_one_warning_and_the_same_training(monkeypatch, warnings_logged, where) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nsecond line")

    def compiled(
        model: nn.Module, device: torch.device, **_: object
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(images: torch.Tensor) -> torch.Tensor:
            logits = model(images)  # what it had done by then: BatchNorm's statistics have moved
            fail() if where == "forward" else logits.register_hook(fail)
            return logits

        return run

    monkeypatch.setattr(engine, "compiled", compiled)
    batches = batches_of(8, 8, 8)
    eager, fallen_back = small_net(), small_net()
    metrics = train(make_step(eager), batches)
    assert train(make_step(fallen_back, compile_batch_size=8), batches) == metrics
    assert len(warnings_logged) == 1
    assert "training eagerly: no compiler" in warnings_logged[0] and "\n" not in warnings_logged[0]
    assert same_weights(fallen_back, eager)


def test_only_full_batches_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes first: a run may be resumed at the ragged last batch."""
    sizes: list[int] = []

    def compiled(
        model: nn.Module, device: torch.device, **_: object
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: (sizes.append(len(images)), model(images))[1]

    monkeypatch.setattr(engine, "compiled", compiled)
    train(make_step(small_net(), compile_batch_size=8), batches_of(3, 8, 8, 3, 8))
    assert sizes and set(sizes) == {8}
    sizes.clear()
    # in micro-batches of 3, 3 and 2; a ragged batch of 7 has one of 3 too
    techniques = Techniques(accumulate=3)
    train(make_step(small_net(), compile_batch_size=8, techniques=techniques), batches_of(7, 8, 7))
    assert sizes and set(sizes) == {3}
    repeated = len(sizes)
    train(make_step(small_net(), compile_batch_size=8, techniques=techniques), batches_of(7, 8, 7, 7))
    assert len(sizes) == 2 * repeated


def test_resumed_at_the_ragged_batch_it_ends_in_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(
        model: nn.Module, device: torch.device, **_: object
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: model(images) * 1.01  # so that compiled and eager batches differ

    monkeypatch.setattr(engine, "compiled", compiled)
    batches = batches_of(8, 3, 8, 8)
    unbroken, begun, resumed = small_net(), small_net(), small_net()
    train(make_step(unbroken, compile_batch_size=8), batches)
    step, again = (make_step(model, compile_batch_size=8) for model in (begun, resumed))
    train(step, batches[:1])
    resumed.load_state_dict(begun.state_dict())
    again.optimizer.load_state_dict(step.optimizer.state_dict())
    again.scheduler.load_state_dict(step.scheduler.state_dict())
    train(again, batches[1:])
    assert same_weights(resumed, unbroken)


def test_an_error_later_on_is_not_taken_for_a_failed_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compiled(
        model: nn.Module, device: torch.device, **_: object
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(images: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) > engine.TRIALS:
                raise RuntimeError("an illegal memory access")
            return model(images)

        return run

    monkeypatch.setattr(engine, "compiled", compiled)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(make_step(small_net(), compile_batch_size=8), batches_of(8, 8))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsecond line"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory."),
    ],
)
@pytest.mark.parametrize("compile_batch_size", [None, 8])
def test_out_of_memory_is_one_line_and_no_failed_compilation(
    monkeypatch, warnings_logged, error, compile_batch_size
):
    def fail(*_: object) -> torch.Tensor:
        raise error

    model = small_net()
    monkeypatch.setattr(engine, "compiled", lambda model, device, **_: fail)
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RunError) as caught:
        train(make_step(model, compile_batch_size=compile_batch_size), batches_of(8))
    assert str(caught.value) == "out of memory: pass a smaller --batch-size, or --accumulate 2"
    assert warnings_logged == []


def test_the_trial_of_a_compilation_leaves_the_random_draws_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compiled", lambda model, device, **_: model)
    models = [small_net().insert(2, nn.Dropout()) for _ in range(2)]
    for model, compile_batch_size in zip(models, (None, 8), strict=True):
        torch.manual_seed(0)
        train(make_step(model, compile_batch_size=compile_batch_size), batches_of(8, 8))
    assert same_weights(*models)


BROKEN_COMPILER = """
import torch
from helpers.small_net import batches_of, make_step, small_net, train
print(train(make_step(small_net(), compile_batch_size=8), batches_of(8, 8)).images)
"""


@pytest.mark.skipif(not Path("/bin/false").exists(), reason="a compiler that fails: /bin/false")
@pytest.mark.skipif(sys.platform != "linux", reason="$CXX is what torch.compile takes on Linux")
def test_without_a_working_compiler_training_goes_on(tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    command, env = [sys.executable, "-c", BROKEN_COMPILER], os.environ | broken
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "16\n"), done.stderr
    assert done.stderr.count("training eagerly") == 1 and "Traceback" not in done.stderr
