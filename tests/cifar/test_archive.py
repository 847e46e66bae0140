"""Archives are unpacked whole or not at all, and nowhere else than they should be."""

import hashlib
import tarfile

import pytest

from cifar.archive import extract, md5_of
from conftest import tar_gz
from core.errors import RunError


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        member("../outside"),
        member("top/../../outside"),
        member("top/sub/../../../outside"),
        member("/outside"),
        member("top\\..\\..\\outside"),
        member("C:\\outside"),
        member("other/outside"),
        member("top"[:2] + "psy"),
        member("top/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("top/link", tarfile.LNKTYPE, "../../outside"),
        member("top/device", tarfile.CHRTYPE),
        member("top/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_hostile_archive_member_is_refused_and_nothing_is_left(tmp_path, hostile):
    folder = tmp_path / "in" / "data"
    folder.mkdir(parents=True)
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_gz([("top/fine", b"1"), (hostile, b"2"), ("top/later", b"3")]))
    with pytest.raises(RunError, match=r"a\.tar\.gz (would write outside|holds a link)") as failure:
        extract(archive, folder, top="top")
    assert "\n" not in str(failure.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_archive_is_unpacked_over_a_damaged_file(tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(
        tar_gz([(member("top", tarfile.DIRTYPE), b""), ("top/a", b"new"), ("top/sub/b", b"2")])
    )
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "a").write_bytes(b"old")
    (tmp_path / "top" / "own").write_bytes(b"stays")
    extract(archive, tmp_path, top="top")
    found = {p.name: p.read_bytes() for p in (tmp_path / "top").rglob("*") if p.is_file()}
    assert found == {"a": b"new", "b": b"2", "own": b"stays"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "top"]


def test_archive_bomb_and_damaged_archive_are_refused(tmp_path):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_gz([("top/zeros", bytes(2_000_000))]))
    with pytest.raises(RunError, match="unpacks to over 1,000,000 bytes"):
        extract(archive, tmp_path, top="top", max_bytes=1_000_000)
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive", whole[:600] + b"\0" * 200, b""):
        archive.write_bytes(damaged)
        with pytest.raises(RunError, match=r"a\.tar\.gz"):
            extract(archive, tmp_path, top="top")
        assert not (tmp_path / "top").exists()


def test_md5_of_reads_the_whole_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(3_000_000) + b"end")
    assert md5_of(path) == hashlib.md5(bytes(3_000_000) + b"end").hexdigest()
