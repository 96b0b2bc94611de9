"""Results on disk: a folder per result that appears whole, once, or not at all.

A result is made in a hidden sibling folder, flushed, and renamed into place; renaming onto a folder that exists fails,
so the first result counts and a rank that comes late changes nothing. ``record.json`` inside names the fingerprint of
everything that determined it; a result of another fingerprint is never taken for ours.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from nd_dist.errors import DataError
from nd_dist.files import PART_SUFFIX, json_text, read_json, sync_dir, write_error, write_json

FORMAT = 1
RECORD = "record.json"
OUTDATED = "outdated"
SETTINGS = "settings.json"
PNG_LEVEL = 1  # of zlib: 35 ms a picture of 512 pixels where the default takes 90, for 15 % more bytes


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a result folder, empty where there is none.

    Raises:
        DataError: the record is damaged.
    """
    record: dict[str, Any] = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    return record


def has_result(folder: Path, fingerprint: str) -> bool:
    """Return whether a folder holds a whole result of this fingerprint."""
    return read_record(folder).get("fingerprint") == fingerprint


def publish(folder: Path, fingerprint: str, facts: Mapping[str, Any], write: Callable[[Path], None]) -> bool:
    """Make a result folder appear atomically; return False where another rank's result was there first.

    Args:
        folder: Where the result goes. A folder of another fingerprint there is replaced.
        fingerprint: Of everything that determines the result.
        facts: JSON facts for the record, beside format and fingerprint.
        write: Writes the result's other files into the folder it is given.

    Raises:
        DataError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    staging = _staging(folder)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging)
        record = {"format": FORMAT, "fingerprint": fingerprint, **facts}
        (staging / RECORD).write_text(json_text(record), encoding="utf-8")
        _flush(staging)
        if folder.exists() and not has_result(folder, fingerprint):
            shutil.rmtree(folder)
        return _rename_once(staging, folder)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_staged(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into a staging folder; ``publish`` flushes them to disk, once, with everything else in it."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # safetensors wraps the operating system's error
        raise OSError(str(error)) from error


def _flush(folder: Path) -> None:
    """Flush every file of a folder, then the folder, to disk."""
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    sync_dir(folder)


def _rename_once(staging: Path, folder: Path) -> bool:
    """Rename a folder into place unless one is there."""
    try:
        os.rename(staging, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync_dir(folder.parent)
    return True


def remove_leftovers(root: Path) -> int:
    """Remove hidden part folders of killed ranks below ``root``; only when nobody works there. Return how many."""
    parts = [path for path in root.rglob(f".*{PART_SUFFIX}") if path.is_dir()]
    for path in parts:
        shutil.rmtree(path, ignore_errors=True)
    return len(parts)


def claim_folder(
    folder: Path, fingerprint: str, settings: Mapping[str, Any], made_with: Mapping[str, str] | None = None
) -> str:
    """Make ``folder`` the home of results of one fingerprint; return what was done: new, kept, moved or restored.

    Results of other settings that lie there are not lost: they move to ``outdated/`` beside it, and come back when
    their settings do.

    Args:
        folder: Folder of result folders, e.g. of one point and subject, or of one result.
        fingerprint: Of the settings.
        settings: What the fingerprint was made of, written beside the results for people.
        made_with: Versions and hardware of a new folder, which results do not depend on but for their last digits.
    """
    done = "new"
    if folder.exists():
        present = _settled(folder)
        if present == fingerprint:
            return "kept"
        done = "moved"
        _move(folder, _outdated(folder, present))
    if (home := _outdated(folder, fingerprint)).exists():
        _move(home, folder)
        return "restored"
    staging = _staging(folder)
    try:
        content = {"fingerprint": fingerprint, "settings": dict(settings), "made_with": dict(made_with or {})}
        write_json(staging / SETTINGS, content)
        if _rename_once(staging, folder):
            return done
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return claim_folder(
        folder, fingerprint, settings, made_with
    )  # another launch was first: its folder appeared whole


def _settled(folder: Path) -> str:
    """Return the fingerprint that a folder belongs to, by its settings or its record; ``unknown`` without both."""
    marker = folder / SETTINGS
    content = read_json(marker) if marker.exists() else read_record(folder)
    return str(content.get("fingerprint", "unknown"))


def _staging(folder: Path) -> Path:
    """Return a hidden sibling that no other thread, process or host uses."""
    return folder.with_name(f".{folder.name}.{gethostname()}-{os.getpid()}-{threading.get_ident()}{PART_SUFFIX}")


def _outdated(folder: Path, fingerprint: str) -> Path:
    """Return where results of a fingerprint wait: ``a/b`` -> ``a/outdated/b-1f3a9c2e``."""
    return folder.parent / OUTDATED / f"{folder.name}-{fingerprint[:8]}"


def _move(source: Path, target: Path) -> None:
    """Rename a folder; what lies at the target (a broken attempt) is removed first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(source, target)


def write_png(path: Path, picture_HWC: npt.NDArray[np.uint8]) -> None:
    """Write one picture as PNG (lossless: the metrics read these very bytes back)."""
    Image.fromarray(picture_HWC).save(path, format="PNG", compress_level=PNG_LEVEL)


def read_png(path: Path) -> npt.NDArray[np.uint8]:
    """Return a PNG's pixels (H, W, 3) uint8.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with Image.open(path) as picture:
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise DataError(
            "A reconstruction on disk is missing or damaged.",
            where=str(path),
            found=str(error),
            todo=f"remove the folder {path.parent} and run the same command again",
        ) from error
