"""What a finished run holds, read from its folder alone: points, comparisons, pictures, events. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nd_dist.checkpoint import read_tensors
from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import ARRAYS, PICTURE, Layout, repeat_file
from nd_dist.evaluation.points.units import Point, image_name
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS, NO_GUIDANCE
from nd_dist.events import events_path, read_events
from nd_dist.fanout.results import read_record
from nd_dist.files import read_json
from nd_dist.metrics.statistics.scores import EACH, WINS
from nd_dist.metrics.table import Metric, metric_of, ordered

Curve = tuple[list[int], list[float]]
METHOD = "score.method"


@dataclass(frozen=True)
class Row:
    """One point of one subject with its metrics.

    Args:
        subject: Whose brain; 0 is the mean over subjects.
        point: Guidance point; one may stand for the mean over seeds.
        label: How tables name the point.
        shown: The point whose pictures and single images stand for it.
        folder: Reconstructions of that point.
        metrics: Metric name -> value, ci_low, ci_high, n, higher_is_better.
        groups: Name of a group of images -> metrics as above, of these images alone.
    """

    subject: int
    point: Point
    label: str
    shown: Point
    folder: Path
    metrics: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def whose(self) -> str:
        """The subject in a column of tables."""
        return "mean" if self.subject == ALL_SUBJECTS else str(self.subject)


CONTROL_LABELS = {
    "shuffled": "chance: shuffled inputs",
    "nearest": "nearest training image",
    "ridge": "ridge regression",
    "ceiling": "ceiling: true embeddings",
}


def point_label(point: Point, method: str = "") -> str:
    """Return a point in words; ``method`` names pictures that were made elsewhere."""
    if not point.is_plain:
        return CONTROL_LABELS[point.control]
    others = dict(point.settings)
    method = str(others.pop(METHOD, method))
    guidance = f"κ\u00a0{point.kappa:g}, η\u00a0{point.eta:g}" if point.is_guided else method or "without guidance"
    return ", ".join([guidance, *(f"{key.removeprefix('sampler.')} {value}" for key, value in others.items())])


class Findings:
    """A run folder that has a metrics.json.

    Args:
        run_dir: Folder of the run.
        metrics: What stands in place of its metrics.json.

    Raises:
        DataError: there is no metrics.json, or it has no point.
    """

    def __init__(self, run_dir: Path, metrics: dict[str, Any] | None = None) -> None:
        self.run_dir = run_dir
        if metrics is None and not (run_dir / "metrics.json").exists():
            raise DataError(
                "The run has no metrics yet, so there is nothing to report.",
                where=str(run_dir / "metrics.json"),
                todo="run `nd evaluate` first, or `nd report --partial` while it runs",
            )
        self.metrics: dict[str, Any] = metrics or read_json(run_dir / "metrics.json")
        if not self.metrics.get("points"):
            raise DataError("metrics.json holds no guidance point.", where=str(run_dir / "metrics.json"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The recipe."""
        found: dict[str, Any] = self.metrics["provenance"].get("config", {})
        return found

    @property
    def is_given(self) -> bool:
        """Whether the pictures were made elsewhere."""
        return bool((self.config.get("score") or {}).get("reconstructions"))

    @cached_property
    def rows(self) -> list[Row]:
        """All points and their means, by subject (means over subjects first), settings, kappa, eta."""
        return [row for row in self._every_row if row.point.is_plain]

    @cached_property
    def controls(self) -> list[Row]:
        """All controls and their means over subjects, by subject."""
        wanted = list(CONTROL_LABELS)
        rows = [row for row in self._every_row if not row.point.is_plain]
        return sorted(rows, key=lambda row: (row.subject, wanted.index(row.point.control)))

    @cached_property
    def _every_row(self) -> list[Row]:
        entries = [entry for name in ("points", "controls", "averages") for entry in self.metrics.get(name, [])]
        method = self.config["score"]["method"] if self.is_given else ""
        folders: dict[tuple[int, Point], tuple[Point, str]] = {}
        for entry in entries:
            if "folder" in entry:
                point = Point.of(entry)
                folders.setdefault((entry["subject"], point), (point, entry["folder"]))
                folders.setdefault((entry["subject"], point.without_seed), (point, entry["folder"]))
        rows = []
        for entry in entries:
            point, subject = Point.of(entry), int(entry["subject"])
            key = (subject, point.without_seed if point.is_seed_mean else point)
            shown, folder = folders.get(key, (point, ""))
            label = point_label(point, method)
            groups = entry.get("groups", {})
            rows.append(Row(subject, point, label, shown, self.run_dir / folder, entry["metrics"], groups))
        return sorted(rows, key=lambda row: (row.subject, row.point.order))

    @property
    def group_names(self) -> list[str]:
        """Named groups of images that are reported apart, in order."""
        return list(dict.fromkeys(name for row in (*self.rows, *self.controls) for name in row.groups))

    @property
    def blocks(self) -> list[int]:
        """Subjects as tables have them: the mean over all of them first, where there are several."""
        return sorted({row.subject for row in self.rows})

    @property
    def subjects(self) -> list[int]:
        """Subjects, ascending."""
        return [subject for subject in self.blocks if subject != ALL_SUBJECTS]

    def subject_label(self, subject: int) -> str:
        """Return a subject, or the mean over all of them, in words."""
        if subject == ALL_SUBJECTS:
            return f"Mean of subjects {', '.join(map(str, self.subjects))}"
        name = self.metrics.get("subject_names", {}).get(str(subject), "")
        return f"Subject {subject}{f' ({name})' if name else ''}"

    @property
    def shown_metrics(self) -> list[Metric]:
        """Metrics that any point or control has, in the paper's order."""
        rows = [*self.rows, *self.controls]
        directions = {name: bool(item["higher_is_better"]) for row in rows for name, item in row.metrics.items()}
        return [metric_of(name, directions[name]) for name in ordered(directions)]

    def rows_of(self, subject: int) -> list[Row]:
        """Return the points of a subject; of points with several seeds the mean comes first."""
        rows = [row for row in self.rows if row.subject == subject]
        return sorted(rows, key=lambda row: not row.point.is_seed_mean)

    def controls_of(self, subject: int) -> list[Row]:
        """Return the controls of a subject: chance, the nearest training image, the ceiling."""
        return [row for row in self.controls if row.subject == subject]

    def unguided(self, subject: int) -> Row | None:
        """Return the point without guidance, None where it was not evaluated."""
        return next((row for row in self.rows_of(subject) if not row.point.is_guided), None)

    def guided(self, subject: int) -> Row | None:
        """Return the main guided point; None where none is guided.

        It is the one that was chosen on training images, else the recipe's, else the first.
        """
        rows = [row for row in self.rows_of(subject) if row.point.is_guided]
        wanted = [self.chosen, self.recipe]
        found = (row for point in wanted for row in rows if row.point.without_seed == point)
        return next(found, rows[0] if rows else None)

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
        sampler = self.config.get("sampler", {})
        return Point(float(sampler.get("kappa", -1.0)), float(sampler.get("eta", -1.0)))

    def main_rows(self, subject: int) -> list[Row]:
        """Return the rows that stand first in a table: without guidance, and the main guided point."""
        return [row for row in (self.unguided(subject), self.guided(subject)) if row is not None]

    def pictured_rows(self, subject: int) -> list[Row]:
        """Return the rows whose pictures are shown: the main ones, and a ridge regression's beside them."""
        return self.main_rows(subject) + [row for row in self.controls_of(subject) if row.point.control == "ridge"]

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

        Of two-way identification it is the share of distractors that the image's reconstructions beat.
        """
        folder = Layout(self.run_dir, self.metrics["protocol"]).score(row.shown, row.subject)
        record = read_record(folder)
        arrays = read_tensors(folder / ARRAYS) if record else {}
        if WINS + metric in arrays:
            won = arrays[WINS + metric].sum(dim=0).double()
            total = float(won.mean()) / row.metrics[metric]["value"] if float(won.sum()) else 1.0
            values = (won / total).tolist()
        elif EACH + metric in arrays:
            values = arrays[EACH + metric].tolist()
        else:
            return {}
        return dict(zip(record["image_ids"], values, strict=True))

    @cached_property
    def _events(self) -> list[dict[str, Any]]:
        return list(read_events(events_path(self.run_dir, 0)))

    def losses(self) -> dict[int, Curve]:
        """Return stage -> (steps, losses) from rank 0's events; a step repeated after a resume counts once."""
        return self._curves("train_step", lambda event: event.get("loss"))

    def validations(self, name: str) -> dict[int, Curve]:
        """Return stage -> (steps, values) of what validations measured: ``loss``, or top-1 of all targets' mean."""

        def value(event: dict[str, Any]) -> float | None:
            found = [number for key, number in event["values"].items() if key.rpartition("/")[2] == name]
            return math.fsum(found) / len(found) if found else None

        return self._curves("validation", value)

    def _curves(self, kind: str, value: Any) -> dict[int, Curve]:
        stages: dict[int, dict[int, float]] = {}
        for event in self._events:
            if event.get("event") == kind:
                number = value(event)
                if isinstance(number, int | float) and math.isfinite(number):
                    stages.setdefault(int(event["stage"]), {})[int(event["step"])] = float(number)
        return {
            stage: (sorted(by_step), [by_step[step] for step in sorted(by_step)])
            for stage, by_step in sorted(stages.items())
        }

    def work(self) -> list[dict[str, Any]]:
        """Return what each rank of each launch did: its host, and busy seconds by phase."""
        folder = Layout(self.run_dir, self.metrics["protocol"]).ranks
        return [read_json(path) for path in sorted(folder.glob("*/rank-*.json"))]
