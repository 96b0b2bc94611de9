"""Pictures that were made elsewhere: a folder of image files, or an array, read one image at a time.

Legend: N images, R repeats of each, C = 3 channels, H height, W width. Nothing is resized or clamped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nd_dist.errors import DataError
from nd_dist.files import hash_json, sha256_file
from nd_dist.pixels import pictures_to_pixels

PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_FILES = (".npy", ".npz", ".pt", ".pth")
LOWEST, HIGHEST = -0.5, 1.5  # floats of [0,1] may overshoot a little; pixels of [-1,1] or 0..255 do not pass
_REPEATS = (re.compile(r"(.+)[-_. ]\d+"), re.compile(r"(.+)[-_. ][A-Za-z]+[-_. ]?\d+"))  # NAME_0, NAME-repeat-0


@dataclass(frozen=True)
class PictureSet:
    """Pictures of N images, R of each.

    Args:
        place: Where they were found.
        names: Name of each image.
        num_repeats: R.
        read: Position of an image -> its pictures, uint8 (R, H, W, C) or float (R, C, H, W).
        files: Every file that was read from.
        has_floats: Whether they are floats rather than bytes.
    """

    place: Path
    names: tuple[str, ...]
    num_repeats: int
    read: Callable[[int], npt.NDArray[np.uint8] | Tensor]
    files: tuple[Path, ...]
    has_floats: bool = False

    @cached_property
    def content_id(self) -> str:
        """Hash of all files and their names."""
        return hash_json([self.names, *((path.name, sha256_file(path)) for path in self.files)])

    def pixels(self, position: int) -> Tensor:
        """Return the pictures (R, C, H, W) float32 of one image, in [0,1] where they were bytes.

        Raises:
            DataError: a pixel is not finite, or far outside [0,1].
        """
        found = self.read(position)
        if not isinstance(found, Tensor):
            return pictures_to_pixels(found)
        pixels_RCHW = found.float()
        for repeat, pixels_CHW in enumerate(pixels_RCHW):
            low, high = (float(value) for value in pixels_CHW.aminmax())
            if not LOWEST <= low <= high <= HIGHEST:  # NaN is in no order with anything
                raise DataError(
                    f"Image {self.names[position]}, repeat {repeat}: pixels are not numbers of [0,1].",
                    where=str(self.place),
                    found=f"from {low:g} to {high:g}",
                    todo="give bytes (uint8) or floats of [0,1]",
                )
        return pixels_RCHW

    def check_sizes(self) -> None:
        """Refuse a picture of another size than the first one's; only headers are read.

        Raises:
            DataError: names the pictures.
        """
        if self.files[0].suffix.lower() in ARRAY_FILES:
            return
        sizes = {}
        for path in self.files:
            try:
                with Image.open(path) as picture:
                    sizes[path] = picture.size
            except (OSError, UnidentifiedImageError) as error:
                raise DataError("A picture cannot be read.", where=str(path), found=str(error)) from error
        first = sizes[self.files[0]]
        if other := [path.relative_to(self.place).as_posix() for path, size in sizes.items() if size != first]:
            raise DataError(
                "Pictures of one folder differ in size.",
                where=str(self.place),
                expected=f"{first[0]} x {first[1]}, as {self.files[0].name}",
                found=f"others: {_some(other)}",
            )


def open_pictures(place: Path, originals: PictureSet | None = None) -> PictureSet:
    """Return the pictures in a folder or an array file (npy, npz, pt).

    A file ``NAME.png`` shows image NAME. Reconstructions may be several of an image: ``NAME_0.png``,
    ``NAME-repeat-1.png`` or ``NAME/anything.png``. An array is (N, H, W, 3) or (N, 3, H, W), or has the repeats as
    its second axis; its images are in the order of the originals.

    Args:
        place: The folder or file.
        originals: What the pictures reconstruct; None: these are originals.

    Raises:
        DataError: there is nothing to read; names, numbers or sizes do not fit.
    """
    if place.is_dir():
        return _folder(place, originals)
    if place.is_file() and place.suffix in ARRAY_FILES:
        return _array(place, originals)
    raise DataError(
        "There are no pictures.",
        where=str(place),
        expected=f"a folder of {', '.join(PICTURE_FILES)}, or a file {', '.join(ARRAY_FILES)}",
    )


def read_array(path: Path) -> npt.NDArray[Any] | Tensor:
    """Return the one array of a file, not read into memory where that can be spared.

    Raises:
        DataError: the file holds something else.
    """
    try:
        content: Any = (
            np.load(path, mmap_mode="r", allow_pickle=False)
            if path.suffix in (".npy", ".npz")
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
        if isinstance(content, Mapping) and len(content) == 1:
            content = next(iter(content.values()))
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise DataError("A file of arrays cannot be read.", where=str(path), found=str(error)) from error
    if not isinstance(content, np.ndarray | Tensor):
        raise DataError("A file holds no single array.", where=str(path), found=type(content).__name__)
    return content


def _array(place: Path, originals: PictureSet | None) -> PictureSet:
    content = read_array(place)
    shape = tuple(content.shape)
    if len(shape) not in (4, 5) or 3 not in (shape[-1], shape[-3]):
        raise DataError(
            "An array holds no colour pictures.",
            where=str(place),
            expected="(N, H, W, 3), (N, 3, H, W), or either with repeats as second axis",
            found=shape,
        )
    if originals is not None and shape[0] != len(originals.names):
        raise DataError(
            "There are not as many reconstructed images as originals.",
            where=str(place),
            expected=len(originals.names),
            found=shape[0],
        )
    names = originals.names if originals is not None else tuple(str(number) for number in range(shape[0]))

    def read(position: int) -> npt.NDArray[np.uint8] | Tensor:
        found = content[position]
        pixels = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
        pixels = pixels if len(shape) == 5 else pixels[None]
        channels_last = pixels if shape[-1] == 3 else pixels.permute(0, 2, 3, 1)
        if pixels.dtype == torch.uint8:
            bytes_RHWC: npt.NDArray[np.uint8] = channels_last.numpy()
            return bytes_RHWC
        return channels_last.permute(0, 3, 1, 2)

    num_repeats = shape[1] if len(shape) == 5 else 1
    return PictureSet(place, names, num_repeats, read, (place,), has_floats=not str(content.dtype).endswith("uint8"))


def _folder(place: Path, originals: PictureSet | None) -> PictureSet:
    found = [path for path in place.rglob("*") if path.suffix.lower() in PICTURE_FILES]
    files: dict[str, list[Path]] = {name: [] for name in originals.names} if originals is not None else {}
    unknown: list[Path] = []
    for path in sorted(found, key=lambda path: _natural(path.relative_to(place).as_posix())):
        relative = path.relative_to(place).with_suffix("")
        name = relative.as_posix() if originals is None else _image_of(relative, files)
        if originals is None:
            files.setdefault(name, [])
        files.get(name, unknown).append(path)
    missing = [name for name, paths in files.items() if not paths]
    if missing or unknown or not files:
        raise DataError(
            "Originals and reconstructions do not belong together." if originals else "A folder holds no pictures.",
            where=str(place),
            expected=f"a picture of each of {len(files)} originals, named as it is" if originals else "",
            found=f"no picture of {_some(missing)}; no original of {_some([path.name for path in unknown])}",
        )
    counts = {name: len(paths) for name, paths in files.items()}
    most = max(counts.values())
    if fewer := [name for name, count in counts.items() if count != most]:
        raise DataError(
            "Images have different numbers of pictures.",
            where=str(place),
            expected=f"{most} of each" if originals else "one of each name",
            found=f"fewer of {_some(fewer)}",
        )
    ordered = list(files.values())

    def read(position: int) -> npt.NDArray[np.uint8]:
        return np.stack([_read_file(path) for path in ordered[position]])

    return PictureSet(place, tuple(files), most, read, tuple(path for paths in ordered for path in paths))


def _image_of(relative: Path, known: Mapping[str, Any]) -> str:
    """Return the name of the image that a file (without suffix) reconstructs; empty where there is none."""
    name = relative.as_posix()
    matches = [match[1] for pattern in _REPEATS if (match := pattern.fullmatch(name))]
    candidates = (name, *matches, relative.parent.as_posix())
    return next((each for each in candidates if each in known), "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names as people do: 2 before 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _read_file(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise DataError("A picture cannot be read.", where=str(path), found=str(error)) from error
