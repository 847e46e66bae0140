"""Checkpoints are portable: what a GPU computed loads where there is none."""

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.checkpoint_files import same
from training.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, for machines without one; its class would be pickled with it."""

    device = property(lambda self: torch.device("cuda", 0))


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cuda() if torch.cuda.is_available() else tensor.as_subclass(OnGpu)


def weights() -> dict[str, torch.Tensor]:
    """Weights of several layouts, and two tensors in one storage."""
    both = torch.arange(6.0)
    return {
        "both": both,
        "part": both[2:5],
        "channels_last": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.rand(3).half(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }


def test_a_state_on_a_gpu_is_written_as_cpu_tensors(tmp_path: Path) -> None:
    here = weights()
    there = {name: on_gpu(tensor) for name, tensor in here.items() if name != "part"}
    there["part"] = there["both"][2:5]
    there = {name: there[name] for name in here}

    def state(tensors: dict[str, Any]) -> dict[str, Any]:
        nested = {"state": {0: {"momentum_buffer": tensors["both"]}}, "param_groups": [{"lr": 0.1}]}
        return {"model": OrderedDict(tensors), "optimizer": nested, "pair": (1, [tensors["scalar"], "x"])}

    moved, before = state(there), state(here)
    save_checkpoint(tmp_path / "gpu.pth", moved)
    loaded = torch.load(tmp_path / "gpu.pth", weights_only=True)  # without map_location
    assert same(loaded, {"format_version": FORMAT_VERSION, **before})
    assert same(loaded, load_checkpoint(tmp_path / "gpu.pth"))
    model = loaded["model"]
    assert all(tensor.device.type == "cpu" for tensor in model.values())
    model["both"][2] = 40  # the storage is still one, and so it is stored once
    assert model["part"][0] == loaded["optimizer"]["state"][0]["momentum_buffer"][2] == 40
    assert moved["model"]["both"] is there["both"]  # the run's own state stays where it is


def test_a_state_on_the_cpu_is_written_as_torch_save_writes_it(tmp_path: Path, run_state: dict) -> None:
    """Not a byte differs: no container is replaced, and so no reference to one either."""
    state = {**run_state, "again": run_state["model"], "network": nn.BatchNorm1d(3).state_dict()}
    save_checkpoint(tmp_path / "cpu.pth", state)
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    expected = buffer.getvalue()
    assert (tmp_path / "cpu.pth").read_bytes()[: len(expected) - 2] == expected[:-2]


def test_a_state_dict_on_a_gpu_keeps_its_versions(tmp_path: Path) -> None:
    state_dict = nn.BatchNorm1d(3).state_dict()
    for name, tensor in state_dict.items():
        state_dict[name] = on_gpu(tensor)
    save_checkpoint(tmp_path / "model.pth", {"model": state_dict})
    loaded = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert loaded._metadata[""]["version"] == 2  # of BatchNorm, since it counts its batches
