"""The recipe that a folder of shards keeps, so that what is damaged can be packed again.

It holds what the shards' bytes depend on, and no path of the machine that packed, because the folder is copied to
others as it is: a data set or networks beside the shards are named relative to them, any other folder is left out and
has to be given again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.recipe import load_recipe, yaml_text
from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.files import write_text

LEFT_OUT = "to-be-given"
"""Stands for a folder that lies elsewhere."""
_HEADER = """\
# What these shards were packed by; `nd verify SHARDS --repair` reads it. Folders are relative to the shards' folder.
"""
_PLACES = ("nsd_root", "model", "guidance_model")


def pack_recipe_path(shards_dir: Path) -> Path:
    """Return where a folder of shards keeps the recipe that it was packed by."""
    return shards_dir / ".pack" / "recipe.yaml"


def write_pack_recipe(config: Config) -> None:
    """Keep the recipe of shards beside them."""
    shards_dir = config.shards_folder
    captions = Path(config.data.captions.replace("${nsd_root}", str(config.nsd_root)))
    is_inside = captions.resolve().is_relative_to(config.nsd_root.resolve())
    below = "${nsd_root}/" + os.path.relpath(captions, config.nsd_root)
    data = config.data.model_dump(mode="json", exclude={"split"})
    values: dict[str, Any] = {  # Any: goes to YAML
        "nsd_root": _beside(config.nsd_root, shards_dir),
        **{name: _network(getattr(config, name), shards_dir) for name in ("model", "guidance_model")},
        "data": {**data, "captions": below if is_inside else _beside(captions, shards_dir)},
        "frozen": config.frozen.model_dump(mode="json"),
    }
    write_text(pack_recipe_path(shards_dir), _HEADER + yaml_text(values))


def told_of(config: Config) -> Iterator[str]:
    """Yield what is to be said of a folder after packing: what it keeps, what it lacks, what was packed knowingly."""
    from shards.format.codec import PICTURES, int8_store
    from shards.format.index import Index

    index, data = Index.read(config.shards_folder), config.data
    subjects = [f"subject {subject}" for subject in index.subjects if subject not in data.subjects]
    asked = {*data.targets, *map(int8_store, data.int8_targets), *([PICTURES] if data.pictures != "none" else [])}
    if kept := [*subjects, *(store for store in index.features if store not in asked)]:
        yield f"the folder keeps what this recipe does not ask for: {', '.join(kept)}"
    for subject, info in index.subjects.items():
        if info.shown_test_images is not None and info.test_images < info.shown_test_images:
            yield (
                f"subject {subject} has {info.test_images} of the {info.shown_test_images} test images that it saw: "
                "not the published protocol (data.max_test_sessions, or betas that are missing)"
            )
    if index.accepted:
        yield f"{len(index.accepted)} samples cannot be real and were packed knowingly, e.g. {index.accepted[0]}"


def read_pack_recipe(shards_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the recipe that a folder of shards keeps.

    Args:
        shards_dir: The folder.
        overrides: ``key=value`` words, for folders that lie elsewhere now.

    Raises:
        DataError: the folder keeps none, or a folder that it names is not given and not there.
        ConfigError: the recipe or an override cannot be read.
    """
    path = pack_recipe_path(shards_dir)
    if not path.is_file():
        raise DataError(
            "The folder does not keep the recipe that it was packed by; nothing was changed.",
            where=str(path),
            todo="run `nd pack` with the same recipe: it packs only what is missing",
        )
    given = {word.split("=", 1)[0] for word in overrides}
    words = [f"shards_dir={shards_dir.resolve()}", "run_dir=runs/repair", *overrides]
    for name, value in _kept_places(path).items():
        if name in given or not (value == LEFT_OUT or value.startswith(("./", "../"))):
            continue
        folder = (shards_dir / value).resolve()
        if value == LEFT_OUT or not folder.exists():
            raise DataError(
                "What the shards were packed from is not known here; nothing was changed.",
                where=f"{name} in {path}",
                expected="a folder" if value == LEFT_OUT else f"the folder {folder}",
                todo=f"`nd verify {shards_dir} --repair {name}=FOLDER`",
            )
        words.append(f"{name}={folder}")
    return load_recipe(str(path), words, "pack")


def _kept_places(path: Path) -> dict[str, str]:
    """Return the folders that a kept recipe names, by key, as they are written.

    Raises:
        DataError: the file is damaged.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {**{name: str(content[name]) for name in _PLACES}, "data.captions": str(content["data"]["captions"])}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(
            "The recipe that the folder keeps cannot be read; nothing was changed.",
            where=str(path),
            found=str(error),
            todo="run `nd pack` with the same recipe: it packs only what is missing",
        ) from error


def _network(name: str, shards_dir: Path) -> str:
    """Return how networks are named: a folder like any other, a name in the cache as it is."""
    return _beside(Path(name), shards_dir) if Path(name).is_dir() else name


def _beside(folder: Path, shards_dir: Path) -> str:
    """Return a folder's path relative to the shards' folder, where it lies below that or beside it."""
    path = Path(os.path.relpath(folder.resolve(), shards_dir.resolve()))
    if path.parts.count("..") > 1:
        return LEFT_OUT
    return str(path) if path.parts[0] == ".." else f"./{path}"
