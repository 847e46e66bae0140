"""The layout: imports point from the scripts down to core/, and importing any file does nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# A file imports files of its own room or of rooms before it in this order; scripts import no other script.
RANKS = ("core", "model", "cifar", "utils", "training", "inspection", "scripts")
FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for folder in (".", "core", "cifar", "training", "inspection")
    for path in (REPOSITORY / folder).glob("*.py")
    if path.stem != "__init__"
}


def room(module: str) -> str:
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


def test_the_modules_are_found() -> None:
    assert {"core.errors", "model", "train"} <= set(FILES)
    assert {"cifar.dataset", "utils", "training.engine"} <= project_imports("train")


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module: str) -> None:
    rank = RANKS.index(room(module))
    for name in project_imports(module):
        own_room = "." in module and room(name) == room(module)
        assert own_room or RANKS.index(room(name)) < rank, f"{module} imports {name}"


def test_model_needs_torch_alone() -> None:
    assert project_imports("model") == set()


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    assert not {name.split(".")[0] for name in FILES} & sys.stdlib_module_names


IMPORT_ALL = """
import importlib, os, random, signal, sys
folders = [os.getcwd(), os.environ["WATCHED"]]
def listing():
    return {os.path.join(top, name) for folder in folders for top, _, names in os.walk(folder)
            if "/." not in top and "__pycache__" not in top for name in names}
handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
random.seed(1)
state = random.getstate()
before = listing()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert random.getstate() == state, "the random state moved"
assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers, "signals are handled"
new = listing() - before
assert not new, new
import multiprocessing
assert not multiprocessing.active_children()
import torch
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
"""


def test_importing_everything_prints_and_writes_nothing(tmp_path: Path) -> None:
    """In a process of its own, from an empty folder; data and settings files would show in either."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "work").mkdir()
    watched = {"HOME": str(home), "WATCHED": str(home), "TMPDIR": str(tmp_path / "work")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL, *FILES],
        cwd=tmp_path / "work",
        env=os.environ | watched | {"PYTHONPATH": str(REPOSITORY), "NO_ALBUMENTATIONS_UPDATE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
