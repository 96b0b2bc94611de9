"""Reads the members of a shard strictly: plain USTAR files only, every header checked, nothing else accepted."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from shards.format.writer import TAR_BLOCK_BYTES

_NAME = re.compile(r"[a-z0-9_]+\.[a-z0-9_.]+")


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
        if header == bytes(TAR_BLOCK_BYTES):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise TarError(f"the header at offset {position} is damaged: {error}") from error
        if member.type != tarfile.REGTYPE:
            raise TarError(f"the member at offset {position} is not a plain file")
        if not _NAME.fullmatch(member.name):
            raise TarError(f"the member at offset {position} has a name that is not a shard's: {member.name[:40]!r}")
        start = position + TAR_BLOCK_BYTES
        position = start + -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        if position > size:
            raise TarError(f"{member.name} reaches beyond the end of the file")
        yield Member(member.name, start, member.size)
    raise TarError("the tar has no end mark")
