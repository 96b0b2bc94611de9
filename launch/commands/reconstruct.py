"""`nd reconstruct`: pictures from the embeddings of own pictures, or from voxels, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.console import make_console
from nd_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

AT_ONCE = 8  # rows of one call: pictures appear as they are made


def reconstruct_command(
    pictures: Sequence[Path],
    voxels: Path | None,
    model: str,
    out: Path,
    captions: Sequence[str],
    settings: dict[str, Any],  # Any: keyword arguments of the pipeline's call
    seed: int,
) -> None:
    """Write a reconstruction of every picture, or of every row of voxels, into a folder.

    Args:
        pictures: Own pictures, whose true embeddings are reconstructed.
        voxels: A file of z-scored betas, (N, V) or (V,).
        model: What ``NeuralDiffuserPipeline.from_pretrained`` opens.
        out: Folder to write.
        captions: What each picture shows; one is for all, none says nothing.
        settings: ``kappa``, ``eta`` and ``subject``; None keeps the model's.
        seed: Of the first reconstruction's noise; the next ones count on from it.

    Raises:
        NdDistError: words do not fit together, a file cannot be read, or the model cannot be opened.
    """
    _check_words(pictures, voxels, captions)
    rows: Any = [_read_picture(path) for path in pictures] if voxels is None else _read_voxels(voxels)
    names = [f"{voxels.stem}_{row:04d}" for row in range(len(rows))] if voxels else [path.stem for path in pictures]

    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from nd_dist.files import atomic_path
    from nd_dist.pipeline import NeuralDiffuserPipeline

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    pipe = NeuralDiffuserPipeline.from_pretrained(model, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=None)  # tqdm's word for: only on a terminal
    texts = list(captions) * len(rows) if len(captions) == 1 else list(captions) or [""] * len(rows)
    console = make_console()
    for first in range(0, len(rows), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        given = {"voxels": rows[part]} if voxels is not None else pipe.embed(rows[part], texts[part])
        noise = [torch.Generator().manual_seed(seed + first + row) for row in range(len(rows[part]))]
        made = pipe(**given, **settings, generator=noise).images
        for name, picture in zip(names[part], made, strict=True):
            with atomic_path(out / f"{name}.png") as path:
                picture.save(path, format="PNG")
            console.print(f"  {out / name}.png")


def _check_words(pictures: Sequence[Path], voxels: Path | None, captions: Sequence[str]) -> None:
    """Refuse words that do not fit together."""
    if bool(pictures) == (voxels is not None):
        raise ConfigError("Pictures or --voxels FILE are reconstructed, one of the two.", todo="nd reconstruct --help")
    if captions and voxels is not None:
        raise ConfigError("--caption belongs to pictures; voxels have none.")
    if captions and len(captions) not in (1, len(pictures)):
        raise ConfigError(
            "Captions and pictures differ in number.", expected=f"1 or {len(pictures)} --caption", found=len(captions)
        )
    names = [path.stem for path in pictures]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            "Two pictures would become one file.",
            found=", ".join(f"{name}.png" for name in doubled),
            todo="rename one of them, or give them another --out",
        )


def _read_picture(path: Path) -> Image.Image:
    """Return a picture whose file has been read to its end."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.copy()
    except OSError as error:  # also what Pillow raises for a file that is no picture
        raise DataError(
            "A picture cannot be read.", where=str(path), expected="a PNG or JPEG, say", found=str(error)
        ) from error


def _read_voxels(path: Path) -> npt.NDArray[np.float32]:
    """Return the voxels of a file, (N, V)."""
    import numpy as np

    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            "Voxels cannot be read.", where=str(path), expected="a .npy file of numpy.save", found=str(error)
        ) from error
    if not isinstance(values, np.ndarray) or values.ndim not in (1, 2) or values.dtype.kind != "f":
        shape = getattr(values, "shape", "several arrays")
        raise DataError(
            "Voxels are no array of floats.",
            where=str(path),
            expected="z-scored betas (N, V) or (V,)",
            found=f"{getattr(values, 'dtype', '')} {shape}",
        )
    if not np.isfinite(values).all():
        raise DataError("Voxels hold NaN or infinity.", where=str(path), todo="leave those voxels or trials out")
    return np.atleast_2d(values).astype(np.float32)
