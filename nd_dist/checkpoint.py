"""Model folders and checkpoint folders on disk: safetensors, JSON manifests with sizes and hashes, atomic pointers.

A folder is valid when its manifest, written last, agrees with its files. Knows nothing of models or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nd_dist.errors import CheckpointError
from nd_dist.files import atomic_path, read_json, sha256_file, write_json

FORMAT = 1
MANIFEST = "manifest.json"
POINTER = "latest.json"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as safetensors, atomically; copies them to the CPU where needed.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    plain = {name: _own_memory(tensor.detach().to("cpu").contiguous()) for name, tensor in tensors.items()}
    with atomic_path(path) as part:
        try:
            save_file(plain, part)
        except SafetensorError as error:  # safetensors wraps the operating system's error
            raise OSError(str(error)) from error


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, copied where it is a part of a larger storage (safetensors refuses shared memory)."""
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_whole else tensor.clone()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.exists():
        raise CheckpointError("A model file is missing.", where=str(path))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError("A model file is damaged.", where=str(path), found=str(error)) from error


@dataclass(frozen=True)
class FileRecord:
    """One file of a manifest.

    Args:
        num_bytes: Its size.
        sha256: Hexadecimal hash of its content.
    """

    num_bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> FileRecord:
        """Return the record of a file on disk."""
        return FileRecord(path.stat().st_size, sha256_file(path))


def write_manifest(folder: Path, files: Mapping[str, FileRecord], facts: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose files are complete; from then on the folder counts as valid.

    Args:
        folder: The folder.
        files: Path relative to ``folder`` -> its record.
        facts: JSON facts that belong to the content (step, world size, ...).
    """
    listed = {name: {"num_bytes": record.num_bytes, "sha256": record.sha256} for name, record in files.items()}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": listed, "facts": dict(facts)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the facts of a valid folder, after checking every file's size and hash.

    Raises:
        CheckpointError: the manifest is missing, of another format, or disagrees with a file.
    """
    if not (folder / MANIFEST).exists():
        raise CheckpointError("A checkpoint is incomplete: it has no manifest.", where=str(folder))
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            "A checkpoint has another format.", where=str(folder), expected=FORMAT, found=manifest.get("format")
        )
    for name, wanted in manifest["files"].items():
        _check_file(folder / name, FileRecord(**wanted))
    facts: dict[str, Any] = manifest["facts"]
    return facts


def _check_file(path: Path, wanted: FileRecord) -> None:
    """Raise a CheckpointError where a file is missing or differs from its record."""
    if not path.exists():
        raise CheckpointError("A file of a checkpoint is missing.", where=str(path))
    found = path.stat().st_size
    if found != wanted.num_bytes:
        raise CheckpointError(
            "A file of a checkpoint is torn.", where=str(path), expected=f"{wanted.num_bytes} bytes", found=found
        )
    if FileRecord.of(path) != wanted:
        raise CheckpointError("A file of a checkpoint is damaged: its hash differs.", where=str(path))


def write_pointer(parent: Path, name: str) -> None:
    """Make ``parent / name`` the newest valid folder of ``parent``, atomically."""
    write_json(parent / POINTER, {"format": FORMAT, "name": name})


def read_pointer(parent: Path) -> str:
    """Return the name of the newest valid folder of ``parent``, an empty text where there is none."""
    return str(read_json(parent / POINTER)["name"]) if (parent / POINTER).exists() else ""
