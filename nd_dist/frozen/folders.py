"""Model folders in Hugging Face layout: where they are, and which of their files a library opens.

``choose_files`` is the one rule. Resolving, checks before a launch, hashing, loading and downloading all follow it, so
files that nobody reads (a safety checker, other formats, other variants) may be missing or lie beside the others.
Folders are local, or snapshots in the local Hugging Face cache. Nothing is downloaded here, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from nd_dist.errors import CheckpointError
from nd_dist.files import read_json

CONFIG_NAME = "config.json"
SHIPPED_PREFIX = "phantom/"  # names of the small networks that come with the package, for made-up data
SCHEDULER_CONFIG = "scheduler_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
STABLE_DIFFUSION = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""What is used of a Stable Diffusion folder, each a sub-folder."""
NETWORK = ("",)
"""What is used of a folder that is one network of transformers, such as CLIP: the folder itself."""

_DIFFUSERS = ("unet", "vae")  # these two are diffusers' networks; every other one is transformers'
_MARKERS = {"tokenizer": TOKENIZER_CONFIG, "scheduler": SCHEDULER_CONFIG}
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_TOKENIZER = (*chain(*_VOCABULARIES), "special_tokens_map.json", "added_tokens.json")
_VARIANTS = ("", "fp16", "bf16")  # others, such as non_ema, are for training


@dataclass(frozen=True)
class Weights:
    """The weight files that a library opens for one network.

    Args:
        files: Names, several where the weights are sharded.
        variant: ``fp16`` or ``bf16`` where the folder has nothing else.
        index: Name of the file that lists the shards, or "".
    """

    files: tuple[str, ...]
    variant: str = ""
    index: str = ""

    @property
    def options(self) -> dict[str, bool | str | None]:
        """Arguments of ``from_pretrained`` that open these files and no others."""
        return {
            "use_safetensors": self.files[0].endswith(".safetensors"),
            "variant": self.variant or None,
            "local_files_only": True,
        }


def choose_weights(names: Collection[str], part: str, read: Callable[[str], Any]) -> Weights | None:
    """Return what diffusers or transformers opens among the files of one network's folder, or None.

    Safetensors come before torch's format, and both before variants. Where whole and sharded weights lie side by side,
    diffusers takes the shards and transformers the whole.

    Args:
        names: File names in the folder.
        part: Sub-folder of the model that this is, "" for the model itself.
        read: Returns the JSON value of a file of the model.
    """
    is_diffusers = part in _DIFFUSERS
    stems = ("diffusion_pytorch_model",) * 2 if is_diffusers else ("model", "pytorch_model")
    for variant in _VARIANTS:
        dotted = f".{variant}" if variant else ""
        for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
            whole, index = f"{stem}{dotted}.{suffix}", f"{stem}.{suffix}.index{dotted}.json"
            for name in (index, whole) if is_diffusers else (whole, index):
                if name in names and name == whole:
                    return Weights((whole,), variant)
                if name in names:
                    shards = read(f"{part}/{index}".lstrip("/")).get("weight_map", {})
                    return Weights(tuple(sorted(set(shards.values()))), variant, index)
    return None


def choose_files(names: Collection[str], parts: Sequence[str], read: Callable[[str], Any], where: str) -> list[str]:
    """Return the files of a model that are opened, as paths relative to its folder.

    Args:
        names: Relative paths of all its files.
        parts: What of it is used: ``STABLE_DIFFUSION``, ``NETWORK``, or some of the former.
        read: Returns the JSON value of a file.
        where: The model, for the message.

    Raises:
        CheckpointError: a part or its weights are missing.
    """
    chosen: list[str] = []
    for part in parts:
        prefix = f"{part}/" if part else ""
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        needed = [_MARKERS.get(part, CONFIG_NAME)]
        if part == "tokenizer" and not any(inside.issuperset(files) for files in _VOCABULARIES):
            needed += _VOCABULARIES[-1]
        if missing := [prefix + name for name in needed if name not in inside]:
            raise CheckpointError(
                f"A part of a model folder is missing: {', '.join(missing)}.",
                where=where,
                found=f"{part or 'files'}: {', '.join(sorted(inside)[:8]) or 'nothing'}",
                todo="copy the complete model folder in Hugging Face layout, or run `nd fetch models --to DIR`",
            )
        used = needed
        if part == "tokenizer":
            used += [name for name in _TOKENIZER if name in inside]
        elif part not in _MARKERS:
            weights = _require_weights(inside, part, read, f"{where} {part}".strip())
            used += [*weights.files, *([weights.index] if weights.index else [])]
        chosen += [prefix + name for name in used]
    return chosen


