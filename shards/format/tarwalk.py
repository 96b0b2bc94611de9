"""Reads the members of a shard strictly: plain USTAR files only, every header checked, nothing else accepted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from shards.format.writer import TAR_BLOCK_BYTES

_NAME = re.compile(r"[a-z0-9_]+\.[a-z0-9_.]+")
_ZERO_BLOCK = bytes(TAR_BLOCK_BYTES)


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Args:
        name: Its name.
        offset: Of its first byte.
        num_bytes: Its size.
    """

    name: str
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.name}, {self.num_bytes} bytes at {self.offset}"


class TarError(Exception):
    """A tar is not one that the packer wrote; the message says where and why."""


def walk(stream: IO[bytes], size: int) -> Iterator[Member]:
    """Yield the members of a tar of ``size`` bytes, in order.

    Raises:
        TarError: a header is damaged, a member is no plain file (link, device, folder), has a strange name, or lies
            beyond the end of the file.
    """
    position = 0
    while position < size:
        stream.seek(position)
        header = stream.read(TAR_BLOCK_BYTES)
        if header == _ZERO_BLOCK:
            return
        member = _member(header, position)
        padded = -(-member.num_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        if member.offset + padded > size:
            raise TarError(f"{member.name} reaches beyond the end of the file")
        yield member
        position = member.offset + padded
    raise TarError("the tar has no end mark")


def _member(header: bytes, position: int) -> Member:
    """Return the member of one header block."""
    if len(header) != TAR_BLOCK_BYTES:
        raise TarError(f"the file ends inside the header at offset {position}")
    try:
        stated = int(header[148:156].rstrip(b"\0 "), 8)
        size = int(header[124:136].rstrip(b"\0 "), 8)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError as error:
        raise TarError(f"the header at offset {position} is damaged") from error
    if stated != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise TarError(f"the header at offset {position} has a wrong checksum")
    if header[156:157] != b"0" or header[257:263] != b"ustar\0" or header[345:500].strip(b"\0"):
        raise TarError(f"the member at offset {position} is not a plain file")
    if not _NAME.fullmatch(name):
        raise TarError(f"the member at offset {position} has a name that is not a shard's: {name[:40]!r}")
    return Member(name, position + TAR_BLOCK_BYTES, size)
