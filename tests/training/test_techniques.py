"""The optional techniques against their formulas; draws that repeat; averages that resume exactly."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import RunError
from helpers.small_net import batches_of, make_step, same_weights, small_net
from training.recipe import Recipe
from training.techniques import (
    SAM_RHO,
    Averaging,
    Distillation,
    Mixing,
    ProgressiveSize,
    SharpnessAware,
    StepSeed,
    build_techniques,
    decay_after,
    frozen_bn_statistics,
    soft_hits,
    standardized,
)


def equal_states(one: nn.Module | dict, two: nn.Module | dict) -> bool:
    one, two = (state if isinstance(state, dict) else state.state_dict() for state in (one, two))
    return all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_default_recipe_adds_nothing() -> None:
    built = build_techniques(Recipe(), nn.Linear(1, 1), classes=100, batches_per_epoch=1)
    assert dataclasses.asdict(built) == dataclasses.asdict(type(built)())


# ---- mixing and seeds ----


def mixing(kind: str = "both", seed: int = 3, rank: int = 0, **changes: float) -> Mixing:
    values = {"probability": 1.0, "mixup_alpha": 0.2, "cutmix_alpha": 1.0, **changes}
    return Mixing(kind, StepSeed(seed, 17, rank), classes=100, **values)


def numbered_batch(count: int = 6) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 8, 8] that are constant, each its number from 1; labels in the same order."""
    numbers = torch.arange(count)
    images = (numbers + 1.0)[:, None, None, None].expand(count, 3, 8, 8).clone()
    return images.contiguous(memory_format=torch.channels_last), numbers


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "both"])
def test_mixed_targets_are_the_shares_of_two_neighbours_pixels(kind: str) -> None:
    images, labels = numbered_batch()
    for step in range(30):
        mixed, targets = mixing(kind)(images, labels, step)
        assert mixed.shape == images.shape and mixed.is_contiguous(memory_format=torch.channels_last)
        assert targets.shape == (6, 100) and targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ F.pad(torch.arange(1.0, 7.0), (0, 94)))
        for number, row in enumerate(targets):
            assert set(row.nonzero().flatten().tolist()) <= {number, (number - 1) % 6}


@pytest.mark.parametrize(("alpha", "mean_square"), [(0.2, 0.5 * 1.2 / 1.4), (1.0, 1 / 3)])
def test_mixup_ratios_are_beta_distributed(alpha: float, mean_square: float) -> None:
    """E lambda^2 = (a + 1) / (2 (2 a + 1)) for Beta(a, a)."""
    images, labels = numbered_batch(2)
    mix = mixing("mixup", mixup_alpha=alpha)
    ratios = torch.stack([mix(images, labels, step)[1][0, 0] for step in range(800)])
    assert ratios.mean().item() == pytest.approx(0.5, abs=0.05)
    assert (ratios**2).mean().item() == pytest.approx(mean_square, abs=0.05)


def test_batches_are_mixed_with_the_probability_and_by_either_kind() -> None:
    images, labels = numbered_batch()
    mix = mixing(probability=0.3)
    results = [mix(images, labels, step) for step in range(600)]
    unmixed = [targets is labels and mixed is images for mixed, targets in results]
    assert sum(unmixed) / 600 == pytest.approx(0.7, abs=0.06)
    assert mixing(probability=0.0)(images, labels, 0) == (images, labels)
    # pixels of CutMix are those of one image or the other
    both = [mixing(mixup_alpha=5.0)(images, labels, step)[0] for step in range(250)]
    cut = sum(bool((mixed == mixed.round()).all()) for mixed in both)
    assert cut / 250 == pytest.approx(0.5, abs=0.1)


def test_draws_follow_from_seed_step_and_rank_alone() -> None:
    images, labels = numbered_batch()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mixing()(images, labels, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(9)
    again = mixing()(images, labels, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for mix, step in ((mixing(), 8), (mixing(seed=4), 7), (mixing(rank=1), 7)):
        assert not torch.equal(first[0], mix(images, labels, step)[0])


def test_hits_are_counts_for_labels_and_weights_for_mixed_targets() -> None:
    predicted, labels = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])
    assert soft_hits(predicted, labels) == 2
    assert soft_hits(predicted, F.one_hot(labels, 5).float()) == 2
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    assert soft_hits(predicted, soft).item() == pytest.approx(0.95)


# ---- image sizes ----


