"""The layout: imports of project files point down only, and importing any of them does nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in REPOSITORY.glob("*.py"))
# A file imports files of lower rank only. A new file needs its place here.
RANKS = (
    {"errors", "sync_bn"},
    {"archive", "cores", "distributed", "fast_transforms", "files", "model", "synthetic"}
    | {"mixing", "recipe_checks", "sam", "schedules"}
    | {"html_page", "image_files", "tensorboard_log", "lr_suggestion", "metrics"},
    {"augment", "checkpoint", "cli", "device", "download", "figures", "recipes"},
    {"averaging", "dataset", "distill", "flags_training", "measuring", "run_files"}
    | {"eda_plots", "plots", "report_plots"},
    {"recipe"},
    {"analysis", "eda", "exporting", "flags", "plain_recipe", "strategies", "report", "trained", "utils"},
    {"engine", "benchmark_setting"},
    {"plain_side", "inference", "recorded", "run"},
    {"beyond_reference", "dialogue", "benchmark_pairs"},
    {"train", "evaluate", "predict", "benchmark", "export", "experiments", "hubconf"},
)
RANK_OF = {module: rank for rank, modules in enumerate(RANKS) for module in modules}


def project_imports(module: str) -> set[str]:
    """The project's files that `module` imports, at its top or within a function."""
    tree = ast.parse((REPOSITORY / f"{module}.py").read_text("utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names.add((node.module or "").split(".")[0])
    return names & set(MODULES)


def test_there_are_modules() -> None:
    assert {"errors", "model", "train"} <= set(MODULES)
    assert {"dataset", "utils", "engine"} <= project_imports("train")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert module in RANK_OF, f"{module}.py has no rank in RANKS"
    upward = {name for name in project_imports(module) if RANK_OF.get(name, 99) >= RANK_OF[module]}
    assert not upward, f"{module} (rank {RANK_OF[module]}) imports {upward}"


def test_no_file_is_named_like_one_of_the_standard_library() -> None:
    assert not set(MODULES) & sys.stdlib_module_names


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
    """In one process of its own, from an empty folder; data and settings files would show in either."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "work").mkdir()
    watched = {"HOME": str(home), "WATCHED": str(home), "TMPDIR": str(tmp_path / "work")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL, *MODULES],
        cwd=tmp_path / "work",
        env=os.environ | watched | {"PYTHONPATH": str(REPOSITORY), "NO_ALBUMENTATIONS_UPDATE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
