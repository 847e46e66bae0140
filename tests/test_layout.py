"""The layout: imports point from the scripts down to core/, and importing any file does nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# A file imports files of its own package or of earlier ones in this order; scripts import no other script.
RANKS = ("core", "model", "cifar", "utils", "training", "inspection", "scripts")
FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for folder in (".", "core", "cifar", "training", "inspection")
    for path in (REPOSITORY / folder).glob("*.py")
    if path.stem != "__init__"
}


def package(module: str) -> str:
    """The entry of RANKS that `module` belongs to."""
    name = module.split(".")[0]
    return name if name in RANKS else "scripts"


def project_imports(module: str) -> set[str]:
    """The project's modules that `module` imports, at its top or within a function."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(FILES)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module: str) -> None:
    rank = RANKS.index(package(module))
    for name in project_imports(module):
        own_package = "." in module and package(name) == package(module)
        assert own_package or RANKS.index(package(name)) < rank, f"{module} imports {name}"


def test_torch_alone_is_enough_for_the_networks() -> None:
    assert project_imports("model") == project_imports("hubconf") == set()
    assert {"cifar.dataset", "utils", "training.engine"} <= project_imports("train")  # they are found


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    assert not {name.split(".")[0] for name in FILES} & sys.stdlib_module_names


IMPORT_ALL = """
import importlib, multiprocessing, os, random, signal, sys
random.seed(1)
def state():
    files = {os.path.join(top, name) for top, _, names in os.walk(os.environ["HOME"])
             if "/." not in top and "__pycache__" not in top for name in names
             if not name.startswith("_remote_module")}  # which torch 2.8 writes while it is imported
    return files, random.getstate(), [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert state() == before
import torch
assert not multiprocessing.active_children() and not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
"""


def test_importing_everything_prints_and_writes_nothing(tmp_path: Path) -> None:
    """In a process of its own, from an empty folder that is the home folder too."""
    settings = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL, *FILES],
        cwd=tmp_path,
        env=os.environ | settings | {"NO_ALBUMENTATIONS_UPDATE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", ["benchmark", "evaluate", "experiments", "export", "predict", "train"])
def test_scripts_import_core_before_any_other_package(script: str) -> None:
    imports = [
        node for node in ast.parse(FILES[script].read_text("utf-8")).body if "Import" in type(node).__name__
    ]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert next(name for name in names if name.split(".")[0] not in sys.stdlib_module_names) == "core"


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is that of GNU's OpenMP")
@pytest.mark.parametrize(
    ("given", "spin_count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_core_sets_how_long_threads_spin_unless_the_user_does(given: dict[str, str], spin_count: str) -> None:
    own = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    code = "import core, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=own | given, capture_output=True, text=True)
    assert done.stdout.split() == [spin_count, "False"], done.stderr
