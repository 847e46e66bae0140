"""Averages of a run's weights: the exponential moving average, and equal averages of its last epochs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from training.checkpoint import load_weights


class Averaging:
    """The average of a network's weights, as a network of its own (`network`) beside it.

    Called after every optimizer step with the number of steps that are done.

    - With `ema_decay`, after each step: average <- d average + (1 - d) weights (Tarvainen & Valpola 2017,
      arXiv:1703.01780), beginning as the weights after the first step. d is `ema_decay`, at first less (see
      `decay_after`). BatchNorm's running statistics are averaged along with them, its counters copied.
    - Without, stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407): the equal average of the
      weights at the ends of the epochs from `swa_start` (counted from 1). Averaged statistics would not be
      those of the averaged weights, so `refresh` measures them anew.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ema_decay: float = 0.0,
        swa_start: int = 1,
        batches_per_epoch: int = 1,
    ) -> None:
        self.source = model
        self.ema_decay, self.swa_start, self.batches_per_epoch = ema_decay, swa_start, batches_per_epoch
        self.bn_batches: Sequence[tuple[Tensor, Tensor]] = ()
        average = self._move if ema_decay else None
        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=bool(ema_decay))

    @property
    def network(self) -> nn.Module:
        """The network with averaged weights; with the latest ones where nothing is averaged yet."""
        return self.average.module if int(self.average.n_averaged) else self.source

    def __call__(self, steps_done: int) -> None:
        epochs_done, batch = divmod(steps_done, self.batches_per_epoch)
        if self.ema_decay or (batch == 0 and epochs_done >= self.swa_start):
            self.average.update_parameters(self.source)

    @torch.no_grad()
    def _move(self, averages: list[Tensor], values: list[Tensor], _count: Tensor) -> None:
        """AveragedModel's update: average <- d average + (1 - d) value; whole numbers are copied."""
        if averages[0].is_floating_point():
            # the module's own counter, not `_count`: it is on the CPU, where reading it waits for no device
            decay = decay_after(int(self.average.n_averaged), self.ema_decay)
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    @torch.no_grad()
    def refresh(self) -> None:
        """With SWA, measure the averaged network's BatchNorm statistics on `bn_batches`.

        They are pairs of normalised images and labels; the caller sets them.
        """
        if not self.ema_decay and int(self.average.n_averaged):
            update_bn(self.bn_batches, self.average.module)

    def state(self) -> dict[str, Any]:
        """The average and how many weights are in it, for a checkpoint."""
        return {"model": self.average.module.state_dict(), "count": int(self.average.n_averaged)}

    def restore(self, state: dict[str, Any], source: object) -> None:
        """Go on from what `state` returned.

        Raises:
            RunError: the weights do not fit the network.
            KeyError, TypeError, ValueError: `state` is of another kind.
        """
        load_weights(self.average.module, state["model"], source)
        self.average.n_averaged.fill_(int(state["count"]))


def decay_after(count: int, decay: float) -> float:
    """The moving average's decay once `count` values are in it: (1 + count) / (10 + count), at most `decay`.

    With a constant decay of 0.999 the average would be about as the first weights for hundreds of steps. The
    formula is TensorFlow's, ExponentialMovingAverage with `num_updates`.
    """
    return min(decay, (1 + count) / (10 + count))
