from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from shards.format.tarwalk import TarError, walk


def make_tar(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        member.size = 3 if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(b"abc"))
    return stream.getvalue()


def members(content: bytes) -> list[str]:
    return [member.name for member in walk(io.BytesIO(content), len(content))]


def test_a_plain_member_is_accepted() -> None:
    assert members(make_tar("i00001.c.npy")) == ["i00001.c.npy"]


@pytest.mark.parametrize(
    "name", ["../i00001.c.npy", "/etc/passwd.npy", "a/b.npy", "noext", ".hidden", "I.npy", "a.n\n"]
)
def test_a_name_that_is_not_a_shards_is_refused(name: str) -> None:
    with pytest.raises(TarError):
        members(make_tar(name))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_folders_and_devices_are_refused(kind: bytes) -> None:
    with pytest.raises(TarError, match="not a plain file"):
        members(make_tar("i00001.c.npy", kind, link="other.npy"))


def test_extended_headers_are_refused() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 999}) as tar:
        tar.addfile(tarfile.TarInfo("i00001.c.npy"))
    with pytest.raises(TarError):
        members(stream.getvalue())


@pytest.mark.parametrize("size", [0, 100, 512, 515, 1024])
def test_a_cut_tar_is_refused(size: int) -> None:
    content = make_tar("i00001.c.npy")[:size]
    with pytest.raises(TarError):
        members(content)


def test_a_header_with_a_huge_size_is_refused(tmp_path: Path) -> None:
    content = bytearray(make_tar("i00001.c.npy"))
    content[124:136] = b"77777777777\0"
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    with pytest.raises(TarError, match="beyond the end"):
        members(bytes(content))
