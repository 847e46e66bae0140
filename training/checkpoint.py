"""Checkpoint files and the trained networks in them: written atomically, verified, read without running code.

A checkpoint is what `torch.save` writes (a zip archive), with the SHA-256 digest of its bytes as the
archive's comment. So `torch.load(path, weights_only=True)` reads it anywhere, and a truncated file or a
flipped bit is found here before anything is unpickled.

The digest finds damage, it does not prove who wrote a file. Loading a file of any origin runs no code from it
(torch >= 2.6) and unpacks no zip bomb. It may still need much memory: torch lets a short pickle allocate
gigabytes.
"""

import contextlib
import hashlib
import io
import pickle
import random
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core.errors import RunError, UsageError
from core.files import atomic_write
from model import build_model
from training.recipe import Recipe

FORMAT_VERSION = 1
COMMENT = b"sha256:"
COMMENT_LENGTH = len(COMMENT) + 64
MAX_BYTES = 4 << 30
# The networks that the repository carries, used where output/ holds no run.
PRETRAINED_FOLDER = Path(__file__).resolve().parent.parent / "weights"
PRETRAINED_WEIGHTS = PRETRAINED_FOLDER / "resnet56_cifar100.pth"


def save_checkpoint(path: str | Path, state: dict[str, Any], keep: str | Path | None = None) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts only) to `path` atomically.

    Tensors are written as CPU tensors, so that the file loads on a machine without an accelerator.
    With `keep`, the earlier checkpoint at `path` is moved there.

    Raises:
        RunError: the file cannot be written; the earlier file at `path` is unchanged.
    """
    content = checkpoint_bytes(state)
    with atomic_write(path, keep) as file:
        file.write(content)


def checkpoint_bytes(state: dict[str, Any]) -> bytes:
    """The content of the file that `save_checkpoint` writes."""
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    if _on_accelerator(state):
        buffer.seek(0)
        on_cpu = torch.load(buffer, map_location="cpu", weights_only=True)  # keeps shared storages shared
        buffer = io.BytesIO()
        torch.save(on_cpu, buffer)
    return _with_digest(buffer.getvalue())


def _on_accelerator(value: Any) -> bool:
    """Whether a tensor in the nested containers of `value` is not on the CPU."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_on_accelerator, value))
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _with_digest(archive: bytes) -> bytes:
    """`archive`, whose comment is empty, with its digest as the comment.

    The last two bytes of an archive give the length of the comment that follows them.
    """
    comment = COMMENT + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + struct.pack("<H", COMMENT_LENGTH) + comment


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote to `path`, all tensors on the CPU.

    Raises:
        RunError: the file is missing, damaged, not a checkpoint of this project, written by a newer version,
            or refers to code or types that `torch.load(weights_only=True)` does not allow.
    """
    content = _read(Path(path))
    archive = content[: -COMMENT_LENGTH - 2] + b"\0\0"
    if content != _with_digest(archive):
        weights = None
        if COMMENT not in content[-COMMENT_LENGTH:]:
            with contextlib.suppress(RunError):  # a truncated file, say
                weights = _state_dict(_unpickle(path, content))
        if weights:
            raise RunError(
                f"{path} holds weights, but not as train.py writes them (there is no checksum): evaluate.py, "
                "predict.py and export.py load them with --model NAME"
            )
        raise RunError(f"{path} is damaged or was not written by train.py: its checksum is missing or wrong")
    state = _unpickle(path, archive)
    if not isinstance(state, dict) or not isinstance(state.get("format_version"), int):
        raise RunError(f"{path} is not a checkpoint of this project: it lacks a format version")
    if state["format_version"] > FORMAT_VERSION:
        raise RunError(
            f"{path} has format version {state['format_version']}, this program reads up to "
            f"{FORMAT_VERSION}: update the program"
        )
    return state


def _unpickle(path: str | Path, archive: bytes) -> Any:
    """What torch.save wrote into `archive`, all tensors on the CPU; no code of it is run."""
    try:
        members = zipfile.ZipFile(io.BytesIO(archive)).infolist()
        # Of two archives in a row torch reads the first, zipfile the last.
        appended = min(member.header_offset for member in members) > 0
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if appended or compressed or sum(member.file_size for member in members) > len(archive):
            raise RunError(f"{path} would unpack to more than its own size: refused")
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except RunError:
        raise
    except pickle.UnpicklingError:
        raise RunError(f"{path} carries code or unknown types: refused; use a file of train.py") from None
    except Exception as error:  # zipfile and torch.load raise many types on a corrupt file
        raise RunError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None


def _state_dict(value: Any) -> dict[str, torch.Tensor] | None:
    """The state dict in `value`, or under one of the usual keys of it, without the prefixes of wrappers.

    DataParallel and DistributedDataParallel prefix names with "module.", torch.compile with "_orig_mod.".
    """
    keys = ("model", "state_dict", "model_state_dict", "net", "weights")
    for found in (value, *(value.get(key) for key in keys)) if isinstance(value, dict) else ():
        if isinstance(found, dict) and found and all(isinstance(v, torch.Tensor) for v in found.values()):
            return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): v for name, v in found.items()}
    return None


def _read(path: Path) -> bytes:
    """The bytes of an archive that torch.save wrote."""
    try:
        if path.is_dir():
            raise RunError(f"{path} is a folder, not a checkpoint: name the .pth file in it")
        if path.exists() and not path.is_file():  # reading a pipe or a device might never end
            raise RunError(f"{path} is not a regular file: name the .pth file written by train.py")
        if path.stat().st_size > MAX_BYTES:
            raise RunError(f"{path} is larger than any checkpoint of this project: refused")
        content = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} does not exist: check the path, or train first") from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not content.startswith(b"PK\x03\x04"):
        raise RunError(f"{path} is not a checkpoint: it is not an archive that torch.save wrote")
    return content


def load_weights(model: nn.Module, weights: Any, source: str | Path) -> None:
    """Copy the state dict `weights` into `model`.

    Raises:
        RunError: entries are missing, unknown or of another shape; the message names the first.
    """
    expected = model.state_dict()
    if not isinstance(weights, dict):
        raise RunError(f"{source} holds no weights")
    misfit = f"{source} does not fit the network"
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]!r:.80}, which the network lacks"
        raise RunError(f"{misfit}: it {what} ({len(missing)} entries missing, {len(unknown)} unknown)")
    for name, tensor in expected.items():
        value = weights[name]
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or value.layout != torch.strided or value.is_nested or value.is_meta:
            raise RunError(f"{misfit}: {name} is not a dense tensor")
        if value.shape != tensor.shape:
            raise RunError(f"{misfit}: {name} is {list(value.shape)}, the network's is {list(tensor.shape)}")
    # A new dict, because a hostile file can set the attributes of its own (_metadata).
    model.load_state_dict({name: weights[name] for name in expected})


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's state that are plain types.

    The others (a Counter of milestones, functions) are rebuilt from the recipe on resume.
    """
    return {k: v for k, v in state.items() if isinstance(v, int | float | str | list | tuple | None)}


