"""What the commands about packed shards do: verify, repair, export, and the dry run of packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.pack_recipe import read_pack_recipe
from nd_dist.config import Config
from nd_dist.errors import CheckpointError, DataError
from nd_dist.world import World

if TYPE_CHECKING:
    from shards.packing.targets import TargetExtractor


def run_verify(shards_dir: Path | str) -> None:
    """Verify packed shards and print each problem.

    Args:
        shards_dir: Folder or URL.

    Raises:
        DataError: there is a problem.
    """
    from shards.upkeep.verify import verify

    console = Console(soft_wrap=True)
    problems = verify(shards_dir)
    for problem in problems:
        console.print(f"  {problem}", highlight=False, markup=False)
    if problems:
        raise DataError(
            f"{len(problems)} problem(s) in the shards.",
            where=str(shards_dir),
            todo="`nd verify --repair` on the folder that was packed makes what is damaged again",
        )
    console.print(f"  verify: every shard and table of {shards_dir} is as its index says", highlight=False)


def run_repair(shards_dir: Path, overrides: Sequence[str] = ()) -> None:
    """Remove what is damaged, pack just that again with the recipe that the folder keeps, and verify.

    Args:
        shards_dir: The folder.
        overrides: ``key=value`` words for what lies elsewhere now, such as ``nsd_root``.

    Raises:
        DataError: the folder keeps no recipe, or what packing needs is gone.
    """
    from launch.commands.launching import LaunchOptions, launch_command
    from shards.upkeep.repair import repair

    console = Console(soft_wrap=True)
    removed = repair(shards_dir)
    for path in removed:
        console.print(f"  removed {path}", highlight=False, markup=False)
    if not removed and (shards_dir / "index.json").is_file():
        console.print("  repair: nothing was damaged", highlight=False)
        return
    launch_command("pack", read_pack_recipe(shards_dir, overrides), LaunchOptions(), console)
    run_verify(shards_dir)


def run_export(shards_dir: str, out_dir: Path, subjects: Sequence[int] | None) -> None:
    """Write MindEye2's files of packed shards and say what was written."""
    from shards.reading.reader import ShardReader
    from shards.upkeep.export_mindeye2 import export

    console = Console(soft_wrap=True)
    summary = export(ShardReader(shards_dir), out_dir, subjects)
    for path in summary.files:
        console.print(f"  {path}", highlight=False, markup=False)
    if not summary.has_pictures:
        console.print("  no pictures: the shards do not hold those of all trials (data.pictures=all)", highlight=False)
    console.print(f"  export: {len(summary.files)} files -> {out_dir}", highlight=False)


def describe_pack(config: Config, ranks: int) -> Iterator[str]:
    """Yield what packing would do: shards and bytes, then minutes, from a small sample of the real data.

    Raises:
        DataError: data is missing.
    """
    from shards.packing.estimate import estimate_pack
    from shards.packing.pack import plan_pack

    shape_free = plan_pack(config)  # what is missing is said before networks are loaded
    extractor: TargetExtractor | None = None
    if config.data.targets:
        try:
            extractor = _extractor(config)
        except CheckpointError as error:  # a dry run on a machine without the networks still tells the rest
            yield f"the networks are not on this machine, their targets are not counted: {error.where}"
    yield (plan_pack(config, extractor.specs) if extractor is not None else shape_free).describe()
    yield estimate_pack(config, extractor).describe(ranks)


def _extractor(config: Config) -> TargetExtractor:
    """Return the frozen networks on this process's device."""
    from launch.ranks.networks import load_extractor

    return load_extractor(config, World())
