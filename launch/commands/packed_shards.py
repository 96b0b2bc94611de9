"""What the commands about packed shards do: verify, repair, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.commands.launching import launch_command
from launch.console import make_console
from launch.pack_recipe import read_pack_recipe
from launch.plans.choose import LaunchOptions
from nd_dist.errors import DataError


def run_verify(shards_dir: Path | str) -> None:
    """Verify packed shards and print each problem.

    Args:
        shards_dir: Folder or URL.

    Raises:
        DataError: there is a problem.
    """
    from shards.upkeep.verify import verify

    console = make_console()
    problems = verify(shards_dir)
    for problem in problems:
        console.print(f"  {problem}")
    if problems:
        raise DataError(
            f"{len(problems)} problem(s) in the shards.",
            where=str(shards_dir),
            todo="`nd verify --repair` on the folder that was packed makes what is damaged again",
        )
    console.print(f"  verify: every shard and table of {shards_dir} is as its index says")


def run_repair(shards_dir: Path, overrides: Sequence[str] = ()) -> None:
    """Remove what is damaged, pack just that again with the recipe that the folder keeps, and verify.

    Args:
        shards_dir: The folder.
        overrides: ``key=value`` words for what lies elsewhere now, such as ``nsd_root``.

    Raises:
        DataError: the folder keeps no recipe, or what packing needs is gone.
    """
    from shards.upkeep.repair import repair

    console = make_console()
    removed = repair(shards_dir)
    for path in removed:
        console.print(f"  removed {path}")
    if not removed and (shards_dir / "index.json").is_file():
        console.print("  repair: nothing was damaged")
        return
    launch_command("pack", read_pack_recipe(shards_dir, overrides), LaunchOptions(), console)
    run_verify(shards_dir)


def run_export(shards_dir: str, out_dir: Path, subjects: Sequence[int] | None) -> None:
    """Write MindEye2's files of packed shards and say what was written."""
    from shards.reading.reader import ShardReader
    from shards.upkeep.export_mindeye2 import export

    console = make_console()
    summary = export(ShardReader(shards_dir), out_dir, subjects)
    for path in summary.files:
        console.print(f"  {path}")
    if not summary.has_pictures:
        console.print("  no pictures: the shards do not hold those of all trials (data.pictures=all)")
    console.print(f"  export: {len(summary.files)} files -> {out_dir}")
