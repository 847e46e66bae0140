"""The batch loops and the training step: against plain torch, with ragged batches, NaN, in bf16."""

import contextlib
import copy
import io
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from core.errors import RunError
from helpers.loss_curve import STEPS, STORED, conditions, loss_curve
from helpers.small_net import (
    ListLoader,
    batches_of,
    make_step,
    plainly_normalized,
    same_weights,
    small_net,
    train,
)
from model import build_model
from training import engine
from training.engine import RunningTotals, evaluate, train_one_epoch
from training.recipe import Recipe
from training.techniques import Distillation, SharpnessAware, Techniques
from utils import normalize

# ---- training ----


def test_it_trains_as_a_plain_torch_loop_and_averages_over_images() -> None:
    batches = batches_of(8, 8, 3)
    model = small_net()
    metrics = train(make_step(model), batches)

    plain = small_net().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loss_sum, hits = 0.0, 0
    for number, (images, labels) in enumerate(batches):
        if number == 2:
            optimizer.param_groups[0]["lr"] = 0.01 * 0.2
        logits = plain(plainly_normalized(images))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        hits += int((logits.argmax(1) == labels).sum())

    assert metrics.images == 19
    assert metrics.loss == pytest.approx(loss_sum / 19, rel=1e-6)
    assert metrics.accuracy_percent == pytest.approx(100 * hits / 19)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_the_default_step_is_the_plain_one_bit_for_bit() -> None:
    """On ResNet-20, against torch's own parts."""
    torch.manual_seed(3)
    model, plain = build_model("resnet20").train(), build_model("resnet20").train()
    plain.load_state_dict(model.state_dict())
    step = make_step(model, Recipe(milestones=(5,)))
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    for images, labels in batches_of(8, 8, 8):
        loss_sum, hits = step(images, labels)
        logits = plain(normalize(images))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(loss_sum, loss.detach() * len(labels))
        assert hits == (logits.argmax(1) == labels).sum()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_an_epoch_in_two_parts_is_the_epoch_in_one() -> None:
    batches = batches_of(8, 8, 8, 5)
    whole_model, parted_model = small_net(), small_net()
    whole = train(make_step(whole_model), batches)
    step = make_step(parted_model)
    totals, done = RunningTotals(step.device), []
    train_one_epoch(step, ListLoader(batches[:2]), totals, after_batch=done.append)
    later = RunningTotals(step.device)
    later.restore(totals.values.tolist())
    parted = train_one_epoch(step, ListLoader(batches[2:], start_batch=2), later, after_batch=done.append)
    assert parted == whole and done == [1, 2, 3, 4]
    assert same_weights(parted_model, whole_model)


