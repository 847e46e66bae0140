"""Averages of weights: the formulas by hand, BatchNorm's buffers, and a state that goes on exactly."""

import copy

import pytest
import torch
from torch import nn

from core.errors import RunError
from training.averaging import Averaging, decay_after


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 5))


def wander(model: nn.Module) -> dict[str, torch.Tensor]:
    """Move every weight and statistic at random; what they are then."""
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_moving_average_is_its_formula_with_buffers() -> None:
    model = network()
    averaging = Averaging(model, ema_decay=0.3)
    expected = None
    for step, decay in enumerate([0, 2 / 11, 3 / 12, 0.3, 0.3, 0.3], start=1):  # less than 0.3 at first
        now = wander(model)
        averaging(step)
        if expected is None:
            expected = now
        for name, value in now.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value  # BatchNorm's counter
        torch.testing.assert_close(dict(averaging.network.state_dict()), expected)


def test_the_decay_rises_to_the_one_asked_for() -> None:
    decays = [decay_after(count, 0.99) for count in (1, 10, 100, 889, 890, 10_000)]
    assert decays == sorted(decays)
    assert decays[0] == pytest.approx(2 / 11) and decays[2] == pytest.approx(101 / 110)
    assert decays[3] < 0.99 and decays[4:] == [0.99, 0.99]


def test_before_the_first_step_the_network_is_the_model() -> None:
    model = network()
    assert Averaging(model, ema_decay=0.9).network is model
    assert Averaging(model, swa_start=2).network is model


def test_swa_is_the_mean_of_the_epochs_ends_from_its_start() -> None:
    model = network()
    averaging = Averaging(model, swa_start=3, batches_per_epoch=4)
    ends = []
    for step in range(1, 6 * 4 + 1):
        now = wander(model)
        averaging(step)
        if step % 4 == 0 and step // 4 >= 3:
            ends.append(now)
        assert (averaging.network is model) == (not ends)
    for name, value in averaging.network.named_parameters():
        torch.testing.assert_close(value.detach(), torch.stack([end[name] for end in ends]).mean(0))


def test_swas_statistics_are_those_of_the_averaged_weights() -> None:
    model = network()
    averaging = Averaging(model, swa_start=1, batches_per_epoch=1)
    for step in range(1, 4):
        wander(model)
        averaging(step)
    images = torch.randn(20, 3, 2, 2)
    averaging.bn_batches = [(images[:10], torch.zeros(10)), (images[10:], torch.zeros(10))]
    source = copy.deepcopy(model.state_dict())
    averaging.refresh()
    outputs = averaging.network[0](images)
    measured = averaging.network[1]
    torch.testing.assert_close(measured.running_mean, outputs.mean((0, 2, 3)).detach())
    assert measured.momentum == 0.1
    assert all(torch.equal(source[name], value) for name, value in model.state_dict().items())


def test_a_moving_average_needs_no_refreshing() -> None:
    model = network()
    averaging = Averaging(model, ema_decay=0.5)
    averaging(1)
    before = copy.deepcopy(averaging.state())
    averaging.refresh()
    torch.testing.assert_close(averaging.state()["model"], before["model"], rtol=0, atol=0)


@pytest.mark.parametrize("choice", [{"ema_decay": 0.7}, {"swa_start": 1}])
def test_a_restored_average_goes_on_exactly(choice: dict) -> None:
    torch.manual_seed(0)
    model = network()
    one = Averaging(model, **choice)
    for step in (1, 2, 3):
        wander(model)
        one(step)
    two = Averaging(model, **choice)
    two.restore(copy.deepcopy(one.state()), "x.pth")
    for step in (4, 5):
        wander(model)
        one(step)
        two(step)
    for name, value in one.state()["model"].items():
        assert torch.equal(value, two.state()["model"][name]), name
    assert two.state()["count"] == 5


@pytest.mark.parametrize("state", [{}, {"model": {}}, {"model": 3, "count": 1}, {"count": 1}])
def test_a_foreign_state_is_refused(state: dict) -> None:
    with pytest.raises((RunError, KeyError, TypeError, ValueError)):
        Averaging(network(), ema_decay=0.7).restore(state, "x.pth")
