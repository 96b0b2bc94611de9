"""Where a set of files lies: a local folder, or a URL below which a server holds the same files.

A URL never carries credentials: it is written into configs, logs and messages. They come from the standard places of
the protocol (``~/.netrc``; ``AWS_*`` variables and ``~/.aws``; those of Google's and Azure's own tools).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

SCHEMES = ("http", "https", "s3", "gs", "az")


def parse_location(value: object) -> Path | str:
    """Return a folder as a path, or a URL as text without a slash at its end.

    Raises:
        ValueError: another kind of value, an unknown protocol, or a URL with credentials (which the text leaves out).
    """
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a folder or a URL ({', '.join(SCHEMES)})")
    if "://" not in value:
        return Path(value)
    parts = urlsplit(value)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"unknown protocol {parts.scheme!r}; known: {', '.join(SCHEMES)}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "a URL must not hold a user, password or query: they would be written into configs and messages; use "
            "~/.netrc for http(s), AWS_* variables or ~/.aws for s3"
        )
    if not parts.netloc:
        raise ValueError("a URL needs a host (s3: a bucket)")
    return value.rstrip("/")


Location = Annotated[
    Path | str,
    PlainValidator(parse_location),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "format": "path or URL"}),
]
"""A local folder (``Path``) or a URL (``str``)."""
