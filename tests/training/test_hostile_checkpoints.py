"""Damaged checkpoints, and files that are none, are refused in one line."""

import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import RunError
from helpers.checkpoint_files import archive_of, refusal, same, sealed
from training import checkpoint
from training.checkpoint import COMMENT_LENGTH, FORMAT_VERSION, load_checkpoint, save_checkpoint

# ---- damage ----


def test_truncated_at_any_length_it_is_refused(good_checkpoint: Path, tmp_path: Path) -> None:
    content, path = good_checkpoint.read_bytes(), tmp_path / "cut.pth"
    rng = random.Random(7)
    lengths = {0, 1, 3, 4, 5, 71, 72, 73, 93, 94, 95, len(content) - 1, len(content) - 2}
    lengths |= {len(content) - COMMENT_LENGTH + shift for shift in (-23, -22, -2, -1, 0, 1)}
    lengths |= {rng.randrange(len(content)) for _ in range(100)}
    for length in lengths:
        path.write_bytes(content[:length])
        refusal(path)


def test_a_flipped_bit_anywhere_is_refused_or_provably_harmless(
    good_checkpoint: Path, run_state: dict[str, Any], tmp_path: Path
) -> None:
    content, path = good_checkpoint.read_bytes(), tmp_path / "flipped.pth"
    rng = random.Random(11)
    ends = [*range(30), *range(len(content) - 120, len(content))]
    refused = harmless = 0
    for place in ends + [rng.randrange(len(content)) for _ in range(500)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except RunError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert same(loaded, {"format_version": FORMAT_VERSION, **run_state})
            harmless += 1
    assert refused >= 600, (refused, harmless)


def test_bytes_added_removed_or_swapped_are_refused(good_checkpoint: Path, tmp_path: Path) -> None:
    content, path = good_checkpoint.read_bytes(), tmp_path / "changed.pth"
    half = len(content) // 2
    for changed in (
        content + b"\0",
        b"\0" + content,
        content[:half] + content[half + 1 :],
        content[:half] + b"\0" + content[half:],
        content[:half] + bytes(len(content) - half),
        content + content,
        content[half:] + content[:half],
        content.replace(b"sha256:", b"sha255:"),
    ):
        path.write_bytes(changed)
        refusal(path)


def test_what_torch_save_wrote_without_a_checksum_is_refused(tmp_path: Path) -> None:
    torch.save({"format_version": 1}, tmp_path / "bare.pth")
    assert "checksum" in refusal(tmp_path / "bare.pth")
    torch.save({"format_version": 1}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "not an archive" in refusal(tmp_path / "old.pth")


# ---- files that are no checkpoint ----


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"\x89PNG\r\n\x1a\n" + bytes(500), b"PK", b"PK\x03\x04" + bytes(500), os.urandom(5000)],
    ids=["empty", "text", "png", "PK", "PK and zeros", "random"],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.pth").write_bytes(content)
    refusal(tmp_path / "other.pth")


def test_an_ordinary_zip_with_a_right_checksum_is_refused(tmp_path: Path) -> None:
    for members in (
        {"a.txt": b"hello"},
        {"x/data.pkl": b""},
        {"x/data.pkl": b"\x80\x02"},
        {"data.pkl": b"N."},
    ):
        (tmp_path / "zip.pth").write_bytes(sealed(archive_of(members)))
        refusal(tmp_path / "zip.pth")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing.pth")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "file").write_text("x")
    refusal(tmp_path / "file" / "below.pth")
    refusal(tmp_path / ("n" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refusal(tmp_path / "loop")
    with pytest.raises(RunError, match=r"cannot read|does not exist"):
        load_checkpoint("nul\0byte")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "no regular file" in refusal(tmp_path / "pipe.pth")
    for device in ("/dev/zero", "/dev/null"):
        assert "no regular file" in refusal(Path(device))


def test_a_file_larger_than_any_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(checkpoint.MAX_BYTES + 1)  # sparse
    try:
        assert "larger than any" in refusal(path)
    finally:
        path.unlink()


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new.pth", {"format_version": FORMAT_VERSION + 1})
    assert "update the program" in refusal(tmp_path / "new.pth")


@pytest.mark.parametrize("value", [[1, 2], "x", 3, torch.zeros(2), {"model": 1}, {"format_version": "1"}])
def test_other_contents_are_no_checkpoint(tmp_path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    (tmp_path / "x.pth").write_bytes(sealed(buffer.getvalue()))
    assert "format version" in refusal(tmp_path / "x.pth")
