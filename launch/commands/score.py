"""What `nd score` does: check pictures that were made elsewhere, start the ranks that judge them, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.commands.launching import launch_command
from launch.commands.results import run_report
from launch.plans.choose import LaunchOptions
from launch.recipe import load_settings
from launch.supervise.checks import check_metrics
from nd_dist.config import Config


def score_command(settings: dict[str, object], overrides: Sequence[str], options: LaunchOptions) -> None:
    """Score pictures and write tables and report.

    Args:
        settings: Values of dotted keys; None and empty ones keep their default.
        overrides: Further words of the command line.
        options: How ranks are started.

    Raises:
        NdDistError: see ``launch_command``, and what is wrong with the pictures.
    """
    given = {key: value.resolve() if isinstance(value, Path) else value for key, value in settings.items()}
    words = [f"{key}={value}" for key, value in given.items() if value not in (None, "")]
    config = load_settings(Config, None, [*words, *overrides], "score")
    launch_command("score", config, options, check=_check)
    run_report(config.run_dir)


def _check(command: str, config: Config, ranks: int) -> dict[str, str]:
    """Look at the pictures' names, numbers and sizes, and at the folder of judges, before ranks are started."""
    from nd_dist.evaluation.given import GivenPictures

    found = {"judges": check_metrics(config.evaluation)}
    given = GivenPictures.open(config)
    given.originals.check_sizes()
    given.recons.check_sizes()
    return found
