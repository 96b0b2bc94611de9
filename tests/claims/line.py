"""Runs of the product's own commands that the claims are read from, in one folder that is resumed if it exists.

``ND_CLAIMS_DIR`` names the folder (default: a temporary one), so that a run of the claims that was interrupted goes
on, and so that a finished ``nd demo --full`` can be used: its shards and run are looked for there.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.reconstruction.decode import StoredTargets
from nd_dist.evaluation.scoring.comparisons import NO_GUIDANCE
from nd_dist.evaluation.scoring.score import read_scores
from nd_dist.metrics.statistics.scores import Scores
from shards.reading.reader import ShardReader

ND = [sys.executable, "-m", "launch.cli"]
RECIPE = "demo_full"


@dataclass(frozen=True)
class World:
    """Folder of a phantom and of the runs on it."""

    folder: Path

    def words(self, run: str) -> list[str]:
        """Return the overrides that put a run of the recipe into the folder."""
        return [
            f"nsd_root={self.folder / 'nsd'}",
            f"shards_dir={self.folder / 'shards'}",
            f"run_dir={self.folder / run}",
        ]

    def nd(self, command: str, run: str, *words: str) -> None:
        """Run a command with two ranks; what is finished there is not made again."""
        recipe = [] if command == "demo" else [RECIPE]
        option = ["--full"] if command == "demo" else []
        line = [*ND, command, *recipe, *self.words(run), *words, *option, "--ranks", "2"]
        result = subprocess.run(line, capture_output=True, text=True, check=False)
        assert result.returncode == 0, " ".join(line) + "\n" + result.stdout[-4000:] + result.stderr[-4000:]

    def metrics(self, run: str) -> "Metrics":
        """Return what a run measured."""
        return Metrics(json.loads((self.folder / run / "metrics.json").read_text()))

    def scores(self, run: str) -> Scores:
        """Return the scores of a run's own guidance point, for a comparison in pairs with another run's."""
        subject, _ = self.test_images(run)
        sampler = self.metrics(run).content["provenance"]["config"]["sampler"]
        return read_scores(self.layout(run).score(Point(sampler["kappa"], sampler["eta"]), subject))

    @cached_property
    def reader(self) -> ShardReader:
        """Return the shards of all runs."""
        return ShardReader(self.folder / "shards")

    def decoded(self, run: str, subject: int) -> StoredTargets:
        """Return a subject's decoded targets of all test images."""
        folder = self.layout(run).decoded(Point(0.0, 0.0), subject)
        return StoredTargets(folder, sorted(self.reader.images(subject, "test")))

    def test_images(self, run: str) -> tuple[int, list[int]]:
        """Return the one subject of a run and its test images, ascending."""
        ((subject, image_ids),) = self.metrics(run).content["images"].items()
        return int(subject), image_ids

    def layout(self, run: str) -> Layout:
        """Return where a run's files lie."""
        return Layout(self.folder / run, self.metrics(run).content["protocol"])


@dataclass(frozen=True)
class Metrics:
    """Content of a metrics.json."""

    content: dict[str, Any]

    def point(self, kappa: float, eta: float) -> dict[str, Any]:
        """Return the metrics of a guidance point; kappa 0 is without guidance."""
        wanted = Point(kappa, eta)
        return next(e["metrics"] for e in self.content["points"] if Point.of(e).name == wanted.name)

    def control(self, name: str) -> dict[str, Any]:
        """Return the metrics of a control."""
        return next(e["metrics"] for e in self.content["controls"] if e["control"] == name)

    def chosen(self) -> dict[str, Any]:
        """Return the metrics, on test images, of the point that was chosen on training images."""
        chosen = self.content["selection"]["chosen"]
        return self.point(chosen["kappa"], chosen["eta"])

    def gain(self, metric: str) -> dict[str, Any]:
        """Return the paired difference of the chosen point to no guidance."""
        chosen = Point.of(self.content["selection"]["chosen"])
        entries = (e for e in self.content["comparisons"] if e["against"] == NO_GUIDANCE)
        return next(e["differences"][metric] for e in entries if Point.of(e) == chosen)

    def recipe(self) -> dict[str, Any]:
        """Return the metrics of the recipe's own point, at which the controls were made."""
        sampler = self.content["provenance"]["config"]["sampler"]
        return self.point(sampler["kappa"], sampler["eta"])


def interval(item: dict[str, Any]) -> str:
    """Return a metric as text for a message."""
    return f"{item['value']:.3f} [{item['ci_low']:.3f}, {item['ci_high']:.3f}]"


def claims_dir() -> Path | None:
    """Return the folder that was named for the claims' runs."""
    named = os.environ.get("ND_CLAIMS_DIR")
    return Path(named).resolve() if named else None