@pytest.mark.parametrize(
    ("sizes", "epochs", "expected"),
    [
        ((24, 28, 32), 6, [24, 24, 28, 28, 32, 32]),
        ((24, 28, 32), 4, [24, 24, 28, 32]),
        ((16, 32), 5, [16, 16, 16, 32, 32]),
        ((20,), 2, [20, 20]),
    ],
)
def test_each_size_has_an_equal_part_of_the_epochs(sizes, epochs, expected) -> None:
    progressive, images = ProgressiveSize(sizes, epochs, batches_per_epoch=3), torch.randn(2, 3, 32, 32)
    for epoch, size in enumerate(expected):
        for step in (3 * epoch, 3 * epoch + 2):
            resized = progressive(images, step)
            assert resized.shape == (2, 3, size, size) and (resized is images) == (size == 32)


def test_resizing_averages_fine_patterns() -> None:
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    resized = ProgressiveSize((16,), 1, 1)(board.float().expand(1, 3, 32, 32), 0)
    assert (resized - 0.5).abs().max() < 0.05  # without antialiasing it would be 0 and 1


# ---- distillation ----

NO_IMAGES = torch.zeros(1, 3, 8, 8)


def fixed_network(*logits: list[float]) -> nn.Module:
    """A network that answers with `logits`, whatever the images."""
    network = nn.Module()
    network.forward = lambda images: torch.tensor(logits)
    return network


def loss_on(distillation: Distillation, logits: Tensor, loss: float = 0.0) -> Tensor:
    return distillation(torch.tensor(loss), logits, distillation.soft_targets(NO_IMAGES))


def softmax(*logits: float) -> list[float]:
    return [math.exp(value) / sum(map(math.exp, logits)) for value in logits]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_distillation_gradient_is_hintons(temperature: float) -> None:
    """d/dz of the mean over images: T (softmax(z / T) - softmax(v / T)) / N; 0 for equal networks."""
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7) * 3
    distillation = Distillation([fixed_network(*teacher_logits.tolist())], alpha=1.0, temperature=temperature)
    loss_on(distillation, logits).backward()
    difference = (logits / temperature).softmax(1) - (teacher_logits / temperature).softmax(1)
    torch.testing.assert_close(logits.grad, temperature * difference.detach() / 5)
    assert loss_on(distillation, teacher_logits + 5).abs() < 1e-5


def test_standardized_logits_are_softened_as_by_hand() -> None:
    """[0, 3, 6] has mean 3 and deviation 3; [2, 2, 8] has mean 4 and deviation sqrt(24 / 2)."""
    teacher = fixed_network([2.0, 2.0, 8.0])
    distillation = Distillation([teacher], alpha=0.9, weight=9.0, temperature=2.0, standardize=True)
    total = loss_on(distillation, torch.tensor([[0.0, 3.0, 6.0]]), loss=5.0)
    d = 2 * math.sqrt(12)
    expected = divergence(softmax(-2 / d, -2 / d, 4 / d), softmax(-1 / 2, 0, 1 / 2))
    assert total.item() == pytest.approx(0.1 * 5 + 9 * 2**2 * expected, rel=1e-5)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_softened_probabilities_of_several_teachers_are_averaged(standardize: bool) -> None:
    """[-1, 0, 1] and [0, 0, 9] at T = 2; standardised they are [-1, 0, 1] and [-1, -1, 2] / sqrt(3)."""
    teachers = [fixed_network([-1.0, 0.0, 1.0]), fixed_network([0.0, 0.0, 9.0])]
    distillation = Distillation(teachers, alpha=1.0, temperature=2.0, standardize=standardize)
    second, d = softmax(0, 0, 4.5), 2 * math.sqrt(3)
    if standardize:
        second = softmax(-1 / d, -1 / d, 2 / d)
    means = [(a + b) / 2 for a, b in zip(softmax(-0.5, 0, 0.5), second, strict=True)]
    torch.testing.assert_close(distillation.soft_targets(NO_IMAGES).exp(), torch.tensor([means]))
    total = loss_on(distillation, torch.tensor([[-1.0, 0.0, 1.0]]))
    assert total.item() == pytest.approx(4 * divergence(means, softmax(-0.5, 0, 0.5)), rel=1e-5)


def test_standardizing_leaves_a_student_its_own_offset_and_scale() -> None:
    torch.manual_seed(0)
    teacher_logits, logits = torch.randn(5, 7) * 3, torch.randn(5, 7, requires_grad=True)
    teacher = fixed_network(*teacher_logits.tolist())
    distillation = Distillation([teacher], alpha=1.0, temperature=2.0, standardize=True)
    assert loss_on(distillation, 0.1 * teacher_logits + 4).abs() < 1e-6
    first = loss_on(distillation, logits)
    first.backward()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close((logits.grad * logits).sum(1), torch.zeros(5), atol=1e-6, rtol=0)
    with torch.no_grad():  # downhill is nearer to the teacher
        assert loss_on(distillation, logits - 0.1 * logits.grad) < first


