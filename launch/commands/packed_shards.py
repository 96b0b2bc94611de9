"""What `nd` does with packed shards: verify, repair and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.commands.launching import launch_command
from launch.console import make_console
from launch.pack_recipe import read_pack_recipe
from launch.plans.choose import LaunchOptions
from launch.recipe import load_recipe, load_settings
from launch.supervise.checks import model_checks
from launch.supervise.preflight import require
from nd_dist.config import Config, RemoteConfig
from nd_dist.errors import ConfigError, DataError
from nd_dist.location import parse_location


def run_verify(location: str, overrides: Sequence[str] = ()) -> None:
    """Verify packed shards and print each problem.

    Args:
        location: Folder or URL.
        overrides: ``remote.key=value`` words.

    Raises:
        DataError: there is a problem.
        ConfigError: another word was given.
    """
    from shards.upkeep.verify import verify

    console = make_console()
    problems = verify(location, remote=_remote(overrides))
    for problem in problems:
        console.print(f"  {problem}")
    what = "the server's files" if "://" in location else "the folder"
    if problems:
        raise DataError(
            f"{len(problems)} problem(s) in the shards.",
            where=f"{location} ({what}, not a cache)" if "://" in location else location,
            todo="`nd verify --repair` on the folder that was packed repairs it",
        )
    console.print(f"  verify: every shard and table of {location} matches its index ({what})")


def run_verify_source(recipe: str, overrides: Sequence[str]) -> None:
    """Read a recipe's data set to its end, before it is packed, and print each problem.

    Args:
        recipe: Name or path of the recipe.
        overrides: ``key=value`` words.

    Raises:
        DataError: there is a problem.
    """
    from shards.upkeep.source import verify_source

    config, console = load_recipe(recipe, overrides, "pack"), make_console()
    num_problems = 0
    for problem in verify_source(config):
        console.print(f"  {problem}")
        num_problems += 1
    if num_problems:
        raise DataError(f"{num_problems} problem(s) in the data set.", where=str(config.nsd_root))
    subjects, expects = ", ".join(map(str, config.data.subjects)), f"is as {config.data.reader} expects it"
    console.print(f"  verify: all of subjects {subjects} in {config.nsd_root} {expects}")


def run_repair(location: str, overrides: Sequence[str] = ()) -> None:
    """Pack what is damaged again, and just that, with the recipe that the folder keeps, and verify.

    What it takes is looked for first; a damaged file goes only when it has been packed again.

    Args:
        location: The folder.
        overrides: ``key=value`` words for what lies elsewhere now, such as ``nsd_root``.

    Raises:
        DataError: the folder keeps no recipe, or what packing needs is gone; nothing was changed then.
        ConfigError: a URL.
    """
    from shards.sources.open import open_reader
    from shards.upkeep.repair import find_damage, repair, restore

    shards_dir = parse_location(location)
    if not isinstance(shards_dir, Path):
        raise ConfigError(
            "Shards on a server cannot be repaired from here; nothing was changed.",
            where=location,
            todo="`nd verify --repair` on the folder that was packed, then copy it again",
        )
    console = make_console()
    restore(shards_dir)  # what a repair that was killed had set aside
    damaged = find_damage(shards_dir)
    if not damaged:
        console.print("  repair: nothing was damaged")
        return
    config = read_pack_recipe(shards_dir, overrides)
    open_reader(config)
    require(model_checks(config))
    for path in repair(shards_dir):
        console.print(f"  removed {path} (it had been set aside until it was repacked)")
    try:
        launch_command("pack", config, LaunchOptions(), console)
    finally:
        restore(shards_dir)
    run_verify(location)


def run_export(location: str, out_dir: Path, subjects: Sequence[int] | None, overrides: Sequence[str] = ()) -> None:
    """Write MindEye2's files of packed shards and say what was written."""
    from shards.reading.reader import ShardReader
    from shards.upkeep.export_mindeye2 import export

    console = make_console()
    summary = export(ShardReader(location, _remote(overrides)), out_dir, subjects)
    for path in summary.files:
        console.print(f"  {path}")
    if not summary.has_pictures:
        console.print("  no pictures: the shards do not contain those of all trials (data.pictures=all)")
    console.print(f"  export: {len(summary.files)} files -> {out_dir}")


def _remote(overrides: Sequence[str]) -> RemoteConfig:
    """Return how a server is read.

    Raises:
        ConfigError: a word that says something else.
    """
    if others := [word for word in overrides if not word.startswith("remote.")]:
        raise ConfigError(
            "This command reads shards as they are and takes remote.key=value words only.",
            found=" ".join(others),
            todo="leave them out; a repair takes others (`nd verify`: add --repair)",
        )
    return load_settings(Config, None, overrides).remote
