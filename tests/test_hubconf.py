"""hubconf.py: the networks through torch.hub, beside a caller's modules of the same names."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import REPOSITORY
from helpers.tiny_checkpoint import CLASSES, save_tiny_checkpoint
from model import MODELS, build_model
from training.checkpoint import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The two files that a hub needs, and weights of resnet20."""
    copy = tmp_path / "repository"
    (copy / "weights").mkdir(parents=True)
    for name in ("hubconf.py", "model.py"):
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    save_tiny_checkpoint(copy / "weights" / "resnet20_cifar100.pth")
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
    expected = build_model("se_resnet20", num_classes=7).state_dict()
    assert network.training and list(network.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("pretrained", [True, "cifar100"])
def test_pretrained_weights_are_those_of_the_folder(folder: Path, pretrained: bool | str) -> None:
    network = load(folder, "resnet20", pretrained=pretrained)
    assert not network.training and network.classes == CLASSES
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(folder / "weights" / "resnet20_cifar100.pth").model(images)
        torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet20",
            {"pretrained": "cifar10"},
            'must be True, False, "cifar100" or "reference", not \'cifar10\'',
        ),
        ("resnet20", {"pretrained": None}, 'must be True, False, "cifar100" or "reference", not None'),
        (
            "resnet56",
            {"pretrained": True},
            r"no resnet56_cifar100\.pth in .* \(there are: resnet20_cifar100\.pth\)",
        ),
        ("resnet20", {"widen": 2}, "resnet20 does not take the option widen"),
        ("resnet20", {"pretrained": True, "num_classes": 10}, r"size mismatch for fc\.weight"),
    ],
)
def test_what_is_not_there_is_refused(folder: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(folder, name, **options)


CALLER = """
import pickle, sys
import torch
import core, model, utils
path = list(sys.path)
for pretrained in (False, True):
    network = torch.hub.load(sys.argv[1], "resnet56", source="local", pretrained=pretrained)
assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
assert pickle.loads(pickle.dumps(network)).classes == network.classes
for module in (core, model, utils):
    assert module.MINE and sys.modules[module.__name__] is module, module
assert "training" not in sys.modules and sys.path == path
import training
assert training.MINE
"""


def test_a_callers_modules_of_the_same_names_are_left_alone(tmp_path: Path) -> None:
    for name in ("core", "model", "utils", "training"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "main.py").write_text(CALLER)
    command = [sys.executable, "main.py", str(REPOSITORY)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