def test_equal_logits_are_standardized_to_zero_with_a_finite_gradient() -> None:
    logits = torch.full((2, 5), 3.0, requires_grad=True)
    values = standardized(logits)
    values[:, 0].sum().backward()
    assert not values.any() and logits.grad.isfinite().all()


def test_the_recipe_sets_the_weights_of_both_terms() -> None:
    published = {"distill_weight": 9.0, "distill_temperature": 2.0, "distill_standardize": True}
    for fields, expected in (
        ({}, (0.9, 0.9, 4.0, False)),
        ({"distill_alpha": 0.3}, (0.3, 0.3, 4.0, False)),
        (published, (0.9, 9.0, 2.0, True)),
    ):
        recipe = Recipe(teacher=("a.pth",), **fields)
        options = {"classes": 100, "batches_per_epoch": 1, "teachers": [nn.Linear(1, 1)]}
        made = build_techniques(recipe, nn.Linear(1, 1), **options).distillation
        assert (made.alpha, made.weight, made.temperature, made.standardize) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_is_weighted_by_alpha_and_stays_as_it_was(precision: str) -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.LazyLinear(6)]
    teacher, images, labels = nn.Sequential(*layers), torch.randn(4, 3, 8, 8), torch.arange(4)
    teacher(images)
    before = copy.deepcopy(teacher.state_dict())
    logits = torch.randn(4, 6, requires_grad=True)
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():
        expected = (copy.deepcopy(teacher).eval()(images) / 4).softmax(1)
    soft = 4.0**2 * F.kl_div((logits / 4).log_softmax(1), expected, reduction="batchmean")
    for alpha in (0.0, 0.3, 1.0):
        distillation = Distillation([teacher], alpha=alpha, temperature=4.0, precision=precision)
        soft_targets = distillation.soft_targets(images)
        assert soft_targets.dtype == torch.float32 and not soft_targets.requires_grad
        close = {} if precision == "fp32" else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(
            distillation(loss, logits, soft_targets), (1 - alpha) * loss + alpha * soft, **close
        )
    assert equal_states(before, teacher)


# ---- SAM ----

CURVATURE = torch.tensor([[1.0, 10.0]])


class Quadratic(nn.Module):
    """loss = (a w0^2 + b w1^2) / 2 + bias^2 / 2, so its gradient is CURVATURE x weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, -2.0]]))
        self.bias = nn.Parameter(torch.tensor([0.5]))

    def compute_gradients(self) -> None:
        self.zero_grad(set_to_none=True)
        ((CURVATURE * self.weight**2).sum() / 2 + (self.bias**2).sum() / 2).backward()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_takes_the_gradient_a_step_uphill_and_restores_the_weights(adaptive: bool) -> None:
    """e = rho T^2 g / |T g|, where T is 1 for SAM and for biases, |w| + 0.01 for ASAM's weights."""
    model = Quadratic()
    before = copy.deepcopy(model.state_dict())
    model.compute_gradients()
    SharpnessAware(model, 0.3, adaptive=adaptive)(model.compute_gradients)
    w = before["weight"][0]
    g, t = w * CURVATURE[0], w.abs() + 0.01 if adaptive else torch.ones(2)
    norm = math.sqrt(float(((t * g) ** 2).sum()) + 0.5**2)
    torch.testing.assert_close(model.weight.grad[0], CURVATURE[0] * (w + 0.3 * t**2 * g / norm))
    assert model.bias.grad.item() == pytest.approx(0.5 + 0.3 * 0.5 / norm)
    assert equal_states(before, model)


