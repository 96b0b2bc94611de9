"""The tensors of a model folder's networks, and hashes over them.

A hash is over tensors, not over files: the same weights in safetensors or in torch's format, whole or in shards, are
the same network. Earlier versions hashed the files; what is recorded by such a hash keeps it (``recorded``).
``folders`` says which files are read. Pickles are opened with ``weights_only``, which runs no code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nd_dist.errors import CheckpointError
from nd_dist.files import hash_json, read_json, sha256_file
from nd_dist.frozen.folders import CONFIG_NAME, list_files, weight_files

DAMAGE = (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError)
"""What the libraries raise for a file that is torn, or no file of tensors at all."""


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def iterate_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield the name of every tensor of weight files, and a function that reads it (on the CPU, as it is stored).

    The function is good until the next tensor is asked for.

    Raises:
        CheckpointError: a file is damaged, or holds anything but tensors.
    """
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as content:
                    for name in content.keys():  # noqa: SIM118 - safe_open is no mapping
                        yield name, partial(content.get_tensor, name)
            else:
                for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
                    yield name, tensor.clone
        except DAMAGE as error:
            raise CheckpointError(
                "A weight file could not be read.",
                where=str(path),
                found=first_line(error),
                todo="copy it again; a .bin may hold nothing but tensors",
            ) from error


def hash_network(folder: Path, part: str = "", recorded: Collection[str] = ()) -> str:
    """Return one sha256 over a network's tensors (names, dtypes, shapes, values) and its configuration.

    Buffers of integers, which only some releases store, are left out; so is which release wrote the configuration.

    Args:
        folder: The model folder.
        part: Sub-folder of the network, "" for the folder itself.
        recorded: Hashes of networks in earlier records; an earlier version's hash of these very files is returned.
    """
    config = read_json(folder / part / CONFIG_NAME)
    settings = {key: value for key, value in config.items() if key[0] != "_" and key != "transformers_version"}
    tensors = {name: _hash_tensor(read()) for name, read in iterate_tensors(weight_files(folder, part))}
    digest = hash_json([settings, {name: digest for name, digest in tensors.items() if digest}])
    whole = [path for path in (folder / part).glob("*.safetensors") if "." not in path.stem]
    return _as_recorded(digest, [*whole, folder / part / CONFIG_NAME], recorded)


def _hash_tensor(tensor: torch.Tensor) -> list[str]:
    """Return dtype, shape and sha256 of the values; nothing for integers."""
    if not tensor.is_floating_point():
        return []
    values: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()  # Any: hashlib wants a buffer
    return [str(tensor.dtype), str(list(tensor.shape)), hashlib.sha256(values).hexdigest()]


def hash_tokenizer(folder: Path, recorded: Collection[str] = ()) -> str:
    """Return one sha256 over the names and contents of a model folder's tokenizer files; see ``hash_network``."""
    every = [path for path in (folder / "tokenizer").iterdir() if path.is_file()]
    return _as_recorded(_hash_files(list_files(folder, ("tokenizer",))), every, recorded)


def _as_recorded(digest: str, files: Iterable[Path], recorded: Collection[str]) -> str:
    """Return a hash, or that of the files where this is the one that is recorded."""
    if not recorded or digest in recorded:
        return digest
    of_files = _hash_files(files)
    return of_files if of_files in recorded else digest


def _hash_files(files: Iterable[Path]) -> str:
    return hash_json({path.name: sha256_file(path) for path in files})
