"""Checkpoints are read as they were written; states and weights of a stranger are refused in one line."""

import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import RunError
from helpers.checkpoint_files import same
from model import build_model
from training.checkpoint import (
    FORMAT_VERSION,
    load_checkpoint,
    load_weights,
    plain,
    random_state,
    restore_random_state,
    save_checkpoint,
    versions,
)
from training.recipe import Recipe

# ---- what is written is what is read ----


def test_a_round_trip_is_exact(run_state: dict[str, Any], good_checkpoint: Path) -> None:
    assert same(load_checkpoint(good_checkpoint), {"format_version": FORMAT_VERSION, **run_state})


def test_plain_torch_reads_it_without_running_code(run_state: dict[str, Any], good_checkpoint: Path) -> None:
    assert same(
        torch.load(good_checkpoint, weights_only=True), {"format_version": FORMAT_VERSION, **run_state}
    )
    with zipfile.ZipFile(good_checkpoint) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"epoch": 1})
    save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 2
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_failed_save_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"epoch": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.os.fsync", fail)
    with pytest.raises(RunError, match="No space left"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1


def draws() -> list[Any]:
    return [
        [random.random(), random.gauss(0, 1)],
        [*np.random.rand(3).tolist(), np.random.randn()],
        torch.rand(5).tolist(),
    ]


def test_random_states_go_on_exactly_through_a_file(tmp_path: Path) -> None:
    kept = random_state()
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    draws()  # leaves half of a pair of Gaussian draws cached in Python's and in NumPy's generator
    save_checkpoint(tmp_path / "x.pth", {"random": random_state()})
    expected = [draws(), draws()]
    random.seed(30)
    np.random.seed(40)
    torch.manual_seed(50)
    assert [draws(), draws()] != expected
    restore_random_state(load_checkpoint(tmp_path / "x.pth")["random"])
    assert [draws(), draws()] == expected
    restore_random_state(kept)


@pytest.mark.parametrize("part", ["python", "numpy", "torch"])
@pytest.mark.parametrize("value", [None, [], 3, "x", [1, 2, 3], torch.zeros(3), [3, [1] * 700, None]])
def test_random_states_of_a_stranger_are_a_value_error(part: str, value: Any) -> None:
    kept = random_state()
    with pytest.raises(ValueError):
        restore_random_state({**kept, part: value})
    with pytest.raises(ValueError):
        restore_random_state({key: entry for key, entry in kept.items() if key != part})
    restore_random_state(kept)


def test_a_scheduler_goes_on_from_its_plain_state() -> None:
    recipe = Recipe(epochs=100)
    optimizer = recipe.build_optimizer(nn.Linear(2, 2))
    scheduler = recipe.build_scheduler(optimizer, 1)
    for _ in range(39):
        optimizer.step()
        scheduler.step()
    kept, weights = plain(scheduler.state_dict()), optimizer.state_dict()
    again = recipe.build_optimizer(nn.Linear(2, 2))
    again_scheduler = recipe.build_scheduler(again, 1)
    again.load_state_dict(weights)
    again_scheduler.load_state_dict(kept)
    rates = []
    for one, its_scheduler in ((optimizer, scheduler), (again, again_scheduler)):
        seen = []
        for _ in range(61):
            seen.append(one.param_groups[0]["lr"])
            one.step()
            its_scheduler.step()
        rates.append(seen)
    assert rates[0] == rates[1] and rates[0][0] > rates[0][-1]


def test_versions_are_plain_strings() -> None:
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(type(value) is str for value in found.values())


def test_a_copy_of_a_checkpoint_is_a_checkpoint(good_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(good_checkpoint, tmp_path / "renamed")
    assert load_checkpoint(tmp_path / "renamed")["kind"] == "last"


# ---- weights that do not fit ----


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    return build_model("resnet20", num_classes=100)


def misfit(model: nn.Module, weights: Any) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError) as caught:
        load_weights(model, weights, "some/file.pth")
    message = str(caught.value)
    assert message.startswith("some/file.pth") and "\n" not in message
    assert same(dict(model.state_dict()), before)  # nothing was loaded by halves
    return message


def test_weights_of_another_network_are_refused(resnet20: nn.Module) -> None:
    message = misfit(resnet20, build_model("resnet32", num_classes=100).state_dict())
    assert "does not fit the network" in message and "0 entries missing" in message
    message = misfit(build_model("resnet32", num_classes=100), resnet20.state_dict())
    assert "lacks" in message and "0 unknown" in message


def test_another_number_of_classes_names_both_shapes(resnet20: nn.Module) -> None:
    message = misfit(resnet20, build_model("resnet20", num_classes=10).state_dict())
    assert "[10, 64]" in message and "[100, 64]" in message


@pytest.mark.parametrize("weights", [None, [], "x", 3, {}, {1: 2}, {"line\nbreak": torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(resnet20: nn.Module, weights: Any) -> None:
    misfit(resnet20, weights)


def test_a_missing_entry_and_a_wrong_kind_of_entry_are_named(resnet20: nn.Module) -> None:
    whole = dict(resnet20.state_dict())
    last = list(whole)[-1]
    assert last in misfit(resnet20, {name: value for name, value in whole.items() if name != last})
    assert last in misfit(resnet20, whole | {last: 3.0})
    assert "'more\\nlines'" in misfit(resnet20, whole | {"more\nlines": torch.zeros(1)})


def test_weights_that_fit_are_copied_nan_included(resnet20: nn.Module, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in resnet20.state_dict().items()}
    first = next(iter(weights))
    weights[first].view(-1)[0] = float("nan")
    save_checkpoint(tmp_path / "x.pth", {"model": weights})
    other = build_model("resnet20", num_classes=100)
    loaded = load_checkpoint(tmp_path / "x.pth")["model"]
    load_weights(other, loaded, tmp_path / "x.pth")
    assert same(dict(other.state_dict()), weights)


def test_a_state_dicts_own_attributes_are_not_used(resnet20: nn.Module, tmp_path: Path) -> None:
    weights = resnet20.state_dict()
    weights._metadata = "hostile"
    save_checkpoint(tmp_path / "x.pth", {"model": weights})
    load_weights(build_model("resnet20"), load_checkpoint(tmp_path / "x.pth")["model"], "x")
