"""What a recipe adds to the plain training step, built from the recipe; the step knows their order only."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from core import distributed
from training.averaging import Averaging
from training.distill import Distillation
from training.mixing import Mixing, ProgressiveSize, SeededDraws
from training.recipe import Recipe
from training.sam import SAM_RHO, Clip, SharpnessAware

View = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
Refinement = Callable[[Callable[[], object]], None]


@dataclass(frozen=True, eq=False)
class Techniques:
    """The additions to a training step; by default there are none.

    Attributes:
        views: each takes (images, targets, step number) and returns images and targets.
        accumulate: the pieces that a batch is computed in.
        distillation: (loss, logits, images) -> the loss to train on.
        refinements: each takes a function that computes the gradients again, and changes the gradients.
        averaging: called with the number of steps done, after each.
    """

    views: tuple[View, ...] = ()
    accumulate: int = 1
    distillation: Distillation | None = None
    refinements: tuple[Refinement, ...] = ()
    averaging: Averaging | None = None


def build_techniques(
    recipe: Recipe,
    model: nn.Module,
    *,
    classes: int,
    batches_per_epoch: int,
    teacher: nn.Module | None = None,
) -> Techniques:
    """The additions that `recipe` asks for.

    Args:
        model: the network on its device, not yet wrapped or compiled.
        teacher: the network of `recipe.teacher`, on the same device.
    """
    draws = {"seed": recipe.seed, "rank": distributed.rank()}
    views: list[View] = []
    if recipe.drop_path or recipe.dropout:
        views.append(SeededDraws(**draws))
    if recipe.image_sizes is not None:
        length = {"epochs": recipe.epochs, "batches_per_epoch": batches_per_epoch}
        views.append(ProgressiveSize(recipe.image_sizes, **length))
    if recipe.mix != "none":
        chances = {
            "probability": recipe.mix_probability,
            "mixup_alpha": recipe.mixup_alpha,
            "cutmix_alpha": recipe.cutmix_alpha,
        }
        views.append(Mixing(recipe.mix, classes=classes, **chances, **draws))
    refinements: list[Refinement] = []
    if recipe.sam != "none":
        rho = recipe.sam_rho or SAM_RHO[recipe.sam]
        refinements.append(SharpnessAware(model, rho, adaptive=recipe.sam == "asam"))
    if recipe.clip_norm:
        refinements.append(Clip(model, recipe.clip_norm))
    distillation = None
    if teacher is not None:
        weighting = {"alpha": recipe.distill_alpha, "temperature": recipe.distill_temperature}
        distillation = Distillation(teacher, precision=recipe.precision, **weighting)
    averaging = None
    if recipe.uses_averaging:
        averaging = Averaging(
            model,
            ema_decay=recipe.ema_decay,
            swa_start=recipe.swa_start or 1,
            batches_per_epoch=batches_per_epoch,
        )
    return Techniques(tuple(views), recipe.accumulate, distillation, tuple(refinements), averaging)
