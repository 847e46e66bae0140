"""What several test files share."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# In front of a script of one process: core.cli without torch, which takes seconds to import.
WITHOUT_TORCH = """
import sys, types
sys.modules["core.distributed"] = types.SimpleNamespace(
    is_main=lambda: True, broadcast_object=lambda value: value, stop=lambda: None
)
"""


def python(script: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A Python process that runs `script` with the project's modules, but without torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH + script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=REPOSITORY, **{**pipes, **options})
