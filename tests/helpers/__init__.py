"""What several test files share."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# In front of a script of one process: core.cli without torch, which takes seconds to import.
WITHOUT_TORCH = """
import sys, types
sys.modules["core.distributed"] = types.SimpleNamespace(
    is_main=lambda: True, broadcast_object=lambda value: value, stop=lambda: None
)
"""
