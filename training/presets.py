"""Recipes by name: groups of flags that go together, each value as its flag takes it.

No accuracy stands here, since none of them has been measured at its full length yet; what each aims at is in
GOALS.
"""

from collections.abc import Mapping
from typing import Any

from model import model_options

PRESETS: dict[str, dict[str, Any]] = {
    # Exactly the defaults: the reference's own recipe.
    "reference": {},
    # 20 epochs leave no time to overfit: augmentation is light, and the rate is high and falls to nothing.
    "fast": {
        "epochs": 20,
        "scheduler": "onecycle",
        "lr": 0.3,
        "augment": "standard",
        "label_smoothing": 0.1,
        "decay_bn": False,
        "ema_decay": 0.995,
    },
    # ResNet-56 has too few parameters to gain from strong mixing; what is published of it gains most from a
    # long schedule and from (A)SAM, which doubles the time.
    "best": {
        "model": "resnet56",
        "epochs": 300,
        "scheduler": "cosine",
        "lr": 0.1,
        "warmup_epochs": 5,
        "augment": "standard",
        "mix": "mixup",
        "mix_probability": 0.5,
        "mixup_alpha": 0.2,
        "label_smoothing": 0.1,
        "decay_bn": False,
        "sam": "asam",
        "ema_decay": 0.999,
    },
    # 42 times the parameters of ResNet-56: here regularisation is what is wanting.
    "wide": {
        "model": "wrn_28_10",
        "epochs": 200,
        "scheduler": "cosine",
        "lr": 0.1,
        "warmup_epochs": 5,
        "augment": "autoaugment",
        "mix": "both",
        "mix_probability": 1.0,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
        "ema_decay": 0.999,
    },
}
GOALS = {
    "reference": "the reference's recipe, which the defaults are",
    "fast": "as much as 20 epochs can give",
    "best": "ResNet-56 at its best; two passes a step",
    "wide": "WideResNet-28-10; about 40 times the work of ResNet-56 a step",
}


def preset_values(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the group `name` beside the flags `given`, which win and make some others void."""
    merged = {**PRESETS[name], **given}
    return {
        key: value
        for key, value in PRESETS[name].items()
        if key not in given and not _overridden(key, merged)
    }


def _overridden(key: str, merged: Mapping[str, Any]) -> bool:
    """Whether the flags given leave this value of a group without meaning."""
    if key == "warmup_epochs":  # for another schedule, or for a run that is shorter than the warm-up
        return merged["scheduler"] != "cosine" or merged["warmup_epochs"] >= merged["epochs"]
    if key == "ema_decay":
        return "swa_start" in merged
    if key == "dropout":
        return "dropout" not in model_options(merged["model"])
    return False


def presets_table() -> str:
    """The recipes as --help prints them."""
    lines = ["recipes (--recipe NAME; a flag beside it overrides it; accuracies are not yet measured):"]
    for name, values in PRESETS.items():
        lines += [f"  {name}: {GOALS[name]}", *_wrapped([_flag(key, value) for key, value in values.items()])]
    return "\n".join(lines)


def _flag(key: str, value: Any) -> str:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _wrapped(flags: list[str], width: int = 78) -> list[str]:
    """The flags in indented lines, none of them torn apart."""
    lines: list[str] = []
    for flag in flags:
        if lines and len(lines[-1]) + 1 + len(flag) <= width:
            lines[-1] += f" {flag}"
        else:
            lines.append(f"      {flag}")
    return lines
