"""hubconf.py: the networks through torch.hub, beside a caller's modules of the same names."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY
from helpers.tiny_checkpoint import CLASSES, save_tiny_checkpoint
from model import MODELS, build_model
from training.checkpoint import load_model

NEEDED = ("hubconf.py", "model.py", "errors.py", "checkpoint.py", "files.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what a hub needs, and of nothing else."""
    copy = tmp_path / "repository"
    copy.mkdir()
    for name in NEEDED:
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    return copy


def load(folder: Path, name: str, **options: object) -> torch.nn.Module:
    return torch.hub.load(str(folder), name, source="local", **options)


def test_every_network_is_an_entrypoint_and_nothing_else_is(folder: Path) -> None:
    spec = torch.hub._import_module("hubconf", str(folder / "hubconf.py"))
    public = {name for name, value in vars(spec).items() if callable(value) and not name.startswith("_")}
    assert public == set(MODELS)
    assert all("pretrained" in getattr(spec, name).__doc__ for name in public)


def test_a_network_without_weights_is_the_models_own(folder: Path) -> None:
    torch.manual_seed(3)
    network = load(folder, "se_resnet20", num_classes=7)
    torch.manual_seed(3)
    expected = build_model("se_resnet20", num_classes=7)
    assert network.training
    assert list(network.state_dict()) == list(expected.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), expected.eval()(images))


def test_pretrained_weights_are_those_of_the_folder(folder: Path) -> None:
    (folder / "weights").mkdir()
    path = save_tiny_checkpoint(folder / "weights" / "resnet20_cifar100.pth")
    network = load(folder, "resnet20", pretrained=True)
    assert not network.training and network.classes == CLASSES
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), load_model(path).model(images))
    with pytest.raises(RuntimeError, match=r"does not fit the network: fc\."):
        load(folder, "resnet20", pretrained=True, num_classes=10)


def test_weights_that_are_not_carried_are_one_line(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no trained weights of resnet56 here") as caught:
        load(folder, "resnet56", pretrained=True)
    assert "\n" not in str(caught.value)
    (folder / "weights").mkdir()
    save_tiny_checkpoint(folder / "weights" / "resnet20_cifar100.pth")
    with pytest.raises(RuntimeError, match="there are some of resnet20"):
        load(folder, "resnet56", pretrained=True)


CALLER = """
import pickle, sys
import torch
import model, utils, errors, checkpoint
path = list(sys.path)
for pretrained in (False, True):
    network = torch.hub.load(sys.argv[1], "resnet20", source="local", pretrained=pretrained)
assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
assert pickle.loads(pickle.dumps(network)).classes == network.classes
for module in (model, utils, errors, checkpoint):
    assert module.MINE and sys.modules[module.__name__] is module, module
assert "files" not in sys.modules and sys.path == path
from training import recipe
assert recipe.MINE
"""


def test_a_callers_modules_of_the_same_names_are_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "weights").mkdir()
    save_tiny_checkpoint(folder / "weights" / "resnet20_cifar100.pth")
    caller = tmp_path / "caller"
    caller.mkdir()
    for name in ("model", "utils", "errors", "checkpoint", "recipe"):
        (caller / f"{name}.py").write_text("MINE = True\n")
    (caller / "main.py").write_text(CALLER)
    done = subprocess.run(
        [sys.executable, "main.py", str(folder)], cwd=caller, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
