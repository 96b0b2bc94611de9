"""Model folders in Hugging Face layout: where they are, whether they are whole, and what is in them (hashes).

Folders are local, or snapshots that the local Hugging Face cache already holds. Nothing is ever downloaded, and only
safetensors weights are read. Building networks from a folder is not done here.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from nd_dist.errors import CheckpointError
from nd_dist.files import hash_json, sha256_file

CONFIG_NAME = "config.json"
SHIPPED_PREFIX = "phantom/"  # names of the small networks that come with the package, for made-up data


def resolve_folder(model: str | Path) -> Path:
    """Return the folder of a model: a local one, a shipped one, or a snapshot in the local Hugging Face cache.

    Raises:
        CheckpointError: neither exists. Nothing is downloaded.
    """
    folder = Path(model)
    if str(model).startswith(SHIPPED_PREFIX) and not folder.is_dir():
        folder = Path(__file__).parent / str(model)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            "A model is neither a folder nor in the local Hugging Face cache; nothing is downloaded.",
            where=str(model),
            expected="a folder in Hugging Face layout, or the name of a cached model",
            found=str(error).splitlines()[0],
            todo=f"give the folder's path, or fetch it once where there is a network: hf download {model}",
        ) from error


def model_name(model: str | Path) -> str:
    """Return the name of a model for the records: a hub name as given, a folder's last part (paths differ by host)."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def require_part(folder: Path, part: str, marker: str = CONFIG_NAME) -> Path:
    """Return the sub-folder ``part`` of a model folder, which must hold the file ``marker``.

    Raises:
        CheckpointError: the part or the file is missing.
    """
    path = folder / part
    if not (path / marker).is_file():
        present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        raise CheckpointError(
            f"A part of a model folder is missing: {part}/{marker}.",
            where=str(folder),
            expected=str(path / marker),
            found=f"sub-folders {present}",
            todo="copy the complete model folder in Hugging Face layout",
        )
    return path


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of one network's folder, sorted by name; variants such as fp16 are left out.

    Raises:
        CheckpointError: there is none, for instance only ``.bin`` weights, which are pickles and are not read.
    """
    whole = [path for path in folder.glob("*.safetensors") if "." not in path.name.removesuffix(".safetensors")]
    if whole:
        return sorted(whole)
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".safetensors"}
    )
    raise CheckpointError(
        "A network has no safetensors weights; other formats are pickles and are not read.",
        where=str(folder),
        expected="model.safetensors or diffusion_pytorch_model.safetensors",
        found=", ".join(others) or "no weights at all",
        todo="convert once on a machine that trusts the file: Model.from_pretrained(old).save_pretrained(new)",
    )


def hash_weights(folder: Path) -> str:
    """Return one sha256 over the weights and the configuration of a network's folder (names and contents)."""
    return hash_files([*weight_files(folder), folder / CONFIG_NAME])


def hash_files(paths: list[Path]) -> str:
    """Return one sha256 over the names and contents of files; where they lie does not matter."""
    return hash_json({path.name: sha256_file(path) for path in paths})
