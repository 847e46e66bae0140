"""A trained network, as every script that uses one gets it: from a checkpoint alone, without flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import RunError, UsageError
from model import build_model
from training.checkpoint import load_checkpoint, load_weights
from training.recipe import Recipe

# The weights that the repository carries, used where output/ holds no run.
CARRIED_WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "resnet56_cifar100.pth"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network in evaluation mode, with what it was trained on.

    `classes[label]` names a label 0..99, `superclasses[superclass_of[label]]` its superclass;
    `state` is the whole checkpoint (history, versions, `epoch` and `accuracy_percent` of the weights).
    """

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    superclass_of: tuple[int, ...]
    path: Path
    state: dict[str, Any]


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """The network of a checkpoint (NAME_best.pth, NAME_training_results.pth, NAME_last.pth) on `device`.

    Raises:
        RunError: the file is missing, damaged, no checkpoint, or does not fit the network that it names.
    """
    path = Path(path)
    state = load_checkpoint(path)
    try:
        recipe = Recipe.from_dict(state["recipe"])
        names = tuple(state["classes"]), tuple(state["superclasses"])
        superclass_of = tuple(int(number) for number in state["superclass_of"])
        model = build_model(recipe.model, num_classes=len(names[0]))
    except (KeyError, TypeError, ValueError) as error:  # UsageError is a ValueError
        raise RunError(f"{path} is no checkpoint of a network: {error!r}") from None
    load_weights(model, state.get("model"), path)
    model = model.eval().to(device, memory_format=torch.channels_last)
    return LoadedModel(model, recipe, *names, superclass_of, path, state)


def find_weights(output_dir: str | Path = "output") -> Path:
    """The weights to use where none are named.

    The best run on CIFAR-100 in `output_dir` that used all images, else the carried weights, else the best
    run on part of the images.

    Raises:
        UsageError: there are none of these.
    """
    whole: list[tuple[float, Path]] = []
    partial: list[tuple[float, Path]] = []
    for path in sorted(Path(output_dir).glob("*_best.pth")):
        try:
            state = load_checkpoint(path)
            recipe, accuracy = Recipe.from_dict(state["recipe"]), float(state["accuracy_percent"])
        except (RunError, KeyError, TypeError, ValueError, AttributeError):
            continue  # a damaged or foreign file is not the best
        if recipe.dataset == "cifar100":
            all_images = recipe.limit_train is None and recipe.limit_test is None
            (whole if all_images else partial).append((accuracy, path))
    if whole:
        return max(whole)[1]
    if CARRIED_WEIGHTS.exists():
        return CARRIED_WEIGHTS
    if partial:
        return max(partial)[1]
    raise UsageError(f"no trained weights in {output_dir}: train first, or pass --weights FILE")
