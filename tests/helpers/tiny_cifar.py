"""A small look-alike of CIFAR-100 that the project takes for the real one."""

import gzip
import hashlib
import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True)
class TinyCifar:
    """The look-alike: the archive's bytes and each file's, by name."""

    archive: bytes
    members: dict[str, bytes]

    @property
    def md5(self) -> str:
        return hashlib.md5(self.archive).hexdigest()

    def lay(self, data_dir: Path) -> Path:
        """Write the three files under `data_dir` and return their folder."""
        folder = data_dir / "cifar-100-python"
        folder.mkdir(parents=True)
        for name, content in self.members.items():
            (folder / name).write_bytes(content)
        return folder


def tar_gz(entries: list[tuple[tarfile.TarInfo | str, bytes]]) -> bytes:
    """The bytes of a tar.gz with these members (a name stands for a plain file)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry, content in entries:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            if info.isfile():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)  # without the time: the same bytes in every process


def tiny_split(per_class: int, seed: int) -> dict:
    """What a CIFAR-100 file unpickles to, with `per_class` images of random pixels a class."""
    rng = np.random.default_rng(seed)
    fine = [label for label in range(100) for _ in range(per_class)]
    return {
        "data": rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8),
        "fine_labels": fine,
        "coarse_labels": [label % 20 for label in fine],
    }


def tiny_contents() -> dict[str, dict]:
    """What the three files of a look-alike with 200 training and 100 test images unpickle to."""
    names = {
        "fine_label_names": [f"class{label}" for label in range(100)],
        "coarse_label_names": [f"group{group}" for group in range(20)],
    }
    return {"train": tiny_split(2, seed=1), "test": tiny_split(1, seed=2), "meta": names}


def install_tiny_cifar(monkeypatch: pytest.MonkeyPatch, contents: dict[str, dict]) -> TinyCifar:
    """A look-alike with these contents, whose checksums `dataset` takes for the official ones."""
    from cifar import dataset

    members = {name: pickle.dumps(value, protocol=2) for name, value in contents.items()}
    archive = tar_gz([(f"cifar-100-python/{name}", data) for name, data in members.items()])
    tiny = TinyCifar(archive, members)
    sums = {name: hashlib.md5(data).hexdigest() for name, data in members.items()}
    monkeypatch.setattr(dataset, "MEMBER_MD5", sums)
    monkeypatch.setattr(dataset, "ARCHIVE_MD5", tiny.md5)
    monkeypatch.setattr(dataset, "ARCHIVE_BYTES", len(archive))
    monkeypatch.setattr(dataset, "SOURCES", ())
    monkeypatch.delenv("CIFAR100_URL", raising=False)
    return tiny