def test_a_step_reads_nothing_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors hold no values: whatever waits for one raises."""
    monkeypatch.setattr(engine, "autocast", lambda *_: contextlib.nullcontext())  # which knows no meta device
    step = make_step(small_net("meta"))
    totals = RunningTotals(torch.device("meta"))
    for images, labels in batches_of(4, 4):
        totals.add(*step(images.to("meta"), labels.to("meta")), len(labels), 1)
    assert totals.values.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        totals.metrics()


def test_totals_keep_more_digits_than_float32() -> None:
    totals = RunningTotals(torch.device("cpu"))
    for number in range(1, 1001):
        totals.add(torch.tensor(1e5 + 0.1), torch.tensor(1), 10, number)
    assert totals.metrics().loss == pytest.approx((1e5 + 0.1) / 10, rel=1e-6)
    assert (totals.metrics().accuracy_percent, totals.metrics().images) == (10, 10_000)


def test_a_loss_that_is_not_finite_stops_before_the_state_can_be_saved() -> None:
    done: list[int] = []
    step = make_step(small_net(), Recipe(lr=0.05))
    schedule = step.scheduler.step

    def spoil() -> None:  # after the first batch, which is fine
        schedule()
        step.model[4].weight.data.fill_(math.nan)

    step.scheduler.step = spoil
    with pytest.raises(RunError) as caught:
        train(step, batches_of(8, 8, 8), title="epoch 3/9", after_batch=done.append)
    message = str(caught.value)
    assert "batch 2 of epoch 3/9 at learning rate 0.05" in message
    assert "--lr" in message and "\n" not in message
    assert done == [1]


def test_the_first_bad_batch_is_the_one_that_is_named() -> None:
    """On a GPU the sums are read seldom: later batches must not hide the first one."""
    totals = RunningTotals(torch.device("cpu"))
    for number, loss in enumerate([1.0, 2.0, math.inf, math.nan, 3.0], start=1):
        totals.add(torch.tensor(loss), torch.tensor(0), 1, number)
    with pytest.raises(RunError, match="batch 3 of epoch 1/1"):
        engine.check_finite(totals, "epoch 1/1")


def test_clipping_bounds_the_norm_of_the_gradient() -> None:
    norms = []
    for clip_norm in (0.0, 0.5, 1e6):
        model = small_net()
        train(make_step(model, techniques=Techniques(clip_norm=clip_norm)), batches_of(8))
        norms.append(torch.stack([value.grad.norm() for value in model.parameters()]).norm().item())
    assert norms[0] == norms[2] > 0.5 and norms[1] == pytest.approx(0.5, rel=1e-4)


def test_sams_two_passes_share_the_teachers_outputs() -> None:
    teacher, images_seen = small_net(), []
    teacher.register_forward_hook(lambda _model, inputs, _output: images_seen.append(len(inputs[0])))
    distillation, model = Distillation([teacher], alpha=0.5, temperature=2.0), small_net()
    techniques = Techniques(distillation=distillation, sam=SharpnessAware(model, 0.1), accumulate=2)
    train(make_step(model, techniques=techniques), batches_of(8, 8, 3))
    assert images_seen == [8, 8, 3]


@pytest.mark.parametrize(("accumulate", "size"), [(2, 12), (3, 10), (5, 3)])
def test_micro_batches_give_the_gradients_of_the_batch(accumulate: int, size: int) -> None:
    """Without BatchNorm, which sees each one alone; ragged ones, fewer images than micro-batches."""
    results = []
    for techniques in (None, Techniques(accumulate=accumulate)):
        model = small_net(norm=False)
        metrics = train(make_step(model, techniques=techniques), batches_of(size, size))
        results.append((metrics, torch.cat([value.flatten() for value in model.parameters()])))
    (whole, weights), (parts, weights_of_parts) = results
    torch.testing.assert_close(weights_of_parts, weights, rtol=1e-5, atol=1e-6)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.accuracy_percent == whole.accuracy_percent


# ---- testing ----


def test_evaluate_is_a_plain_loop_over_images_and_leaves_the_network_alone() -> None:
    model = small_net()
    train(make_step(model), batches_of(16, 16))  # so that BatchNorm's running statistics matter
    before = copy.deepcopy(model.state_dict())
    batches = [(plainly_normalized(images), labels) for images, labels in batches_of(7, 7, 2)]
    metrics = evaluate(model, batches)
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = plain(torch.cat([images for images, _ in batches]))
    labels = torch.cat([labels for _, labels in batches])
    assert metrics.images == 16
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.accuracy_percent == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert not model.training and same_weights(model, before)


def test_a_test_batch_gives_the_same_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_net()
    [(images, labels)] = batches_of(2 * engine.CPU_TEST_BATCH_SIZE + 9)
    batch, done = [(plainly_normalized(images), labels)], []
    split = evaluate(model, batch, after_batch=done.append)
    assert done == [1, 2, 3]
    monkeypatch.setattr(engine, "CPU_TEST_BATCH_SIZE", 10_000)
    whole = evaluate(model, batch)
    assert (split.accuracy_percent, split.images) == (whole.accuracy_percent, len(labels))
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = small_net()
    model[4].bias.data.fill_(float("inf"))
    [(images, labels)] = batches_of(4)
    with pytest.raises(RunError, match="batch 1 of the test"):
        evaluate(model, [(plainly_normalized(images), labels)])


def test_out_of_memory_in_a_test_is_one_line() -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsecond line")

    model = small_net()
    model.forward = fail
    [(images, labels)] = batches_of(4)
    message = "out of memory: pass a smaller --test-batch-size, or with evaluate.py --batch-size"
    with pytest.raises(RunError, match=f"^{message}$"):
        evaluate(model, [(normalize(images), labels)])


# ---- the bar ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_silent_without_a_terminal_and_tells_on_one(monkeypatch, capsys) -> None:
    train(make_step(small_net()), batches_of(4, 4))
    evaluate(small_net(), [(plainly_normalized(images), labels) for images, labels in batches_of(4)])
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("core.cli.tqdm", lambda **options: engine_bar(options))
    train(make_step(small_net()), batches_of(4, 4))
    shown = terminal.getvalue()
    for words in ("train:", "2/2", "loss ", "acc ", "images/s", "lr 0.01"):
        assert words in shown, (words, shown)


def engine_bar(options: dict) -> object:
    """A bar that draws each update, however fast they come."""
    from tqdm import tqdm

    return tqdm(file=sys.stderr, mininterval=0, ncols=200, **{**options, "dynamic_ncols": False})


# ---- bf16 and fp16 ----


@pytest.mark.parametrize("lower", ["bf16", "fp16"])
def test_lower_precisions_train_and_test_close_to_fp32_with_fp32_weights(lower: str) -> None:
    batches = batches_of(16, 16)
    tested = [(plainly_normalized(images), labels) for images, labels in batches]
    losses = {}
    for precision in ("fp32", lower):
        model = small_net()
        trained_metrics = train(make_step(model, precision=precision), batches)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses[precision] = trained_metrics.loss, evaluate(model, tested, precision=precision).loss
    assert losses[lower] != losses["fp32"]
    assert losses[lower] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.parametrize("techniques", [{}, {"clip_norm": 0.1}, {"accumulate": 2}, {"sam": 0.1}])
def test_fp16_gradients_are_unscaled_before_they_are_used(techniques: dict) -> None:
    weights = []
    for precision in ("fp32", "fp16"):
        model = small_net()
        before = copy.deepcopy(model)
        options = dict(techniques)
        if "sam" in options:
            options["sam"] = SharpnessAware(model, options["sam"])
        step = make_step(
            model, Recipe(lr=0.01, precision=precision), precision=precision, techniques=Techniques(**options)
        )
        for batch in batches_of(16, 16):
            step(*batch)
        assert step.skipped_steps == 0
        weights.append(
            [(new - old).flatten() for new, old in zip(model.parameters(), before.parameters(), strict=True)]
        )
    change, expected = map(torch.cat, weights)
    assert (change - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("sam", [False, True])
def test_a_step_whose_fp16_gradients_overflow_is_skipped_and_lowers_the_scale(sam: bool) -> None:
    model = small_net()
    techniques = Techniques(sam=SharpnessAware(model, 0.1) if sam else None)
    recipe = Recipe(lr=0.01, milestones=(2,), precision="fp16")
    step = make_step(model, recipe, precision="fp16", techniques=techniques)
    batches = batches_of(8, 8, 8, 8)
    step(*batches[0])
    scale = step.scaler.get_scale()
    before = copy.deepcopy(model)
    overflow = model[4].weight.register_hook(lambda gradient: gradient * math.inf)
    loss_sum, _ = step(*batches[1])
    overflow.remove()
    assert loss_sum.isfinite()  # so training does not stop
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))
    assert (step.skipped_steps, step.steps_done, step.scheduler.last_epoch) == (1, 2, 1)
    assert step.scaler.get_scale() == scale / (4 if sam else 2)  # each pass halves it
    step(*batches[2])
    assert step.optimizer.param_groups[0]["lr"] == pytest.approx(
        0.01 * recipe.gamma
    )  # two steps were made, not three
    assert (step.skipped_steps, step.steps_done) == (1, 3)


# ---- the stored curve ----


def test_the_losses_of_twenty_steps_are_those_stored() -> None:
    """Exactly, under the conditions that made them. Elsewhere rounding differs, and training multiplies it.

    Other instructions (ONEDNN_MAX_CPU_ISA=SSE41, ATEN_CPU_CAPABILITY=default) moved the first three losses by
    up to 4e-6, relatively, the next seven by 2e-4, the last ten by 9e-4; ten times that is allowed.
    """
    stored = json.loads(STORED.read_text("utf-8"))
    losses = loss_curve()
    assert len(losses) == len(stored["losses"]) == STEPS
    if stored["conditions"] == conditions():
        assert losses == stored["losses"]
    allowed = [1e-5] + [5e-5] * 2 + [2e-3] * 7 + [1e-2] * 10
    for number, (loss, expected, relative) in enumerate(
        zip(losses, stored["losses"], allowed, strict=True), start=1
    ):
        assert loss == pytest.approx(expected, rel=relative), f"step {number}"