def test_a_gradient_of_zero_moves_nothing() -> None:
    model = Quadratic()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    model.compute_gradients()
    SharpnessAware(model, 0.1)(model.compute_gradients)
    assert torch.equal(model.weight.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("adaptive", [False, True])
def test_batchnorm_statistics_are_those_of_the_first_pass(adaptive: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(6, 3, 5, 5)
    model(images)

    def compute_gradients() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    compute_gradients()
    after_first, first = copy.deepcopy(model[1].state_dict()), model[0].weight.grad.clone()
    SharpnessAware(model, 0.5, adaptive=adaptive)(compute_gradients)
    assert equal_states(after_first, model[1]) and not torch.equal(first, model[0].weight.grad)
    compute_gradients()
    assert model[1].num_batches_tracked == after_first["num_batches_tracked"] + 1


def test_frozen_statistics_normalise_by_the_batch_and_thaw_after_an_error() -> None:
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ZeroDivisionError), frozen_bn_statistics(norm):
        out = norm(torch.randn(50, 3) * 7 + 5)
        assert out.mean().abs() < 1e-5 and torch.equal(norm.running_mean, torch.zeros(3))
        raise ZeroDivisionError
    norm(torch.randn(50, 3) + 5)
    assert norm.running_mean.mean() > 0.3


@pytest.mark.parametrize("kind", ["sam", "asam"])
def test_the_radius_is_the_papers_unless_it_is_given(kind: str) -> None:
    for rho, expected in ((None, SAM_RHO[kind]), (0.7, 0.7)):
        recipe = Recipe(sam=kind, sam_rho=rho)
        sam = build_techniques(recipe, Quadratic(), classes=100, batches_per_epoch=1).sam
        assert (sam.rho, sam.adaptive) == (expected, kind == "asam")


def test_sam_takes_part_from_its_first_epoch_on() -> None:
    batches, weights = batches_of(8, 8, 8), {}
    for sam, start, steps in (("none", None, 2), ("none", None, 3), ("sam", 3, 2), ("sam", 3, 3)):
        model = small_net()
        recipe = Recipe(lr=0.01, epochs=4, milestones=(3,), sam=sam, sam_start=start)
        step = make_step(
            model, recipe, techniques=build_techniques(recipe, model, classes=10, batches_per_epoch=1)
        )
        for batch in batches[:steps]:
            step(*batch)
        weights[sam, steps] = model.state_dict()
    assert same_weights(weights["sam", 2], weights["none", 2])
    assert not same_weights(weights["sam", 3], weights["none", 3])


# ---- averages of weights ----


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 5))


def perturb(model: nn.Module) -> dict[str, Tensor]:
    """Move every weight and statistic at random; returns what they are then."""
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_moving_average_is_its_formula_with_buffers() -> None:
    model = small_network()
    averaging = Averaging(model, ema_decay=0.3)
    assert averaging.network is model
    expected = None
    for step, decay in enumerate([0, 2 / 11, 3 / 12, 0.3, 0.3, 0.3], start=1):  # less than 0.3 at first
        now = perturb(model)
        averaging(step)
        expected = expected or now
        for name, value in now.items():  # BatchNorm's counter is copied
            floating = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value if floating else value
        averaging.refresh()  # changes nothing
        torch.testing.assert_close(dict(averaging.network.state_dict()), expected)


def test_the_decay_rises_to_the_one_asked_for() -> None:
    decays = [decay_after(count, 0.99) for count in (1, 10, 100, 889, 890, 10_000)]
    assert decays == sorted(decays)
    assert decays[0] == pytest.approx(2 / 11) and decays[2] == pytest.approx(101 / 110)
    assert decays[3] < 0.99 and decays[4:] == [0.99, 0.99]


def test_swa_is_the_mean_of_the_epochs_ends_with_statistics_of_its_own() -> None:
    model, images = small_network(), torch.randn(20, 3, 2, 2)
    bn_batches = [(images[:10], torch.zeros(10)), (images[10:], torch.zeros(10))]
    averaging = Averaging(model, swa_start=3, batches_per_epoch=4, bn_batches=bn_batches)
    ends = []
    for step in range(1, 6 * 4 + 1):
        now = perturb(model)
        averaging(step)
        if step % 4 == 0 and step // 4 >= 3:
            ends.append(now)
        assert (averaging.network is model) == (not ends)
    for name, value in averaging.network.named_parameters():
        torch.testing.assert_close(value.detach(), torch.stack([end[name] for end in ends]).mean(0))
    averaging.refresh()
    outputs, norm = averaging.network[0](images), averaging.network[1]
    torch.testing.assert_close(norm.running_mean, outputs.mean((0, 2, 3)).detach())
    assert norm.momentum == 0.1 and equal_states(now, model)


@pytest.mark.parametrize("choice", [{"ema_decay": 0.7}, {"swa_start": 1}])
def test_a_restored_average_resumes_exactly(choice: dict) -> None:
    model = small_network()
    one, two = Averaging(model, **choice), Averaging(model, **choice)
    for step in (1, 2, 3):
        perturb(model)
        one(step)
    two.restore(copy.deepcopy(one.state()), "x.pth")
    for step in (4, 5):
        perturb(model)
        one(step)
        two(step)
    assert equal_states(one.state()["model"], two.state()["model"]) and two.state()["count"] == 5


@pytest.mark.parametrize("state", [{}, {"model": {}}, {"model": 3, "count": 1}, {"count": 1}])
def test_a_foreign_average_is_refused(state: dict) -> None:
    with pytest.raises((RunError, KeyError, TypeError, ValueError)):
        Averaging(small_network(), ema_decay=0.7).restore(state, "x.pth")
