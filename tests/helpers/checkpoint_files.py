"""Checkpoints to be damaged: a run's state, the archive's parts put together anew, what a refusal says."""

import hashlib
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import RunError
from training.checkpoint import COMMENT, COMMENT_LENGTH, load_checkpoint, plain, random_state, versions
from training.recipe import Recipe


def same(a: Any, b: Any) -> bool:
    """Equality through nested containers, tensors bit by bit (so that NaN equals itself)."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def make_run_state() -> dict[str, Any]:
    """A state like a run's: network, optimizer after two steps, schedule, random states, history."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    model(torch.rand(2, 3, 8, 8))
    recipe = Recipe(epochs=3)
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, 2)
    for _ in range(2):
        model(torch.rand(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return {
        "kind": "last",
        "recipe": recipe.to_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": plain(scheduler.state_dict()),
        "random": random_state(),
        "history": [{"epoch": 1, "train_loss": 4.25, "test_loss": float("nan")}],
        "best": {"epoch": 0, "accuracy_percent": float("-inf"), "model": {}},
        "versions": versions(),
        "nan": torch.tensor([float("nan"), 1.0]),
        "half": torch.rand(3).bfloat16().float(),
        "channels_last": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def refusal(path: Path) -> str:
    """The one line with which `path` is refused."""
    with pytest.raises(RunError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))
    return message


def sealed(content: bytes) -> bytes:
    """`content`, an archive without a comment, with the comment that a checkpoint carries."""
    digest = COMMENT + hashlib.sha256(content).hexdigest().encode()
    return content[:-2] + struct.pack("<H", COMMENT_LENGTH) + digest


def archive_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
