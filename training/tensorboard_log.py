"""TensorBoard logs, for --tensorboard: curves, gradients, augmented images, the network's graph."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from core.errors import UsageError

SHOWN_IMAGES = 64


def import_writer() -> type:
    """torch's SummaryWriter.

    Raises:
        UsageError: the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter


class TensorBoard:
    """Event files in `folder`; steps are epochs, counted from 1.

    A resumed run passes the epoch that it resumes with: TensorBoard then hides what an earlier process logged
    from that epoch on.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, first_epoch: int = 1) -> None:
        self.writer = import_writer()(str(folder), purge_step=first_epoch)

    def show_start(self, model: nn.Module, loader: DataLoader, epoch: int) -> None:
        """Log the graph of `model` and the first augmented images of `epoch`, uint8 [B, 32, 32, 3]."""
        sampler, dataset = loader.batch_sampler, loader.dataset
        sampler.set_epoch(epoch)
        images, _ = dataset.__getitems__(next(iter(sampler)))
        self.writer.add_images("augmented training images", images[:SHOWN_IMAGES], epoch, dataformats="NHWC")
        training, device = model.training, next(model.parameters()).device
        model.eval()  # in training mode, tracing would update the BatchNorm statistics
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.jit.trace, which add_graph uses, is deprecated
            self.writer.add_graph(model, torch.zeros(1, 3, 32, 32, device=device))
        model.train(training)
        self.writer.flush()

    def add_epoch(self, row: Mapping[str, Any], model: nn.Module) -> None:
        """Log a history row, "train_loss" as "loss/train", and histograms of the last batch's gradients.

        Only weights of two or more dimensions get a histogram: the convolutions and the last layer.
        """
        epoch = row["epoch"]
        for name, value in row.items():
            if name != "epoch":
                # train and test under one prefix, so that TensorBoard shows their charts side by side
                self.writer.add_scalar(re.sub(r"(.+)_(loss|acc_percent)$", r"\2/\1", name), value, epoch)
        for name, weight in model.named_parameters():
            if weight.grad is not None and weight.ndim > 1:
                self.writer.add_histogram(f"gradients/{name}", weight.grad.float(), epoch)
        self.writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self.writer.close()
