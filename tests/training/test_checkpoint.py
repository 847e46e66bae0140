"""Checkpoints are read as they were written; damaged, foreign and hostile ones are refused in one line."""

import hashlib
import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import RunError, UsageError
from core.machine import versions
from helpers.tiny_checkpoint import save_tiny_checkpoint
from model import build_model
from training import checkpoint
from training.checkpoint import (
    FORMAT_VERSION,
    find_weights,
    load_checkpoint,
    load_model,
    load_weights,
    plain,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from training.recipe import Recipe


def same(a: Any, b: Any) -> bool:
    """Equality through nested containers, tensors bit by bit (so that NaN equals itself)."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
            and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.fixture(scope="module")
def run_state() -> dict[str, Any]:
    """A state like a run's: network, optimizer after two steps, schedule, random states, history."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
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
        "channels_last": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
    }


@pytest.fixture(scope="module")
def saved(run_state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that holds `run_state`."""
    path = tmp_path_factory.mktemp("saved") / "run_last.pth"
    save_checkpoint(path, run_state)
    return path


def refusal(path: Path, content: bytes | None = None) -> str:
    """The one line with which `path` is refused, with `content` written to it first."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))
    return message


def sealed(archive: bytes) -> bytes:
    """`archive`, which has no comment, with the right digest, as any forger can compute it."""
    digest = b"sha256:" + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + struct.pack("<H", len(digest)) + digest


def archive_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---- what is written is what is read ----


def test_a_round_trip_is_exact_here_and_with_torch_alone(run_state: dict[str, Any], saved: Path) -> None:
    expected, buffer = {"format_version": FORMAT_VERSION, **run_state}, io.BytesIO()
    assert same(load_checkpoint(saved), expected)
    assert same(torch.load(saved, weights_only=True), expected)
    torch.save(expected, buffer)
    assert saved.read_bytes() == sealed(buffer.getvalue())
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU, for machines without one; it is pickled as an ordinary tensor."""

    device = property(lambda self: torch.device("cuda", 0))

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def test_a_state_on_a_gpu_is_written_as_cpu_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(both: torch.Tensor) -> dict[str, Any]:
        model = OrderedDict(both=both, part=both[2:6], channels_last=both.view(1, 3, 2, 2).mT)
        nested = {"state": {0: {"momentum_buffer": both}}, "param_groups": [{"lr": 0.1}]}
        return {"model": model, "optimizer": nested, "pair": (1, [torch.tensor(7), "x"])}

    here = torch.arange(12.0)
    if torch.cuda.is_available():
        there = here.cuda()
    else:
        there = here.clone().as_subclass(OnGpu)
        address = there.data_ptr()  # torch.save then names "cuda:0" as the place of this storage
        tag = torch.serialization.location_tag
        monkeypatch.setattr(
            torch.serialization,
            "location_tag",
            lambda storage: "cuda:0" if storage.data_ptr() == address else tag(storage),
        )
    moved = state(there)
    moved["model"]._metadata = {"": {"version": 2}}
    save_checkpoint(tmp_path / "gpu.pth", moved)
    assert b"cuda" not in (tmp_path / "gpu.pth").read_bytes()
    loaded = torch.load(tmp_path / "gpu.pth", weights_only=True)  # without map_location
    assert same(loaded, {"format_version": FORMAT_VERSION, **state(here)})
    assert loaded["model"]._metadata[""]["version"] == 2
    loaded["model"]["both"][2] = 40  # the tensors still share one storage
    assert loaded["model"]["part"][0] == loaded["optimizer"]["state"][0]["momentum_buffer"][2] == 40
    assert moved["model"]["both"] is there  # the run's own state stays on the GPU


# ---- damaged and foreign files ----


def test_a_truncated_file_a_flipped_bit_and_moved_bytes_are_refused(saved: Path, tmp_path: Path) -> None:
    content, rng = saved.read_bytes(), random.Random(7)
    size, half = len(content), len(content) // 2
    lengths = {0, 1, 3, 4, 5, *range(70, 96), *range(size - 96, size), *rng.choices(range(size), k=50)}
    damaged = [content[:length] for length in lengths]
    for place in [*range(30), *range(size - 120, size), *rng.choices(range(size), k=150)]:
        flipped = content[place] ^ 1 << rng.randrange(8)
        damaged.append(content[:place] + bytes([flipped]) + content[place + 1 :])
    damaged += [content + b"\0", b"\0" + content, content + content, content[half:] + content[:half]]
    damaged += [content[:half] + b"\0" + content[half:], content[:half] + bytes(size - half)]
    damaged.append(content.replace(b"sha256:", b"sha255:"))
    for changed in damaged:
        refusal(tmp_path / "damaged.pth", changed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an archive"),
        (b"hello\n", "not an archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "not an archive"),
        (b"PK", "not an archive"),
        (b"PK\x03\x04" + bytes(500), "checksum"),
        (sealed(b"PK\x03\x04" + bytes(500)), "cannot be read"),
        (sealed(archive_of({"a.txt": b"hello"})), "cannot be read"),
        (sealed(archive_of({"x/data.pkl": b""})), "cannot be read"),
        (sealed(archive_of({"x/data.pkl": b"\x80\x02"})), "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refusal(tmp_path / "other.pth", content)


@pytest.mark.parametrize("value", [[1, 2], "x", torch.zeros(2), {"model": 1}, {"format_version": "1"}])
def test_other_contents_are_not_a_checkpoint(tmp_path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    assert "checksum" in refusal(tmp_path / "bare.pth", buffer.getvalue())
    assert "format version" in refusal(tmp_path / "x.pth", sealed(buffer.getvalue()))
    torch.save(value, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "not an archive" in refusal(tmp_path / "old.pth")
    save_checkpoint(tmp_path / "new.pth", {"format_version": FORMAT_VERSION + 1})
    assert "update the program" in refusal(tmp_path / "new.pth")


def foreign_files(model: nn.Module) -> dict[str, Any]:
    """Weights of a network as other programs save them."""
    weights = model.state_dict()
    return {
        "bare": weights,
        "kuangliu": {"net": {f"module.{name}": value for name, value in weights.items()}, "acc": 70.0},
        "compiled": {"state_dict": {f"_orig_mod.module.{name}": value for name, value in weights.items()}},
        "saved again": {"format_version": 1, "recipe": {"model": "resnet20"}, "model": weights},
    }


@pytest.mark.parametrize("kind", foreign_files(nn.Linear(1, 1)))
def test_weights_of_other_programs_load_where_the_network_is_named(kind: str, tmp_path: Path) -> None:
    model = build_model("resnet20").eval()
    torch.save(foreign_files(model)[kind], tmp_path / "foreign.pth")
    assert "holds weights" in refusal(tmp_path / "foreign.pth")
    loaded = load_model(tmp_path / "foreign.pth", model_name="resnet20")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert not loaded.model.training
    assert (loaded.recipe.model, len(loaded.classes), loaded.state) == ("resnet20", 100, {})
    assert loaded.trained_on is None
    with pytest.raises(RunError, match="does not fit the network"):
        load_model(tmp_path / "foreign.pth", model_name="resnet32")
    with pytest.raises(UsageError, match="--model 'resnet21' is not known"):
        load_model(tmp_path / "foreign.pth", model_name="resnet21")
    torch.save({"a": 1}, tmp_path / "other.pth")
    with pytest.raises(RunError, match="holds no weights"):
        load_model(tmp_path / "other.pth", model_name="resnet20")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(RunError, match="not an archive"):
        load_model(tmp_path / "text.pth", model_name="resnet20")


def test_a_checkpoint_of_train_py_is_never_taken_for_weights_alone(tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path / "tiny.pth")
    named = load_model(path, model_name="resnet20")
    assert named.state.keys() == load_model(path).state.keys() and named.trained_on == "CIFAR-100"
    with pytest.raises(UsageError, match="holds a resnet20, not a resnet32: pass --model resnet20"):
        load_model(path, model_name="resnet32")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        load_model(path, model_name="resnet20")


def test_paths_that_are_no_readable_file_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing.pth")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "file").write_text("x")
    refusal(tmp_path / "file" / "below.pth")
    refusal(tmp_path / ("n" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refusal(tmp_path / "loop")
    with pytest.raises(RunError, match=r"cannot read|does not exist"):
        load_checkpoint("nul\0byte")
    if hasattr(os, "mkfifo"):  # refused without reading: that would wait, or never end
        os.mkfifo(tmp_path / "pipe.pth")
        for path in (tmp_path / "pipe.pth", Path("/dev/zero")):
            assert "not a regular file" in refusal(path)
    with (tmp_path / "huge.pth").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(checkpoint.MAX_BYTES + 1)  # sparse
    message = refusal(tmp_path / "huge.pth")
    (tmp_path / "huge.pth").unlink()
    assert "larger than any" in message


# ---- hostile files: a stranger can compute the digest too ----


class Exploit:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"echo owned > '{self.target}'",)


def exploits(target: Path) -> dict[str, bytes]:
    command = f"echo owned > '{target}'"
    call = f"__import__('os').system({command!r})"
    return {
        **{f"protocol {number}": pickle.dumps(Exploit(target), number) for number in (0, 2, 4)},
        "inside a state": pickle.dumps({"format_version": 1, "model": Exploit(target)}, 2),
        "INST": f"(S{command!r}\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS{command!r}\no.".encode(),
        "eval": f"cbuiltins\neval\n(S{call!r}\ntR.".encode(),
    }


@pytest.mark.parametrize("name", exploits(Path("x")))
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, saved: Path, name: str) -> None:
    target = tmp_path / "owned"
    pickled = exploits(target)[name]
    refusal(tmp_path / "bare.pth", pickled)
    members = members_of(saved) | {"archive/data.pkl": pickled}
    assert "carries code" in refusal(tmp_path / "evil.pth", sealed(archive_of(members)))
    assert not target.exists()
    pickle.loads(pickled)  # the exploit works where nothing guards, or the test would prove nothing
    assert target.exists()


def test_zip_bombs_are_refused_before_torch_reads_them(tmp_path, saved, monkeypatch) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members_of(saved), "archive/data/99": bytes(1 << 26)}.items():
            archive.writestr(name, content)
    monkeypatch.delattr(torch, "load")
    for content in (
        bomb.getvalue(),
        # in front of a harmless archive, whose directory is the one at the end of the file
        bomb.getvalue() + archive_of({"archive/data.pkl": b"N."}),
        # a stored member that claims 1 GiB
        archive_of({"x/data.pkl": b"N." * 9}).replace(b"\x12\0\0\0", b"\0\0\0\x40"),
    ):
        assert "unpack to more than its own size" in refusal(tmp_path / "bomb.pth", sealed(content))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of deprecated types and pickle protocols
def test_random_bytes_in_a_sealed_archive_never_raise_another_error(tmp_path: Path, saved: Path) -> None:
    """Here torch's reader has to notice the damage."""
    path, members = tmp_path / "fuzzed.pth", members_of(saved)
    rng = random.Random(13)
    refused = 0
    for _ in range(100):
        name = "archive/data.pkl" if rng.random() < 0.7 else rng.choice(sorted(members))
        content = bytearray(members[name])
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(sealed(archive_of(members | {name: bytes(content)})))
        try:
            load_checkpoint(path)
        except RunError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 20 < refused < 90


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
    assert same(dict(model.state_dict()), before)  # nothing was loaded in part
    return message


def test_weights_of_another_network_are_refused(resnet20: nn.Module) -> None:
    message = misfit(resnet20, build_model("resnet32", num_classes=100).state_dict())
    assert "does not fit the network" in message and "0 entries missing" in message
    message = misfit(build_model("resnet32", num_classes=100), resnet20.state_dict())
    assert "lacks" in message and "0 unknown" in message
    message = misfit(resnet20, build_model("resnet20", num_classes=10).state_dict())
    assert "[10, 64]" in message and "[100, 64]" in message
    weights = dict(resnet20.state_dict())
    assert "'more\\nlines'" in misfit(resnet20, weights | {"more\nlines": torch.zeros(1)})
    for value in (3.0, torch.zeros(100, device="meta"), torch.zeros(100).to_sparse()):
        assert "fc.bias is not a dense tensor" in misfit(resnet20, weights | {"fc.bias": value})
    del weights["fc.bias"]
    assert "lacks fc.bias" in misfit(resnet20, weights)
    for no_state_dict in (None, [], "x", {}, {1: 2}):
        misfit(resnet20, no_state_dict)


def test_weights_that_fit_are_copied_nan_included(resnet20: nn.Module, tmp_path: Path) -> None:
    weights = OrderedDict((name, value.clone()) for name, value in resnet20.state_dict().items())
    weights["fc.bias"][0] = float("nan")
    weights._metadata = "hostile"
    save_checkpoint(tmp_path / "x.pth", {"model": weights})
    other = build_model("resnet20", num_classes=100)
    load_weights(other, load_checkpoint(tmp_path / "x.pth")["model"], tmp_path / "x.pth")
    assert same(dict(other.state_dict()), weights)


# ---- random states ----


def draws() -> list[Any]:
    numpy = [*np.random.rand(3).tolist(), np.random.randn()]
    return [random.random(), random.gauss(0, 1), *numpy, *torch.rand(5).tolist()]


def test_random_states_resume_exactly_from_a_file(tmp_path: Path) -> None:
    kept = random_state()
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
def test_foreign_random_states_are_a_value_error(part: str) -> None:
    kept = random_state()
    for value in (None, [], 3, "x", [1, 2, 3], torch.zeros(3), [3, [1] * 700, None]):
        with pytest.raises(ValueError):
            restore_random_state({**kept, part: value})
    with pytest.raises(ValueError):
        restore_random_state({key: entry for key, entry in kept.items() if key != part})
    restore_random_state(kept)


# ---- which weights are used where none are named ----


def put_best(folder: Path, name: str, accuracy: float, **choices: object) -> Path:
    path = folder / f"{name}_best.pth"
    save_checkpoint(path, {"recipe": Recipe(**choices).to_dict(), "accuracy_percent": accuracy})
    return path


def test_weights_are_found_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(checkpoint, "PRETRAINED_FOLDER", folder)
    put_best(tmp_path, "drawn", 99.0, dataset="synthetic")  # never used unasked
    (tmp_path / "broken_best.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(UsageError, match="train first, or pass --weights"):
        find_weights(tmp_path)
    put_best(tmp_path, "lucky", 90.0, limit_test=100)
    subset = put_best(tmp_path, "easy", 95.0, limit_train=1000)
    assert find_weights(tmp_path) == subset
    included = [
        put_best(folder, name, accuracy) for name, accuracy in (("a", 20.0), ("b", 40.0), ("c", 30.0))
    ]
    assert find_weights(tmp_path) == included[1]
    put_best(tmp_path, "good", 60.0)
    best = put_best(tmp_path, "better", 70.0)
    assert find_weights(tmp_path) == best
