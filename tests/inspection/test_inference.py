"""Logits by the engine's own loop, bit by bit; averages over shifted and mirrored views."""

import numpy as np
import pytest
import torch
from torch import nn

from cifar.dataset import Split
from core.errors import RunError
from inspection.inference import (
    SHIFTS_PX,
    VIEWS,
    averaged_log_probabilities,
    logits_of,
    shift_accuracy,
    shifted,
)
from model import build_model
from training.engine import evaluate


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20").eval().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((20, 3, 32, 32), generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (20,), generator=generator)
    return list(zip(images.split(8), labels.split(8), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_metrics_are_the_engines_and_the_logits_give_them(network, batches, precision: str) -> None:
    metrics, logits = logits_of(network, batches, precision=precision)
    assert metrics == evaluate(network, batches, precision=precision)
    labels = torch.cat([labels for _, labels in batches])
    assert (logits.shape, logits.dtype) == ((20, 100), torch.float32)
    assert 100 * int((logits.argmax(1) == labels).sum()) / 20 == metrics.accuracy_percent
    loss = nn.functional.cross_entropy(logits.double(), labels).item()
    assert loss == pytest.approx(metrics.loss, rel=1e-6)
    assert not network._forward_hooks, "the network is left as it was"


def test_the_network_is_left_as_it_was_after_an_error(batches) -> None:
    broken = build_model("resnet20")
    nn.init.constant_(broken.fc.bias, float("nan"))
    with pytest.raises(RunError, match="NaN"):
        logits_of(broken, batches)
    assert not broken._forward_hooks


def test_a_shift_moves_pixels_and_reflects_at_the_edge() -> None:
    row = torch.arange(4.0).expand(1, 1, 4, 4)
    for step, expected in ((1, [1, 0, 1, 2]), (-1, [1, 2, 3, 2])):
        assert shifted(row, 0, step)[0, 0].tolist() == [expected] * 4
        assert torch.equal(shifted(row.mT, step, 0), shifted(row, 0, step).mT)


def test_views_are_ten_different_ones_and_the_first_is_the_image_itself() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = [shifted(image, *view) for view in VIEWS]
    assert torch.equal(seen[0], image)
    assert len({view.numpy().tobytes() for view in seen}) == len(VIEWS) == 10
    assert all(torch.equal(seen[5 + n], seen[n].flip(3)) for n in range(5)), "and their mirror images"


def test_probabilities_are_averaged_not_logits(network, batches) -> None:
    views = VIEWS[4:6]
    averaged = averaged_log_probabilities(network, batches, views=views)
    each = []
    for view in views:
        _, logits = logits_of(network, [(shifted(images, *view), labels) for images, labels in batches])
        each.append(logits.double().softmax(1))
    torch.testing.assert_close(averaged.exp(), sum(each) / len(each), rtol=1e-12, atol=0)
    assert not torch.allclose(each[0], each[1], rtol=1e-3)


def test_an_image_and_its_mirror_image_get_the_same_average(network, batches) -> None:
    images, labels = batches[0]
    plain = averaged_log_probabilities(network, [(images, labels)])
    mirrored = averaged_log_probabilities(network, [(images.flip(3), labels)])
    torch.testing.assert_close(plain, mirrored, rtol=0, atol=1e-5)
    _, one = logits_of(network, [(images, labels)])
    _, other = logits_of(network, [(images.flip(3), labels)])
    assert not torch.allclose(one, other, rtol=0, atol=1e-2), "of itself the network tells them apart"


class BrightestPixel(nn.Module):
    """Classifies an image by the row (or column) of its brightest pixel, and keeps its input."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.axis, self.seen = axis, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return self.scale * images.amax(dim=(1, self.axis))


@pytest.mark.parametrize("axis", [2, 3])
def test_a_shift_moves_all_images_and_uncovers_black(axis: int) -> None:
    """The pixel stands at row and column 20, but 10 images of 25 are labelled as if it stood at 22."""
    images = np.full((25, 32, 32, 3), 50, dtype=np.uint8)
    images[:, 20, 20] = 255
    labels = np.repeat([20, 22], [15, 10])
    network = BrightestPixel(axis)
    accuracy, count = shift_accuracy(network, Split(images, labels), batch_size=2)
    assert count == 5 and SHIFTS_PX == (-4, -2, 0, 2, 4)
    along = accuracy if axis == 2 else accuracy.T
    assert along.shape == (5, 5) and (along == along[0]).all(), "the other direction plays no part"
    assert sorted(along[0, 2:4]) == [40, 60] and not along[0, [0, 1, 4]].any()  # 2 or 3 of either label
    first = network.seen[0][0]  # moved up and left by 4
    black = first.amin(dim=(1, 2), keepdim=True)
    assert torch.equal(first[:, 28:], black.expand(3, 4, 32)) and (first[:, :28, :28] > black).all()
