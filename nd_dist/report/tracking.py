"""Log a run's numbers to TensorBoard or Weights & Biases (extra ``track``), from its metrics.json. Computes nothing.

Neither package is needed by anything else, so both are imported where they are asked for. Weights & Biases is used
offline: it writes a folder that ``wandb sync`` uploads from a machine with a network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from nd_dist.errors import ConfigError
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS
from nd_dist.report.findings import Findings, Row

FOLDER = "tracking"


def log_run(run_dir: Path, tracker: str) -> Path:
    """Write a run's metrics, training losses and configuration for a tracker; return the folder.

    Args:
        run_dir: A run that was evaluated.
        tracker: One of ``TRACKERS``.

    Raises:
        ConfigError: its package is not installed.
    """
    folder = run_dir / FOLDER / tracker
    folder.mkdir(parents=True, exist_ok=True)
    TRACKERS[tracker](Findings(run_dir), folder)
    return folder


def scalars(findings: Findings) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of every metric of every point: ``test/subj01/kappa-300_eta-0.5/pixcorr``."""
    split = findings.metrics.get("split", "test")
    for row in (*findings.rows, *findings.controls):
        for name, item in sorted(row.metrics.items()):
            yield f"{split}/{_place(row)}/{name}", float(item["value"])


def _place(row: Row) -> str:
    whose = f"subj{row.subject:02d}" if row.subject != ALL_SUBJECTS else "mean"
    return f"{whose}/{row.point.name}"


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"Tracking needs the package {name}, which is not installed.",
            found=str(error),
            todo='pip install "nd-dist[track]"',
        ) from error


def _tensorboard(findings: Findings, folder: Path) -> None:
    """Write one event file: metrics at step 0, losses over steps, the table and the recipe as text."""
    from nd_dist.report.table_files import markdown_table

    _module("tensorboard")
    from torch.utils.tensorboard.writer import SummaryWriter

    for old in folder.glob("events.out.*"):  # one run, one set of numbers: never two generations in one curve
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, value in scalars(findings):
            writer.add_scalar(name, value, 0)
        for stage, (steps, losses) in findings.losses().items():
            for step, loss in zip(steps, losses, strict=True):
                writer.add_scalar(f"train/stage{stage}/loss", loss, step)
        writer.add_text("metrics", markdown_table(findings), 0)


def _wandb(findings: Findings, folder: Path) -> None:
    """Write an offline run: metrics as its summary, losses as its history, the recipe as its config."""
    wandb: Any = _module("wandb")  # its functions carry no usable types
    provenance = findings.metrics["provenance"]
    run = wandb.init(
        mode="offline",
        dir=str(folder),
        project="nd_dist",
        name=findings.run_dir.name,
        config={**provenance.get("config", {}), "protocol": findings.metrics["protocol"]},
    )
    for stage, (steps, losses) in findings.losses().items():
        for step, loss in zip(steps, losses, strict=True):
            run.log({f"train/stage{stage}/loss": loss, f"train/stage{stage}/step": step})
    run.summary.update(dict(scalars(findings)))
    run.finish()


TRACKERS: dict[str, Callable[[Findings, Path], None]] = {"tensorboard": _tensorboard, "wandb": _wandb}
