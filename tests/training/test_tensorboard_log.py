"""--tensorboard: what is logged is in the event file."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cifar.dataset import Split
from core.errors import UsageError
from model import build_model
from training.tensorboard_log import TensorBoard
from utils import make_train_loader, normalize

ROW = {
    "epoch": 1,
    "learning_rate": 0.1,
    **{"train_loss": 4.5, "train_acc_percent": 2.5, "test_loss": 4.25, "test_acc_percent": 3.125},
}


@pytest.fixture
def loader():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    return make_train_loader(Split(images, np.arange(12)), batch_size=8, seed=1)


def events_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    return events.Reload()


def test_everything_is_in_the_event_file(tmp_path, loader):
    pytest.importorskip("tensorboard")
    model = build_model("resnet20")
    board = TensorBoard(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    board.show_start(model, loader, epoch=1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loader.batch_sampler.set_epoch(1)
    images, labels = next(iter(loader))
    F.cross_entropy(model(normalize(images)), labels).backward()
    board.add_epoch(ROW, model)
    board.add_epoch(ROW | {"epoch": 2, "train_loss": 4.0}, model)
    board.close()

    events = events_of(tmp_path)
    tags = events.Tags()
    assert tags["graph"]
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    assert scalars["loss/train"] == [(1, 4.5), (2, 4.0)]
    assert scalars["acc_percent/test"] == [(1, 3.125), (2, 3.125)]
    assert scalars["learning_rate"][0] == (1, pytest.approx(0.1))
    assert len(scalars) == 5
    weight = model.fc.weight.grad
    histogram = events.Histograms("gradients/fc.weight")[0].histogram_value
    assert histogram.num == weight.numel()
    assert histogram.max == pytest.approx(weight.max().item())
    assert "gradients/bn1.weight" not in tags["histograms"]
    (shown,) = events.Images("augmented training images")
    assert shown.step == 1
    assert (shown.width, shown.height) == (8 * 32, 32)  # the batch of 8 in one row


def test_a_resumed_run_hides_what_the_killed_one_wrote_later(tmp_path):
    pytest.importorskip("tensorboard")
    model = build_model("resnet20")
    first = TensorBoard(tmp_path)
    for epoch in (1, 2, 3):
        first.add_epoch(ROW | {"epoch": epoch, "train_loss": 10.0 + epoch}, model)
    first.close()
    second = TensorBoard(tmp_path, first_epoch=2)
    second.add_epoch(ROW | {"epoch": 2, "train_loss": 1.0}, model)
    second.close()
    losses = [(event.step, event.value) for event in events_of(tmp_path).Scalars("loss/train")]
    assert losses == [(1, 11.0), (2, 1.0)]


def test_without_the_package_the_flag_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
