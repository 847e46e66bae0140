"""What a recipe refuses: values out of their range, and choices that contradict each other."""

from typing import Any

from core.errors import UsageError

MIXES = ("none", "mixup", "cutmix", "both")
SAMS = ("none", "sam", "asam")
# The networks take sides from 16 to 64; larger than the data's 32 would only add work.
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 32


def one_of(flag: str, value: object, known: Any) -> None:
    """Refuse `value` unless it is among the `known` ones."""
    if value not in known:
        raise UsageError(f"{flag} {value!r:.60} is not known; choose from {', '.join(known)}")


def in_range(flag: str, value: float, low: float, high: float) -> None:
    """Refuse `value` unless it lies from `low` to `high`; NaN never does."""
    if not low <= value <= high:
        raise UsageError(f"{flag} takes a value from {low:,} to {high:,}, not {shown(value)}")


def shown(value: float) -> str:
    """`value` for a message; Python refuses to write out integers of thousands of digits."""
    return "a number with very many digits" if abs(value) > 1e20 and type(value) is int else str(value)


def check_improvements(recipe: Any) -> None:
    """Refuse a recipe whose choices beyond the reference's are out of range or contradict each other.

    Raises:
        UsageError: one line that names the flag.
    """
    one_of("--mix", recipe.mix, MIXES)
    one_of("--sam", recipe.sam, SAMS)
    in_range("--label-smoothing", recipe.label_smoothing, 0, 0.9)
    in_range("--clip-norm", recipe.clip_norm, 0, 1e6)
    in_range("--warmup-epochs", recipe.warmup_epochs, 0, recipe.epochs - 1)
    in_range("--mix-probability", recipe.mix_probability, 0, 1)
    in_range("--mixup-alpha", recipe.mixup_alpha, 1e-3, 100)
    in_range("--cutmix-alpha", recipe.cutmix_alpha, 1e-3, 100)
    in_range("--ema-decay", recipe.ema_decay, 0, 0.999999)
    in_range("--accumulate", recipe.accumulate, 1, recipe.batch_size)
    in_range("--distill-alpha", recipe.distill_alpha, 0, 1)
    in_range("--distill-temperature", recipe.distill_temperature, 0.1, 100)
    in_range("--drop-path", recipe.drop_path, 0, 0.99)
    in_range("--dropout", recipe.dropout, 0, 0.99)
    if recipe.warmup_epochs and recipe.scheduler != "cosine":
        raise UsageError("--warmup-epochs goes with --scheduler cosine only")
    if recipe.dropout and "dropout" not in recipe.network_options:
        raise UsageError(f"--dropout goes with the wide networks (wrn_...) only, not with {recipe.model}")
    if recipe.sam_rho is not None:
        in_range("--sam-rho", recipe.sam_rho, 1e-6, 100)
        if recipe.sam == "none":
            raise UsageError("--sam-rho goes with --sam sam or --sam asam only")
    if recipe.swa_start is not None:
        in_range("--swa-start", recipe.swa_start, 1, recipe.epochs)
        if recipe.ema_decay:
            raise UsageError("--swa-start and --ema-decay both average the weights: pass one of them")
    if recipe.teacher == "":
        raise UsageError("--teacher takes the path of a checkpoint")
    _check_image_sizes(recipe)


def _check_image_sizes(recipe: Any) -> None:
    if recipe.image_sizes is None:
        return
    if not 1 <= len(recipe.image_sizes) <= recipe.epochs:
        raise UsageError("--image-sizes takes at least one size, and no more of them than epochs")
    for size in recipe.image_sizes:
        in_range("--image-sizes", size, SMALLEST_IMAGE, LARGEST_IMAGE)
