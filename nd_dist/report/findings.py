"""What a finished run holds, read from its folder alone: points, comparisons, pictures, losses. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import PICTURE, Layout, repeat_file
from nd_dist.evaluation.points.units import Point, image_name
from nd_dist.evaluation.scoring.comparisons import NO_GUIDANCE
from nd_dist.evaluation.scoring.score import EACH, WINS, read_arrays
from nd_dist.events import events_path, read_events
from nd_dist.fanout.results import read_record
from nd_dist.files import read_json
from nd_dist.metrics.table import ordered


@dataclass(frozen=True)
class Row:
    """One point of one subject with its metrics.

    Args:
        subject: Whose brain.
        point: Guidance point.
        folder: Its reconstructions.
        metrics: Metric name -> value, ci_low, ci_high, n, higher_is_better.
        groups: Name of a group of images -> metrics as above, of these images alone.
    """

    subject: int
    point: Point
    folder: Path
    metrics: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How tables name the point."""
        return point_label(self.point)


CONTROL_LABELS = {
    "shuffled": "chance: shuffled inputs",
    "nearest": "nearest training image",
    "ceiling": "ceiling: true embeddings",
}


def point_label(point: Point) -> str:
    """Return a point in words."""
    if point.control != "none":
        return CONTROL_LABELS[point.control]
    guidance = f"κ\u00a0{point.kappa:g}, η\u00a0{point.eta:g}" if point.is_guided else "without guidance"
    settings = [f"{key.removeprefix('sampler.')} {value}" for key, value in point.settings]
    return ", ".join([guidance, *settings])


class Findings:
    """A run folder that has a metrics.json.

    Args:
        run_dir: Folder of the run.

    Raises:
        DataError: there is no metrics.json, or it has no point.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        if not (run_dir / "metrics.json").exists():
            raise DataError(
                "The run has no metrics yet, so there is nothing to report.",
                where=str(run_dir / "metrics.json"),
                todo="run `nd evaluate` first",
            )
        self.metrics: dict[str, Any] = read_json(run_dir / "metrics.json")
        if not self.metrics.get("points"):
            raise DataError("metrics.json holds no guidance point.", where=str(run_dir / "metrics.json"))

    @cached_property
    def rows(self) -> list[Row]:
        """All points, by subject, kappa, eta."""
        return self._rows("points")

    @cached_property
    def controls(self) -> list[Row]:
        """All controls, by subject."""
        return self._rows("controls")

    def _rows(self, name: str) -> list[Row]:
        return [
            Row(
                entry["subject"],
                Point.of(entry),
                self.run_dir / entry["folder"],
                entry["metrics"],
                entry.get("groups", {}),
            )
            for entry in self.metrics.get(name, [])
        ]

    @property
    def group_names(self) -> list[str]:
        """Named groups of images that are reported apart, in order."""
        return list(dict.fromkeys(name for row in (*self.rows, *self.controls) for name in row.groups))

    @property
    def subjects(self) -> list[int]:
        """Subjects, ascending."""
        return sorted({row.subject for row in self.rows})

    @property
    def metric_names(self) -> list[str]:
        """Metrics that any point or control has, in the paper's order."""
        return ordered({name for row in (*self.rows, *self.controls) for name in row.metrics})

    def rows_of(self, subject: int) -> list[Row]:
        """Return the points of a subject."""
        return [row for row in self.rows if row.subject == subject]

    def controls_of(self, subject: int) -> list[Row]:
        """Return the controls of a subject: chance, the nearest training image, the ceiling."""
        wanted = list(CONTROL_LABELS)
        return sorted(
            (row for row in self.controls if row.subject == subject), key=lambda row: wanted.index(row.point.control)
        )

    def unguided(self, subject: int) -> Row | None:
        """Return the point without guidance, None where it was not evaluated."""
        return next((row for row in self.rows_of(subject) if not row.point.is_guided), None)

    def guided(self, subject: int) -> Row | None:
        """Return the main guided point; None where none is guided.

        It is the one that was chosen on training images, else the recipe's, else the first.
        """
        rows = [row for row in self.rows_of(subject) if row.point.is_guided]
        wanted = [self.chosen, self.recipe]
        return next((row for point in wanted for row in rows if row.point == point), rows[0] if rows else None)

    @property
    def selection(self) -> dict[str, Any]:
        """How a point was chosen on training images, empty where none was."""
        found: dict[str, Any] = self.metrics.get("selection", {})
        return found

    @property
    def chosen(self) -> Point | None:
        """The point that was chosen on training images."""
        return Point.of(self.selection["chosen"]) if self.selection else None

    @property
    def recipe(self) -> Point:
        """The recipe's own point."""
        sampler = self.metrics["provenance"].get("config", {}).get("sampler", {})
        return Point(float(sampler.get("kappa", -1.0)), float(sampler.get("eta", -1.0)))

    def main_rows(self, subject: int) -> list[Row]:
        """Return the rows that stand first in a table: without guidance, and the main guided point."""
        return [row for row in (self.unguided(subject), self.guided(subject)) if row is not None]

    def differences(self, row: Row, against: str = NO_GUIDANCE) -> dict[str, dict[str, Any]]:
        """Return the paired differences of a point, by metric; empty where there is no such comparison."""
        for entry in self.metrics.get("comparisons", []):
            if (entry["subject"], entry["against"], Point.of(entry)) == (row.subject, against, row.point):
                found: dict[str, dict[str, Any]] = entry["differences"]
                return found
        return {}

    def image_ids(self, subject: int) -> list[int]:
        """Return a subject's images."""
        ids: Sequence[int] = self.metrics["images"][str(subject)]
        return list(ids)

    def original(self, image_id: int) -> Path:
        """Return the picture that was seen."""
        return self.run_dir / "reconstructions" / "original" / image_name(image_id) / PICTURE

    def repeats(self, row: Row, image_id: int) -> list[Path]:
        """Return the reconstructions of an image at a point."""
        folder = row.folder / image_name(image_id)
        return [folder / repeat_file(repeat) for repeat in range(len(read_record(folder).get("files", {})))]

    def values(self, row: Row, metric: str) -> dict[int, float]:
        """Return image id -> value of a metric, empty where it has none per image or it was not kept.

        Of two-way identification it is the number of distractors that the image's reconstructions beat.
        """
        folder = Layout(self.run_dir, self.metrics["protocol"]).score(row.point, row.subject)
        record = read_record(folder)
        arrays = read_arrays(folder) if record else {}
        if WINS + metric in arrays:
            values = arrays[WINS + metric].sum(dim=0).tolist()
        elif EACH + metric in arrays:
            values = arrays[EACH + metric].tolist()
        else:
            return {}
        return dict(zip(record["image_ids"], values, strict=True))

    def losses(self) -> dict[int, tuple[list[int], list[float]]]:
        """Return stage -> (steps, losses) from rank 0's events; a step repeated after a resume counts once."""
        stages: dict[int, dict[int, float]] = {}
        for event in read_events(events_path(self.run_dir, 0)):
            loss = event.get("loss")
            if event.get("event") == "train_step" and isinstance(loss, int | float) and math.isfinite(loss):
                stages.setdefault(int(event["stage"]), {})[int(event["step"])] = float(loss)
        return {
            stage: ([step for step, _ in sorted(points.items())], [loss for _, loss in sorted(points.items())])
            for stage, points in sorted(stages.items())
        }
