"""Mixed batches: targets that sum to 1, shares as the papers draw them, draws that repeat."""

import pytest
import torch
import torch.nn.functional as F

from training.mixing import Mixing, ProgressiveSize, SeededDraws, soft_hits

KINDS = ("mixup", "cutmix", "both")


def mixing(kind: str = "both", **changes: float) -> Mixing:
    values = {"probability": 1.0, "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "seed": 3, **changes}
    return Mixing(kind, classes=100, **values)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, 8, 8] that are constant, each its number from 1; labels in the same order."""
    numbers = torch.arange(count)
    images = (numbers + 1.0)[:, None, None, None].expand(count, 3, 8, 8).clone()
    return images.contiguous(memory_format=torch.channels_last), numbers


@pytest.mark.parametrize("kind", KINDS)
def test_soft_targets_sum_to_one_and_name_two_neighbours(kind: str) -> None:
    images, labels = batch()
    for step in range(30):
        mixed, targets = mixing(kind)(images, labels, step)
        assert mixed.shape == images.shape and mixed.is_contiguous(memory_format=torch.channels_last)
        assert targets.shape == (6, 100) and targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        for number, row in enumerate(targets):
            assert set(row.nonzero().flatten().tolist()) <= {number, (number - 1) % 6}


@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_are_the_shares_of_the_pixels(kind: str) -> None:
    images, labels = batch()
    for step in range(30):
        mixed, targets = mixing(kind)(images, labels, step)
        share = targets @ F.pad(torch.arange(1.0, 7.0), (0, 94))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), share)


@pytest.mark.parametrize(("alpha", "mean_square"), [(0.2, 0.5 * 1.2 / 1.4), (1.0, 1 / 3)])
def test_mixups_shares_are_beta(alpha: float, mean_square: float) -> None:
    """E lambda^2 = (a + 1) / (2 (2 a + 1)) for Beta(a, a)."""
    images, labels = batch(2)
    mix = mixing("mixup", mixup_alpha=alpha)
    shares = torch.stack([mix(images, labels, step)[1][0, 0] for step in range(800)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert (shares**2).mean().item() == pytest.approx(mean_square, abs=0.05)


def test_a_share_of_the_batches_is_left_alone() -> None:
    images, labels = batch()
    mix = mixing(probability=0.3)
    results = [mix(images, labels, step) for step in range(600)]
    alone = [targets is labels and mixed is images for mixed, targets in results]
    assert sum(alone) / 600 == pytest.approx(0.7, abs=0.06)
    assert mixing(probability=0.0)(images, labels, 0) == (images, labels)


def test_both_kinds_come_about_equally_often() -> None:
    images, labels = batch()
    cut = 0
    for step in range(250):
        mixed, _ = mixing(mixup_alpha=5.0)(images, labels, step)
        cut += bool((mixed == mixed.round()).all())  # pixels of CutMix are those of one image or the other
    assert cut / 250 == pytest.approx(0.5, abs=0.1)


def test_the_draws_follow_from_seed_step_and_rank_alone() -> None:
    images, labels = batch()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = mixing()(images, labels, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(9)
    again = mixing()(images, labels, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (
        mixing()(images, labels, 8),
        mixing(seed=4)(images, labels, 7),
        mixing(rank=1)(*batch(), 7),
    ):
        assert not torch.equal(first[0], other[0])


def test_mixing_draws_the_same_whatever_happened_before_on_the_network() -> None:
    draws = SeededDraws(seed=1)
    images, labels = batch()
    seen = []
    for step in (5, 6, 5):
        assert draws(images, labels, step) == (images, labels)
        seen.append(torch.rand(4))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_hits_are_counts_for_labels_and_shares_for_mixed_targets() -> None:
    predicted, labels = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])
    assert soft_hits(predicted, labels) == 2
    assert soft_hits(predicted, F.one_hot(labels, 5).float()) == 2
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    assert soft_hits(predicted, soft).item() == pytest.approx(0.95)


# ---- sizes ----


@pytest.mark.parametrize(
    ("sizes", "epochs", "expected"),
    [
        ((24, 28, 32), 6, [24, 24, 28, 28, 32, 32]),
        ((24, 28, 32), 4, [24, 24, 28, 32]),
        ((16, 32), 5, [16, 16, 16, 32, 32]),
        ((20,), 2, [20, 20]),
    ],
)
def test_each_size_has_an_equal_part_of_the_epochs(
    sizes: tuple[int, ...], epochs: int, expected: list[int]
) -> None:
    view = ProgressiveSize(sizes, epochs=epochs, batches_per_epoch=3)
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    for epoch, size in enumerate(expected):
        for step in (3 * epoch, 3 * epoch + 2):
            scaled, targets = view(images, labels, step)
            assert scaled.shape == (2, 3, size, size) and targets is labels
            assert (scaled is images) == (size == 32)


def test_scaling_keeps_the_mean_and_averages_fine_patterns() -> None:
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    images = board.float().expand(1, 3, 32, 32)
    scaled, _ = ProgressiveSize((16,), epochs=1, batches_per_epoch=1)(images, torch.zeros(1), 0)
    assert (scaled - 0.5).abs().max() < 0.05  # without antialiasing it would be 0 and 1
