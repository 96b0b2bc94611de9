"""Pictures for the report: small, inlined as data URIs, so that the page is one file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from nd_dist.errors import DataError

MAX_SIDE = 192
WEBP_QUALITY = 82


def read_picture(path: Path) -> Image.Image:
    """Return a stored picture, RGB.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as stored:
            return stored.convert("RGB")
    except OSError as error:
        raise DataError(
            "A picture of the run is missing or damaged.",
            where=str(path),
            found=str(error),
            todo="run `nd evaluate` with the same recipe again; it makes what is missing",
        ) from error


def data_uri(path: Path, max_side: int = MAX_SIDE) -> str:
    """Return a picture as a data URI: as it is where it is small, scaled down to WebP otherwise.

    Raises:
        DataError: the file is missing or no picture.
    """
    picture = read_picture(path)
    if max(picture.size) <= max_side:
        return _uri("png", path.read_bytes())
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=WEBP_QUALITY)
    return _uri("webp", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
