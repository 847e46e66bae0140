"""Knowledge distillation: learning from a trained network's answers beside the labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.machine import autocast


class Distillation:
    """Hinton et al. 2015 (arXiv:1503.02531): (1 - alpha) x the labels' loss + alpha x the teacher's.

    The teacher's is T^2 KL(teacher || student), both softened by the temperature T, in nats an image,
    averaged over the batch; T^2 keeps the size of its gradients while T changes. The teacher sees the very
    images that the student sees, in evaluation mode.

    Args:
        teacher: a network on the training device; it is put into evaluation mode and never trained.
        precision: "fp32", or "bf16" for autocast of the teacher's pass.
    """

    def __init__(
        self, teacher: nn.Module, *, alpha: float, temperature: float, precision: str = "fp32"
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.alpha, self.temperature, self.precision = alpha, temperature, precision

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss to train on.

        Args:
            loss: the mean loss against the labels, a scalar.
            logits: the student's float32 [N, classes].
            images: normalised float32 [N, 3, H, W].
        """
        with torch.no_grad(), autocast(images.device, self.precision):
            answers = self.teacher(images).float()
        return (1 - self.alpha) * loss + self.alpha * softened_loss(logits, answers, self.temperature)


def softened_loss(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(answers / T) || softmax(logits / T)), the mean over the images; both [N, classes]."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(answers / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
