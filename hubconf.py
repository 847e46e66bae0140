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
    sys.modules[_spec.name] = _model = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_model)


def _entrypoint(name: str):
    def build(pretrained: bool | str = False, **options: float) -> torch.nn.Module:
        """The network, from normalised float32 [N, 3, 32, 32] to logits [N, num_classes].

        Normalised: (level / 255 - mean) / std by channel, with the means 0.5071, 0.4867, 0.4408 and the
        standard deviations 0.2675, 0.2565, 0.2761. With `pretrained` True or "cifar100" it has the best
        weights for CIFAR-100 of this network, with "reference" those of the reference's recipe; it is then
        in evaluation mode, and `classes` holds the names of the labels. Else it is untrained.
        `options` are num_classes (default 100) and those of model.build_model.

        Raises:
            ValueError: `pretrained` or an option is not known, or there are no weights for this network.
        """
        if pretrained not in (False, True, "cifar100", "reference"):
            raise ValueError(f'pretrained must be True, False, "cifar100" or "reference", not {pretrained!r}')
        network = _model.build_model(name, **options)
        if not pretrained:
            return network
        path = _FOLDER / "weights" / f"{name}_{'cifar100' if pretrained is True else pretrained}.pth"
        if not path.is_file():
            known = ", ".join(sorted(found.name for found in path.parent.glob("*.pth"))) or "no weights"
            raise ValueError(f"no {path.name} in {path.parent} (there are: {known})")
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state["model"])
        network.classes = tuple(state["classes"])
        return network.eval()

    build.__name__ = name
    return build


globals().update({_name: _entrypoint(_name) for _name in _model.MODELS})
