"""The commit of the code that a run names in its log and checkpoints."""

import shutil
import subprocess
from pathlib import Path

import pytest

from training import checkpoint


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_codes_own_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    commit = checkpoint.commit.__wrapped__  # without its cache
    code = tmp_path / "checkpoint.py"
    code.write_text("1\n")
    monkeypatch.setattr(checkpoint, "__file__", str(code))
    assert commit() == "unknown"
    git("init", "-q")
    git("add", "checkpoint.py")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert commit() == head
    code.write_text("2\n")
    assert commit() == f"{head}-dirty"
    (tmp_path / "within").mkdir()  # a copy within another repository is not that repository's code
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "within" / "checkpoint.py"))
    assert commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"
