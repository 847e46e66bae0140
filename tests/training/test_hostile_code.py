"""Checkpoints made to do harm: their code is not run, their bombs are not unpacked."""

import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import REPOSITORY
from core.errors import RunError
from helpers.checkpoint_files import archive_of, members_of, refusal, same, sealed
from training.checkpoint import load_checkpoint


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"echo owned > '{self.target}'",)


def exploits(target: Path) -> dict[str, bytes]:
    command = f"echo owned > '{target}'"
    made = {f"protocol {number}": pickle.dumps(Exploit(target), number) for number in range(6)}
    made["inside a state"] = pickle.dumps({"format_version": 1, "model": Exploit(target)}, 2)
    made["INST"] = f"(S{command!r}\nios\nsystem\n.".encode()
    made["OBJ"] = f"(cos\nsystem\nS{command!r}\no.".encode()
    call = f"__import__('os').system({command!r})"
    made["eval"] = f"cbuiltins\neval\n(S{call!r}\ntR.".encode()
    return made


def test_the_exploits_work_where_nothing_guards(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    for name, content in exploits(tmp_path / "owned").items():
        pickle.loads(content)
        assert (tmp_path / "owned").exists(), name
        (tmp_path / "owned").unlink()


@pytest.mark.parametrize("name", exploits(Path("x")))
def test_code_in_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, good_checkpoint: Path, name: str
) -> None:
    target, path = tmp_path / "owned", tmp_path / "evil.pth"
    pickled = exploits(target)[name]
    path.write_bytes(pickled)
    refusal(path)
    members = members_of(good_checkpoint)
    members["archive/data.pkl"] = pickled
    path.write_bytes(sealed(archive_of(members)))
    message = refusal(path)
    assert "carries code" in message and re.search(r"system|eval|STACK_GLOBAL|INST|OBJ", message)
    assert not target.exists()


def test_what_torch_reads_is_what_was_checked(tmp_path: Path, good_checkpoint: Path) -> None:
    """Two archives in a row, so that a reader that counts from the file's end finds the second one's
    members, and one that trusts the stored offset (torch's) the first one's: here of the same lengths."""
    path, members = tmp_path / "two.pth", members_of(good_checkpoint)
    hidden = pickle.dumps({"format_version": 1, "kind": "hidden"}, 2)
    hidden += bytes(len(members["archive/data.pkl"]) - len(hidden))
    first, second = archive_of(members | {"archive/data.pkl": hidden}), archive_of(members)
    assert len(first) == len(second)
    path.write_bytes(sealed(first + second))
    assert torch.load(path, weights_only=True)["kind"] == "hidden"
    assert load_checkpoint(path)["kind"] == "last"


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R.",  # a bytearray of 1.9 GB
        b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.",
        b"\x80\x02ccollections\nCounter\n.",
        b"\x80\x02ctorch\nFloatStorage.__reduce__\n.",
    ],
)
def test_names_that_plain_data_does_not_need_are_refused(
    tmp_path: Path, good_checkpoint: Path, pickled: bytes
) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(sealed(archive_of(members_of(good_checkpoint) | {"archive/data.pkl": pickled})))
    assert "carries code" in refusal(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path, good_checkpoint: Path) -> None:
    path = tmp_path / "twice.pth"
    members = members_of(good_checkpoint)
    path.write_bytes(sealed(archive_of(members | {"archive/DATA.PKL": members["archive/data.pkl"]})))
    assert "two members" in refusal(path)


def test_an_ordinary_archive_made_by_another_writer_loads(tmp_path: Path, good_checkpoint: Path) -> None:
    """So that the refusals above are for what they name, not for the way those archives are made."""
    path = tmp_path / "again.pth"
    path.write_bytes(sealed(archive_of(members_of(good_checkpoint))))
    assert same(load_checkpoint(path), load_checkpoint(good_checkpoint))


BOMB = """
import resource, sys
from training.checkpoint import load_checkpoint
from core.errors import RunError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_checkpoint(path)
    except RunError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MiB")
"""


def test_a_zip_bomb_is_refused_and_takes_no_memory(tmp_path: Path, good_checkpoint: Path) -> None:
    gigabyte = tmp_path / "bomb.pth"
    with zipfile.ZipFile(gigabyte, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members_of(good_checkpoint).items():
            archive.writestr(name, content)
        with archive.open("archive/data/99", "w", force_zip64=True) as member:
            zeros = bytes(1 << 24)
            for _ in range(64):
                member.write(zeros)
    content = gigabyte.read_bytes()
    assert len(content) < 10_000_000
    gigabyte.write_bytes(sealed(content))
    # the same in front of a harmless archive, whose directory is the one at the end
    nested = tmp_path / "nested.pth"
    nested.write_bytes(sealed(content + archive_of({"archive/data.pkl": b"N."})))
    # a stored member that says it is 1 GiB
    lying = tmp_path / "lying.pth"
    lying.write_bytes(sealed(archive_of({"x/data.pkl": b"N." * 9}).replace(b"\x12\0\0\0", b"\0\0\0\x40")))
    process = subprocess.run(
        [sys.executable, "-c", BOMB, gigabyte, nested, lying],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=60,
    )
    lines = process.stdout.splitlines()
    assert process.stderr == "" and len(lines) == 4, process
    assert "unpack to more than its own size" in lines[0]
    assert "unpack to more than its own size" in lines[2]
    assert int(lines[3].split()[0]) < 200


def test_random_bytes_in_the_pickle_of_a_sealed_archive_never_escape_as_another_error(
    tmp_path: Path, good_checkpoint: Path, run_state: dict[str, Any]
) -> None:
    """A stranger can make the checksum right: then torch's reader sees the damage."""
    path, members = tmp_path / "fuzzed.pth", members_of(good_checkpoint)
    names = sorted(members)
    rng = random.Random(13)
    outcomes = {"refused": 0, "loaded": 0}
    for _ in range(150):
        changed = dict(members)
        name = "archive/data.pkl" if rng.random() < 0.7 else rng.choice(names)
        content = bytearray(changed[name])
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        changed[name] = bytes(content)
        path.write_bytes(sealed(archive_of(changed)))
        try:
            load_checkpoint(path)
        except RunError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 30 and outcomes["loaded"] > 10, outcomes
