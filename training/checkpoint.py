"""Checkpoint files: written whole or not at all, checked by a digest, read without running code.

A checkpoint is what `torch.save` writes (a zip archive), with the SHA-256 of all that stands before it as
the archive's comment. So `torch.load(path, weights_only=True)` reads it anywhere, and a truncated file or a
single flipped bit is found here before anything is unpickled.
"""

import copy
import functools
import hashlib
import io
import operator
import os
import pickletools
import platform
import random
import re
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core.errors import RunError
from core.files import atomic_write

FORMAT_VERSION = 1
COMMENT = b"sha256:"
COMMENT_LENGTH = len(COMMENT) + 64
# An archive's last record without a comment: 22 bytes, the last two of which give the comment's length.
END_RECORD = b"PK\x05\x06"
MAX_BYTES = 4 << 30
# All that the pickle of plain data and tensors names. torch's own list for weights_only is longer and lets
# forty bytes claim gigabytes (a bytearray of a given length).
PLAIN_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|"
    r"torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
NAMING_OPCODES = {"GLOBAL", "INST", "STACK_GLOBAL", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


def save_checkpoint(path: str | Path, state: dict[str, Any], keep: str | Path | None = None) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts only) to `path` atomically.

    Tensors are written as CPU tensors, so that the file loads on a machine without the device.

    With `keep`, the earlier checkpoint at `path` is moved there.

    Raises:
        RunError: the file cannot be written; what stood at `path` stays.
    """
    buffer = io.BytesIO()
    torch.save(_on_cpu({"format_version": FORMAT_VERSION, **state}, {}), buffer)
    content = buffer.getvalue()
    with atomic_write(path, keep) as file:
        file.write(content[:-2])
        file.write(struct.pack("<H", COMMENT_LENGTH))
        file.write(COMMENT + hashlib.sha256(content).hexdigest().encode())


def _on_cpu(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    """`value` with its tensors on the CPU; where they are there already it is the same object.

    Args:
        storages: the CPU copies so far, by the device address copied from, so that tensors which share a
            storage share its copy.
    """
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.cpu()
        layout = value.storage_offset(), value.size(), value.stride()
        return torch.empty(0, dtype=value.dtype).set_(storages[storage.data_ptr()], *layout)
    if not isinstance(value, dict | list | tuple):
        return value
    old = list(value.values() if isinstance(value, dict) else value)
    new = [_on_cpu(item, storages) for item in old]
    if all(map(operator.is_, old, new)):
        return value
    if not isinstance(value, dict):
        return type(value)(new)
    moved = copy.copy(value)  # a state dict has attributes too
    moved.update(zip(value, new, strict=True))
    return moved


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote to `path`, all tensors on the CPU.

    Raises:
        RunError: there is no such file, it is damaged, it is no checkpoint of this project, a newer
            version wrote it, or it carries anything but plain data.
    """
    archive = _checked_members(Path(path), _verified(Path(path), _read(Path(path))))
    try:
        state = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile archive makes the reader raise: damage all the same
        raise RunError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or not isinstance(state.get("format_version"), int):
        raise RunError(f"{path} is no checkpoint of this project: it lacks a format version")
    if state["format_version"] > FORMAT_VERSION:
        raise RunError(
            f"{path} has format version {state['format_version']}, this program reads up to "
            f"{FORMAT_VERSION}: update the program"
        )
    return state


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise RunError(f"{path} is a folder, not a checkpoint: name the .pth file in it")
        if path.exists() and not path.is_file():  # a pipe or a device: reading could wait, or go on, for ever
            raise RunError(f"{path} is no regular file: name the .pth file that train.py wrote")
        if path.stat().st_size > MAX_BYTES:
            raise RunError(f"{path} is larger than any checkpoint of this project: refused")
        return path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} does not exist: check the path, or train first") from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _verified(path: Path, content: bytes) -> bytes:
    """`content` without its comment, once the digest is right."""
    if not content.startswith(b"PK\x03\x04"):
        raise RunError(f"{path} is no checkpoint: it is not an archive that torch.save wrote")
    body, comment = content[:-COMMENT_LENGTH], content[-COMMENT_LENGTH:]
    # torch.save leaves the comment's length 0, and the digest is that of what it left
    archive = body[:-2] + b"\0\0"
    whole = body[-22:-18] == END_RECORD and body[-2:] == struct.pack("<H", COMMENT_LENGTH)
    if not whole or comment != COMMENT + hashlib.sha256(archive).hexdigest().encode():
        raise RunError(f"{path} is damaged or was not written by train.py: its checksum is missing or wrong")
    return archive