def _require_weights(names: AbstractSet[str], part: str, read: Callable[[str], Any], where: str) -> Weights:
    weights = choose_weights(names, part, read)
    if weights is not None and weights.files and names >= set(weights.files):
        return weights
    present = [name for name in sorted(names) if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    wanted = ("diffusion_pytorch_model" if part in _DIFFUSERS else "model") + ".safetensors"
    missing = [name for name in weights.files if name not in names] if weights else [wanted]
    raise CheckpointError(
        "A network's weights are missing.",
        where=where,
        expected=f"{', '.join(missing[:3])} (or torch's .bin, or an fp16 variant)",
        found=", ".join(present[:8]) or "no weights at all",
        todo="run `nd fetch models --to DIR` on a machine with internet access",
    )


def list_files(folder: Path, parts: Sequence[str]) -> list[Path]:
    """Return the files of a local model folder that are opened (see ``choose_files``)."""
    names = [f"{part}/{name}" if part else name for part in parts for name in _names(folder / part)]
    chosen = choose_files(names, parts, lambda name: read_json(folder / name), str(folder))
    return [folder / name for name in chosen]


def find_weights(folder: Path, part: str = "") -> Weights:
    """Return the weight files of one network in a local model folder.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    return _require_weights(_names(folder / part), part, lambda name: read_json(folder / name), str(folder / part))


def weight_files(folder: Path, part: str = "") -> list[Path]:
    """Return the paths of ``find_weights``."""
    return [folder / part / name for name in find_weights(folder, part).files]


def _names(folder: Path) -> set[str]:
    """Return the names of a folder's files; a cache's link to content that is gone is none."""
    return {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()


def resolve_folder(model: str | Path) -> Path:
    """Return the folder of a model: a local one, a shipped one, or a snapshot in the local Hugging Face cache.

    A cache's own folder of a model (``models--ORG--NAME``) stands for its snapshot, as the name does.

    Raises:
        CheckpointError: neither exists. Nothing is downloaded.
    """
    folder = Path(model)
    if str(model).startswith(SHIPPED_PREFIX) and not folder.is_dir():
        folder = Path(__file__).parent / str(model)
    if not folder.is_dir():
        folder = Path(constants.HF_HUB_CACHE) / f"models--{str(model).replace('/', '--')}"
    if not (folder / "snapshots").is_dir():
        if folder.is_dir():
            return folder
        raise CheckpointError(
            "A model is neither a folder nor in the local Hugging Face cache; nothing is downloaded.",
            where=str(model),
            expected="a folder in Hugging Face layout, or the name of a cached model",
            found=f"no folder {folder}",
            todo="give the folder's path, or run `nd fetch models --to DIR` on a machine with internet access",
        )
    main = folder / "refs" / "main"
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    current = [path for path in snapshots if main.is_file() and path.name == main.read_text().strip()] or snapshots
    if len(current) == 1:
        return current[0]
    raise CheckpointError(
        "A model in the Hugging Face cache has no snapshot that is its main one.",
        where=str(folder),
        expected="refs/main, or a single snapshot",
        found=f"snapshots {[path.name for path in snapshots]}",
        todo="give the path of the snapshot you want",
    )


def model_name(model: str | Path) -> str:
    """Return the name of a model for the records: a hub name, also of a cache's folder, or a folder's last part."""
    if not Path(model).is_dir():
        return str(model)
    folder = Path(model).resolve()
    cached = [part for part in folder.parts[-3:] if part.startswith("models--")]
    return cached[0].removeprefix("models--").replace("--", "/") if cached else folder.name
