"""A run in TensorBoard, for --tensorboard: curves, gradients, augmented images, the network's graph."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from core.errors import UsageError

SHOWN_IMAGES = 64


class TensorBoard:
    """Event files in `folder`; steps are epochs, from 1.

    A resumed run passes the epoch that it goes on with: later entries of the killed process are then hidden.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, first_epoch: int = 1) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("--tensorboard needs one more package: pip install tensorboard") from None
        self.writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def show_start(self, model: nn.Module, loader: DataLoader, epoch: int) -> None:
        """Write the graph of `model` and the first augmented images of `epoch`, as the network gets them."""
        sampler, dataset = loader.batch_sampler, loader.dataset
        sampler.set_epoch(epoch)
        images, _ = dataset.__getitems__(next(iter(sampler)))  # uint8 [B, 32, 32, 3]
        self.writer.add_images("augmented training images", images[:SHOWN_IMAGES], epoch, dataformats="NHWC")
        self._add_graph(model)
        self.writer.flush()

    def _add_graph(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        training = model.training
        model.eval()  # tracing a training network would move its BatchNorm statistics
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch calls its own tracer deprecated
            self.writer.add_graph(model, torch.zeros(1, 3, 32, 32, device=device))
        model.train(training)

    def add_epoch(self, row: Mapping[str, Any], model: nn.Module) -> None:
        """Write a history row, and the gradients that the epoch's last batch left: no pass of their own."""
        epoch = row["epoch"]
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(_tag(name), value, epoch)
        for name, weight in model.named_parameters():
            # of several thousand values only: the convolutions and the last layer
            if weight.grad is not None and weight.ndim > 1:
                self.writer.add_histogram(f"gradients/{name}", weight.grad.float(), epoch)
        self.writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self.writer.close()


def _tag(column: str) -> str:
    """ "train_loss" as "loss/train", so that TensorBoard draws what belongs together side by side."""
    for ending in ("loss", "acc_percent"):
        if column.endswith(f"_{ending}"):
            return f"{ending}/{column.removesuffix(f'_{ending}')}"
    return column