def _checked_members(path: Path, archive: bytes) -> io.BytesIO:
    """The members of `archive`, once sizes and names are right, in an archive made anew.

    Anew, because two readers of one zip may find different members in it: what torch reads has to be what
    was looked at here.
    """
    anew = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(anew, "w") as target:
            members = source.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            if packed or sum(member.file_size for member in members) > len(archive):
                raise RunError(f"{path} would unpack to more than its own size: refused")
            # torch finds members whatever their case
            if len({member.filename.lower() for member in members}) < len(members):
                raise RunError(f"{path} holds two members of one name: refused")
            for member in members:
                content = source.read(member)
                if member.filename.lower().endswith("data.pkl"):
                    _refuse_code(path, content)
                target.writestr(member.filename, content)
    except RunError:
        raise
    except Exception as error:  # zipfile raises many kinds for a hostile archive
        raise RunError(f"{path} is no readable archive ({type(error).__name__})") from None
    anew.seek(0)
    return anew


def _refuse_code(path: Path, pickled: bytes) -> None:
    """Refuse a pickle that names anything but PLAIN_NAMES; nothing is unpickled for that."""
    for opcode, argument, _ in pickletools.genops(pickled):
        plain_name = opcode.name == "GLOBAL" and PLAIN_NAMES.fullmatch(str(argument))
        if opcode.name in NAMING_OPCODES and not plain_name:
            named = ascii(str(argument or opcode.name).replace(" ", "."))[1:-1]
            raise RunError(
                f"{path} carries code ({named:.60}) instead of plain data: refused; "
                "use a file that train.py wrote"
            )


def load_weights(model: nn.Module, weights: Any, source: str | Path) -> None:
    """Copy the state dict `weights` into `model`.

    Raises:
        RunError: entries are missing, unknown or of another shape; the message names the first.
    """
    expected = model.state_dict()
    if not isinstance(weights, dict):
        raise RunError(f"{source} holds no weights: train.py writes them under 'model'")
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]!r:.80}, which the network lacks"
        raise RunError(
            f"{source} does not fit the network: it {what} "
            f"({len(missing)} entries missing, {len(unknown)} unknown)"
        )
    for name, tensor in expected.items():
        value = weights[name]
        if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise RunError(
                f"{source} does not fit the network: {name} is {shape}, the network's is {list(tensor.shape)}"
            )
    # from the tensors alone: a state dict's own attributes are not to be trusted
    model.load_state_dict({name: weights[name] for name in expected})


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's state that are plain types.

    The rest (a Counter of milestones, functions) is made anew from the recipe when the run goes on.
    """
    kinds = (int, float, str, bool, list, tuple, type(None))
    return {key: value for key, value in state.items() if isinstance(value, kinds)}


def random_state() -> dict[str, Any]:
    """Every global generator's state, as plain types and tensors: Python, NumPy, torch on CPU and CUDA."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned.

    CUDA states are put back as far as this machine has devices.

    Raises:
        ValueError: `state` is not what `random_state` returned.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(cuda_state, index)
    except Exception as error:  # each generator has its own way to complain
        raise ValueError(f"the random states cannot be put back ({type(error).__name__})") from error


def versions() -> dict[str, str]:
    """The versions that can change a run's bits, for the checkpoint and the log."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "albumentations", "numpy", "opencv-python-headless")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            found[package] = version(package)
        except ImportError:  # PackageNotFoundError is one: another build of OpenCV, say
            found[package] = "unknown"
    return found


@functools.cache
def commit() -> str:
    """The commit of this code, with "-dirty" where its files differ from it; "unknown" without git.

    Asked for once a process: the log and the checkpoints name the same one, whatever happens meanwhile.
    """
    folder = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    only_here = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # not the repository around it
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=only_here)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
