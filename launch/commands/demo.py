"""`nd demo`: every command on a phantom, one after the other; and `nd phantom`, which writes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from launch.commands.launching import launch_command
from launch.commands.packed_shards import run_verify
from launch.commands.results import run_report
from launch.console import make_console
from launch.plans.choose import LaunchOptions
from launch.recipe import load_recipe


def run_demo(recipe: str, overrides: Sequence[str], ranks: int | None) -> None:
    """Run phantom, pack, verify, train, evaluate, sweep and report of a recipe; print the time of each.

    Args:
        recipe: Name or path of the recipe.
        overrides: ``key=value`` overrides for every step.
        ranks: Ranks of every launched step.

    Raises:
        NdDistError: a step failed; the same command goes on from there.
    """
    console = make_console()
    config = load_recipe(recipe, overrides)
    options = LaunchOptions(ranks)

    def launch(command: str) -> Callable[[], object]:
        return lambda: launch_command(command, config, options, console)

    steps: list[tuple[str, Callable[[], object]]] = [
        ("phantom", lambda: make_phantom(recipe, overrides)),
        ("pack", launch("pack")),
        ("verify", lambda: run_verify(str(config.shards_dir))),
        ("train", launch("train")),
        ("evaluate", launch("evaluate")),
        ("sweep", launch("sweep")),
        ("report", lambda: run_report(config.run_dir)),
    ]
    started = time.monotonic()
    for number, (name, step) in enumerate(steps, start=1):
        console.print(f"[{number}/{len(steps)}] {name}")
        before = time.monotonic()
        step()
        console.print(f"  {time.monotonic() - before:.1f} s")
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Open this page:")
    console.print(str((config.run_dir / "report.html").resolve()))


def make_phantom(recipe: str, overrides: Sequence[str]) -> None:
    """Write the phantom of a recipe and say what is in it."""
    from shards.phantom.write import write_phantom

    config = load_recipe(recipe, overrides, "phantom")
    summary = write_phantom(config.nsd_root, config.phantom, config.seed)
    make_console().print(f"  phantom: {summary.describe()} -> {config.nsd_root}")
