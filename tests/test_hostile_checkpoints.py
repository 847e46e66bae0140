"""Checkpoints: exact round trips; damaged, foreign and malicious files are refused in one line."""

import hashlib
import io
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
from checkpoint import (
    COMMENT,
    COMMENT_LENGTH,
    FORMAT_VERSION,
    load_checkpoint,
    load_weights,
    plain,
    random_state,
    restore_random_state,
    save_checkpoint,
    versions,
)
from errors import RunError
from model import build_model
from recipe import Recipe

REPOSITORY = Path(__file__).resolve().parent.parent


def same(a: Any, b: Any) -> bool:
    """Equality through nested containers, tensors bit by bit (so that NaN equals itself)."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def run_state() -> dict[str, Any]:
    """A state like a run's: network, optimizer after two steps, schedule, random states, history."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    model(torch.rand(2, 3, 8, 8))
    recipe = Recipe(epochs=3)
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, 2)
    for _ in range(2):
        model(torch.rand(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return {
        "kind": "last",
        "recipe": recipe.to_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": plain(scheduler.state_dict()),
        "random": random_state(),
        "history": [{"epoch": 1, "train_loss": 4.25, "test_loss": float("nan")}],
        "best": {"epoch": 0, "accuracy_percent": float("-inf"), "model": {}},
        "versions": versions(),
        "nan": torch.tensor([float("nan"), 1.0]),
        "half": torch.rand(3).bfloat16().float(),
        "channels_last": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
    }


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return run_state()


@pytest.fixture(scope="module")
def good(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "run_last.pth"
    save_checkpoint(path, state)
    return path


def refusal(path: Path) -> str:
    """The one line with which `path` is refused."""
    with pytest.raises(RunError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))
    return message


def sealed(content: bytes) -> bytes:
    """`content`, an archive without a comment, with the comment that a checkpoint carries."""
    digest = COMMENT + hashlib.sha256(content).hexdigest().encode()
    return content[:-2] + struct.pack("<H", COMMENT_LENGTH) + digest


def archive_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---- what is written is what is read ----


def test_a_round_trip_is_exact(state: dict[str, Any], good: Path) -> None:
    assert same(load_checkpoint(good), {"format_version": FORMAT_VERSION, **state})


def test_plain_torch_reads_it_without_running_code(state: dict[str, Any], good: Path) -> None:
    assert same(torch.load(good, weights_only=True), {"format_version": FORMAT_VERSION, **state})
    with zipfile.ZipFile(good) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"epoch": 1})
    save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 2
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_failed_save_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"epoch": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.os.fsync", fail)
    with pytest.raises(RunError, match="No space left"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1


def draws() -> list[Any]:
    return [
        [random.random(), random.gauss(0, 1)],
        [*np.random.rand(3).tolist(), np.random.randn()],
        torch.rand(5).tolist(),
    ]


def test_random_states_go_on_exactly_through_a_file(tmp_path: Path) -> None:
    kept = random_state()
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    draws()  # leaves half of a pair of Gaussian draws cached in Python's and in NumPy's generator
    save_checkpoint(tmp_path / "x.pth", {"random": random_state()})
    expected = [draws(), draws()]
    random.seed(30)
    np.random.seed(40)
    torch.manual_seed(50)
    assert [draws(), draws()] != expected
    restore_random_state(load_checkpoint(tmp_path / "x.pth")["random"])
    assert [draws(), draws()] == expected
    restore_random_state(kept)


@pytest.mark.parametrize("part", ["python", "numpy", "torch"])
@pytest.mark.parametrize("value", [None, [], 3, "x", [1, 2, 3], torch.zeros(3), [3, [1] * 700, None]])
def test_random_states_of_a_stranger_are_a_value_error(part: str, value: Any) -> None:
    kept = random_state()
    with pytest.raises(ValueError):
        restore_random_state({**kept, part: value})
    with pytest.raises(ValueError):
        restore_random_state({key: entry for key, entry in kept.items() if key != part})
    restore_random_state(kept)


def test_a_scheduler_goes_on_from_its_plain_state() -> None:
    recipe = Recipe(epochs=100)
    optimizer = recipe.build_optimizer(nn.Linear(2, 2))
    scheduler = recipe.build_scheduler(optimizer, 1)
    for _ in range(39):
        optimizer.step()
        scheduler.step()
    kept, weights = plain(scheduler.state_dict()), optimizer.state_dict()
    again = recipe.build_optimizer(nn.Linear(2, 2))
    again_scheduler = recipe.build_scheduler(again, 1)
    again.load_state_dict(weights)
    again_scheduler.load_state_dict(kept)
    rates = []
    for one, its_scheduler in ((optimizer, scheduler), (again, again_scheduler)):
        seen = []
        for _ in range(61):
            seen.append(one.param_groups[0]["lr"])
            one.step()
            its_scheduler.step()
        rates.append(seen)
    assert rates[0] == rates[1] and rates[0][0] > rates[0][-1]


# ---- damage ----


def test_truncated_at_any_length_it_is_refused(good: Path, tmp_path: Path) -> None:
    content, path = good.read_bytes(), tmp_path / "cut.pth"
    rng = random.Random(7)
    lengths = {0, 1, 3, 4, 5, 71, 72, 73, 93, 94, 95, len(content) - 1, len(content) - 2}
    lengths |= {len(content) - COMMENT_LENGTH + shift for shift in (-23, -22, -2, -1, 0, 1)}
    lengths |= {rng.randrange(len(content)) for _ in range(100)}
    for length in lengths:
        path.write_bytes(content[:length])
        refusal(path)


def test_a_flipped_bit_anywhere_is_refused_or_provably_harmless(
    good: Path, state: dict[str, Any], tmp_path: Path
) -> None:
    content, path = good.read_bytes(), tmp_path / "flipped.pth"
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
            assert same(loaded, {"format_version": FORMAT_VERSION, **state})
            harmless += 1
    assert refused >= 600, (refused, harmless)


def test_bytes_added_removed_or_swapped_are_refused(good: Path, tmp_path: Path) -> None:
    content, path = good.read_bytes(), tmp_path / "changed.pth"
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


# ---- malice ----


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
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, good: Path, name: str) -> None:
    target, path = tmp_path / "owned", tmp_path / "evil.pth"
    pickled = exploits(target)[name]
    path.write_bytes(pickled)
    refusal(path)
    members = members_of(good)
    members["archive/data.pkl"] = pickled
    path.write_bytes(sealed(archive_of(members)))
    message = refusal(path)
    assert "carries code" in message and re.search(r"system|eval|STACK_GLOBAL|INST|OBJ", message)
    assert not target.exists()


