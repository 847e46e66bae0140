"""Archives from strangers: their checksum, and unpacking that cannot write elsewhere."""

import hashlib
import os
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from core.errors import RunError, printable


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes, in hexadecimal; OSError where it cannot be read."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def extract(archive: Path, folder: Path, *, top: str, max_bytes: int = 1 << 30) -> None:
    """Unpack the regular files of `archive` (tar.gz) under `top`/ into `folder`/`top`.

    All is unpacked into a temporary folder first, and then each file is moved into place.

    Raises:
        RunError: a member is absolute, leaves `top` or is neither a plain file nor a folder (links
            and devices are refused), the members add up to over `max_bytes`, the archive is
            damaged, or `folder` cannot be written.
    """
    # Python before 3.10.12 and 3.11.4 has no filters; the checks below do not depend on them.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{top}.") as scratch:
            names = []
            total = 0
            with tarfile.open(archive, "r:gz") as tar:
                for member in tar:
                    _check_member(member, archive, top)
                    total += member.size
                    if total > max_bytes:
                        raise RunError(f"{archive} unpacks to over {max_bytes:,} bytes: refused")
                    if member.isfile():
                        tar.extract(member, scratch, set_attrs=False, **options)
                        names.append(member.name)
            for name in names:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(scratch, name), target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise RunError(f"{archive} is damaged: {printable(error)}; delete it") from error
    except OSError as error:
        reason = printable(error.strerror or str(error))
        raise RunError(f"cannot unpack {archive} into {folder}: {reason}") from error


def _check_member(member: tarfile.TarInfo, archive: Path, top: str) -> None:
    """Refuse a member that is not a plain file or folder at or under `top`."""
    path, windows = PurePosixPath(member.name), PureWindowsPath(member.name)
    inside = path.parts[:1] == (top,) and ".." not in path.parts + windows.parts
    if not inside or windows.drive or windows.root:
        raise RunError(f"{archive} would write outside {top}: {printable(member.name)!r}; delete it")
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise RunError(f"{archive} holds a link or device: {printable(member.name)!r}; delete it")
