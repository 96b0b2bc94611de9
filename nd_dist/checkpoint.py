"""Model folders and checkpoint folders on disk: safetensors, JSON manifests with sizes and hashes, atomic pointers.

A folder is valid when its manifest, written last, agrees with its files. Knows nothing of models or DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nd_dist.errors import CheckpointError
from nd_dist.files import atomic_path, read_json, sha256_file, write_json

FORMAT = 1
MANIFEST = "manifest.json"
POINTER = "latest.json"


_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Precisions as safetensors calls them."""


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


class HashedStream:
    """A file being written, hashed on the way.

    Args:
        stream: The file.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest, self._num_bytes = stream, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> int:
        """Write and hash some bytes; return how many."""
        self._digest.update(content)
        self._num_bytes += memoryview(content).nbytes
        return self._stream.write(content)

    def flush(self) -> None:
        """Write out what is buffered."""
        self._stream.flush()

    @property
    def record(self) -> FileRecord:
        """What has been written so far."""
        return FileRecord(self._num_bytes, self._digest.hexdigest())


def write_hashed(path: Path, write: Callable[[HashedStream], object]) -> FileRecord:
    """Let ``write`` fill a file, atomically, and return its record, without reading it again.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as part, open(part, "wb") as stream:
        hashed = HashedStream(stream)
        write(hashed)
    return hashed.record


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write named tensors as safetensors, atomically, and return the file's record; copies them to the CPU piecewise.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # as the format aligns them
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(stream: HashedStream) -> None:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            flat = tensor.detach().to("cpu").contiguous().view(-1)
            stream.write(flat.view(torch.uint8).numpy().data)

    return write_hashed(path, write)


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


def write_manifest(folder: Path, files: Mapping[str, FileRecord], facts: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose files are complete; from then on the folder counts as valid.

    Args:
        folder: The folder.
        files: Path relative to ``folder`` -> its record.
        facts: JSON facts that belong to the content (step, world size, ...).
    """
    listed = {name: {"num_bytes": record.num_bytes, "sha256": record.sha256} for name, record in files.items()}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": listed, "facts": dict(facts)})


def read_manifest(folder: Path, share: slice = slice(None)) -> dict[str, Any]:
    """Return the facts of a valid folder, after checking every file's size and hash.

    Args:
        folder: The folder.
        share: Which of the files this process checks; others check the rest.

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
    for name, wanted in sorted(manifest["files"].items())[share]:
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
