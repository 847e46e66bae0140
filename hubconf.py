"""The networks for torch.hub, each under its name in `model.MODELS`; torch is all they need.

torch.hub.load(FOLDER_OR_REPOSITORY, "resnet56", source="local", pretrained=True)
"""

import importlib.util
import pathlib
import sys

import torch

dependencies = ["torch"]

_FOLDER = pathlib.Path(__file__).resolve().parent
# model.py under a name that no module of the caller has, registered so that networks can be pickled, and
# loaded only once: a second copy of the classes could not pickle the first one's networks.
_model = sys.modules.get("cifar100_hub_model")
if _model is None or _model.__file__ != str(_FOLDER / "model.py"):
    _spec = importlib.util.spec_from_file_location("cifar100_hub_model", _FOLDER / "model.py")
    _model = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_model)
    sys.modules[_spec.name] = _model


def _load_pretrained(network: torch.nn.Module, name: str) -> torch.nn.Module:
    path = _FOLDER / "weights" / f"{name}_cifar100.pth"
    if not path.is_file():
        known = ", ".join(sorted(file.name.partition("_cifar100")[0] for file in path.parent.glob("*.pth")))
        raise ValueError(f"no pretrained weights for {name} in {path.parent} (there are: {known or 'none'})")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(state["model"])
    network.classes = tuple(state["classes"])
    return network.eval()


def _entrypoint(name: str):
    def build(pretrained: bool | str = False, **options: float) -> torch.nn.Module:
        if pretrained not in (False, True, "cifar100"):
            raise ValueError(f'pretrained must be True, False or "cifar100", not {pretrained!r}')
        network = _model.build_model(name, **options)
        return _load_pretrained(network, name) if pretrained else network

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} for 32x32 images: normalised float32 [N, 3, 32, 32] in, logits out.

    Normalised: (level / 255 - mean) / std by channel, with the means 0.5071, 0.4867, 0.4408 and the standard
    deviations 0.2675, 0.2565, 0.2761.

    Args:
        pretrained: True or "cifar100" for the weights trained on CIFAR-100 in weights/; the network is then
            in evaluation mode, and `classes` holds the names of the 100 classes. False: random weights, in
            training mode.
        options: num_classes (default 100) and the other options of model.build_model for this network.

    Raises:
        ValueError: `pretrained` or an option is not known, or there are no weights for this network.
    """
    return build


globals().update({_name: _entrypoint(_name) for _name in _model.MODELS})