def random_state() -> dict[str, Any]:
    """The states of all global generators, as plain types and tensors: Python, NumPy, torch (CPU, CUDA)."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned; CUDA states for as many devices as this machine has.

    Raises:
        ValueError: `state` is not what `random_state` returned.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        for index, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda_state, index)
    except Exception as error:  # each generator raises its own types
        raise ValueError(f"the random states cannot be restored ({type(error).__name__})") from error


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained network in evaluation mode, with what it was trained on.

    `classes[label]` names a label 0..99, `superclasses[superclass_of[label]]` its superclass;
    `state` is the whole checkpoint (history, versions, `epoch` and `accuracy_percent` of the weights); it is
    empty for weights of unknown training, whose `recipe` says nothing but the network.
    """

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    superclass_of: tuple[int, ...]
    path: Path
    state: dict[str, Any]

    @property
    def trained_on(self) -> str | None:
        """The data that it was trained on, in words; None where that is unknown."""
        return self.recipe.data_note if self.state else None


def load_model(
    path: str | Path, device: torch.device | str = "cpu", model_name: str | None = None
) -> LoadedModel:
    """The network of a checkpoint (NAME_best.pth, NAME_training_results.pth, NAME_last.pth) on `device`.

    Args:
        model_name: accepts any file by torch.save with weights of that network for CIFAR-100: a state dict,
            also under a key or with the prefixes of wrappers.

    Raises:
        RunError: the file is missing, damaged, not a checkpoint, or does not fit the network that it names.
        UsageError: there is no network called `model_name`, or a checkpoint of train.py holds another one.
    """
    path = Path(path)
    if model_name is not None:
        named = Recipe(model=model_name)
        if COMMENT not in _read(path)[-COMMENT_LENGTH:]:
            return _load_foreign(path, device, named)
    state = load_checkpoint(path)
    try:
        recipe = Recipe.from_dict(state["recipe"])
        names = tuple(state["classes"]), tuple(state["superclasses"])
        superclass_of = tuple(int(number) for number in state["superclass_of"])
        model = build_model(recipe.model, num_classes=len(names[0]))
    except (KeyError, TypeError, ValueError) as error:  # UsageError is a ValueError
        raise RunError(f"{path} is not a checkpoint of a network: {error!r}") from None
    if model_name not in (None, recipe.model):
        raise UsageError(f"{path} holds a {recipe.model}, not a {model_name}: pass --model {recipe.model}")
    load_weights(model, state.get("model"), path)
    model = model.eval().to(device, memory_format=torch.channels_last)
    return LoadedModel(model, recipe, *names, superclass_of, path, state)


def _load_foreign(path: Path, device: torch.device | str, recipe: Recipe) -> LoadedModel:
    names = load_checkpoint(PRETRAINED_WEIGHTS)
    model = build_model(recipe.model, num_classes=len(names["classes"]))
    load_weights(model, _state_dict(_unpickle(path, _read(path))), path)
    model = model.eval().to(device, memory_format=torch.channels_last)
    groups = tuple(names["classes"]), tuple(names["superclasses"]), tuple(names["superclass_of"])
    return LoadedModel(model, recipe, *groups, path, {})


def find_weights(output_dir: str | Path = "output") -> Path:
    """The weights to use where none are named.

    The best run on CIFAR-100 in `output_dir` that used all images, else the best of PRETRAINED_FOLDER, else
    the best run on a subset of the images.

    Raises:
        UsageError: there are none of these.
    """
    found = []
    for path in sorted([*PRETRAINED_FOLDER.glob("*.pth"), *Path(output_dir).glob("*_best.pth")]):
        try:
            state = load_checkpoint(path)
            recipe, accuracy = Recipe.from_dict(state["recipe"]), float(state["accuracy_percent"])
        except (RunError, KeyError, TypeError, ValueError, AttributeError):
            continue  # a damaged or foreign file
        if recipe.dataset == "cifar100":
            is_whole = recipe.limit_train is None and recipe.limit_test is None
            rank = 1 if path.parent == PRETRAINED_FOLDER else 2 if is_whole else 0
            found.append((rank, accuracy, path))
    if not found:
        raise UsageError(f"no trained weights in {output_dir}: train first, or pass --weights FILE")
    return max(found)[-1]