def test_what_torch_reads_is_what_was_checked(tmp_path: Path, good: Path) -> None:
    """Two archives in a row, so that a reader that counts from the file's end finds the second one's
    members, and one that trusts the stored offset (torch's) the first one's: here of the same lengths."""
    path, members = tmp_path / "two.pth", members_of(good)
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
def test_names_that_plain_data_does_not_need_are_refused(tmp_path: Path, good: Path, pickled: bytes) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(sealed(archive_of(members_of(good) | {"archive/data.pkl": pickled})))
    assert "carries code" in refusal(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "twice.pth"
    members = members_of(good)
    path.write_bytes(sealed(archive_of(members | {"archive/DATA.PKL": members["archive/data.pkl"]})))
    assert "two members" in refusal(path)


def test_an_ordinary_archive_made_by_another_writer_loads(tmp_path: Path, good: Path) -> None:
    """So that the refusals above are for what they name, not for the way those archives are made."""
    path = tmp_path / "again.pth"
    path.write_bytes(sealed(archive_of(members_of(good))))
    assert same(load_checkpoint(path), load_checkpoint(good))


BOMB = """
import resource, sys
from checkpoint import load_checkpoint
from errors import RunError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_checkpoint(path)
    except RunError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MiB")
"""


def test_a_zip_bomb_is_refused_and_takes_no_memory(tmp_path: Path, good: Path) -> None:
    gigabyte = tmp_path / "bomb.pth"
    with zipfile.ZipFile(gigabyte, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members_of(good).items():
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
    tmp_path: Path, good: Path, state: dict[str, Any]
) -> None:
    """A stranger can make the checksum right: then torch's reader sees the damage."""
    path, members = tmp_path / "fuzzed.pth", members_of(good)
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


# ---- weights that do not fit ----


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    return build_model("resnet20", num_classes=100)


def misfit(model: nn.Module, weights: Any) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError) as caught:
        load_weights(model, weights, "some/file.pth")
    message = str(caught.value)
    assert message.startswith("some/file.pth") and "\n" not in message
    assert same(dict(model.state_dict()), before)  # nothing was loaded by halves
    return message


def test_weights_of_another_network_are_refused(resnet20: nn.Module) -> None:
    message = misfit(resnet20, build_model("resnet32", num_classes=100).state_dict())
    assert "does not fit the network" in message and "0 entries missing" in message
    message = misfit(build_model("resnet32", num_classes=100), resnet20.state_dict())
    assert "lacks" in message and "0 unknown" in message


def test_another_number_of_classes_names_both_shapes(resnet20: nn.Module) -> None:
    message = misfit(resnet20, build_model("resnet20", num_classes=10).state_dict())
    assert "[10, 64]" in message and "[100, 64]" in message


@pytest.mark.parametrize("weights", [None, [], "x", 3, {}, {1: 2}, {"line\nbreak": torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(resnet20: nn.Module, weights: Any) -> None:
    misfit(resnet20, weights)


def test_a_missing_entry_and_a_wrong_kind_of_entry_are_named(resnet20: nn.Module) -> None:
    whole = dict(resnet20.state_dict())
    last = list(whole)[-1]
    assert last in misfit(resnet20, {name: value for name, value in whole.items() if name != last})
    assert last in misfit(resnet20, whole | {last: 3.0})
    assert "'more\\nlines'" in misfit(resnet20, whole | {"more\nlines": torch.zeros(1)})


def test_weights_that_fit_are_copied_nan_included(resnet20: nn.Module, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in resnet20.state_dict().items()}
    first = next(iter(weights))
    weights[first].view(-1)[0] = float("nan")
    save_checkpoint(tmp_path / "x.pth", {"model": weights})
    other = build_model("resnet20", num_classes=100)
    loaded = load_checkpoint(tmp_path / "x.pth")["model"]
    load_weights(other, loaded, tmp_path / "x.pth")
    assert same(dict(other.state_dict()), weights)


def test_a_state_dicts_own_attributes_are_not_used(resnet20: nn.Module, tmp_path: Path) -> None:
    weights = resnet20.state_dict()
    weights._metadata = "hostile"
    save_checkpoint(tmp_path / "x.pth", {"model": weights})
    load_weights(build_model("resnet20"), load_checkpoint(tmp_path / "x.pth")["model"], "x")


def test_versions_are_plain_strings() -> None:
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(type(value) is str for value in found.values())


def test_a_copy_of_a_checkpoint_is_a_checkpoint(good: Path, tmp_path: Path) -> None:
    shutil.copy(good, tmp_path / "renamed")
    assert load_checkpoint(tmp_path / "renamed")["kind"] == "last"
