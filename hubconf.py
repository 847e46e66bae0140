"""The networks for torch.hub, each under its name in `model.MODELS`:

torch.hub.load(FOLDER_OR_REPOSITORY, "resnet56", source="local", pretrained=True)

Without trained weights this needs torch alone; with them, NumPy too.
"""

import contextlib
import importlib.util
import pathlib
import sys

dependencies = ["torch"]

_FOLDER = pathlib.Path(__file__).resolve().parent
# Where model.py stands in sys.modules when it comes from here. It has to stand somewhere, or pickling and
# torch.compile could not find the networks' code.
_MODEL_MODULE = "cifar100_hub_model"


@contextlib.contextmanager
def _imports_from_here():
    """Inside, `import errors` and the like mean the files of this folder; after it all is as it was.

    The caller may well have modules called model or utils: neither may stand in for the other's.
    """
    names = {path.stem for path in _FOLDER.glob("*.py")} - {"hubconf"}
    earlier = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(_FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(_FOLDER))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(earlier)


def _load_model_module():
    """model.py of this folder as the module _MODEL_MODULE; once it is loaded, the same one again."""
    loaded = sys.modules.get(_MODEL_MODULE)
    if loaded is not None and loaded.__file__ == str(_FOLDER / "model.py"):
        return loaded
    spec = importlib.util.spec_from_file_location(_MODEL_MODULE, _FOLDER / "model.py")
    module = importlib.util.module_from_spec(spec)
    with _imports_from_here():
        spec.loader.exec_module(module)
    sys.modules[_MODEL_MODULE] = module
    return module


def _load_trained_weights(network, name):
    """Put the weights that this folder carries into `network`; it gets `classes`, the names by label.

    Raises:
        RunError: there are none for it, or they are damaged or of another number of classes.
    """
    path = _FOLDER / "weights" / f"{name}_cifar100.pth"
    with _imports_from_here():
        from core.errors import RunError
        from training import checkpoint
    if not path.is_file():
        carried = sorted(
            file.name.removesuffix("_cifar100.pth") for file in path.parent.glob("*_cifar100.pth")
        )
        raise RunError(
            f"no trained weights of {name} here: {path} does not exist; "
            + (f"there are some of {', '.join(carried)}; " if carried else "")
            + "pass pretrained=False, or train it with train.py"
        )
    state = checkpoint.load_checkpoint(path)
    checkpoint.load_weights(network, state.get("model"), path)
    network.classes = tuple(state.get("classes", ()))


def _entrypoint(name):
    def build(pretrained=False, **options):
        network = _model.build_model(name, **options)
        if pretrained:
            _load_trained_weights(network, name)
            network.eval()
        return network

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} for 32x32 images: normalised float32 [N, 3, 32, 32] in, logits out.

    Normalised: (level / 255 - mean) / std by channel, with the means 0.5071, 0.4867, 0.4408 and the standard
    deviations 0.2675, 0.2565, 0.2761.

    Args:
        pretrained: with the weights trained on CIFAR-100 that the folder carries; the network is then in
            evaluation mode, and `classes` holds the names of the 100 classes. Without: in training mode.
        options: num_classes (default 100) and what else model.build_model takes for it.
    """
    return build


_model = _load_model_module()
globals().update({_name: _entrypoint(_name) for _name in _model.MODELS})
