"""Pictures of the report's page: rows of repeats, the grid over kappa and eta, the best and the worst, all of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from nd_dist.errors import DataError
from nd_dist.report.findings import Findings, Row
from nd_dist.report.tables import headline_metrics

MAX_PICTURE_ROWS = 12
MAX_REPEATS = 5
MAX_GRIDS = 2
NUM_EXTREMES = 4
GRID_SIDE = 128
MAX_SIDE = 192
WEBP_QUALITY = 82


@dataclass(frozen=True)
class Case:
    """One image: what was seen, its reconstructions by label, and a note."""

    image_id: int
    original: str
    groups: list[tuple[str, list[str]]]
    note: str = ""

    @property
    def columns(self) -> int:
        """How many pictures stand in a line."""
        return 1 + sum(len(pictures) for _, pictures in self.groups)


@dataclass(frozen=True)
class Gallery:
    """Images of one subject under a title."""

    title: str
    cases: list[Case]


def galleries(findings: Findings) -> list[Gallery]:
    """Return images of each subject spread evenly over all (not chosen by quality), all repeats of each."""
    most = max(4, MAX_PICTURE_ROWS // len(findings.subjects))
    found = []
    for subject in findings.subjects:
        notes = dict.fromkeys(spread(findings.image_ids(subject), most), "")
        found.append(Gallery(findings.subject_label(subject), cases_of(findings, subject, notes, MAX_REPEATS)))
    return found


def spread(ids: list[int], most: int) -> list[int]:
    """Return at most ``most`` of the images, evenly spread."""
    count = min(most, len(ids))
    return [ids[position * len(ids) // count] for position in range(count)]


def extremes(findings: Findings) -> list[Gallery]:
    """Return best and worst images by PixCorr and by the last two-way metric; none where images are too few."""
    metrics = headline_metrics(findings)
    two_way = [metric for metric in metrics if metric.chance == 0.5]
    found = []
    for subject in findings.subjects:
        shown = findings.guided(subject) or findings.unguided(subject)
        for metric in [metric for metric in metrics if metric.name == "pixcorr"] + two_way[-1:]:
            values = findings.values(shown, metric.name) if shown else {}
            if len(values) < 2 * NUM_EXTREMES:
                continue
            ranked = sorted(values, key=lambda image_id: (-values[image_id], image_id))
            notes = {image_id: f"{metric.label} {metric.text(values[image_id])}" for image_id in ranked}
            whose = f", subject {subject}" if len(findings.subjects) > 1 else ""
            for word, ids in (("Best", ranked[:NUM_EXTREMES]), ("Worst", ranked[: -NUM_EXTREMES - 1 : -1])):
                cases = cases_of(findings, subject, {image_id: notes[image_id] for image_id in ids}, 1)
                found.append(Gallery(f"{word} by {metric.label}{whose}", cases))
    return found


def all_images(findings: Findings) -> list[Gallery]:
    """Return every image of every subject with its first repeats, as paths from the run's folder."""
    found = []
    for subject in findings.subjects:
        shown = findings.guided(subject) or findings.unguided(subject)
        values = findings.values(shown, "pixcorr") if shown else {}
        notes = {
            image_id: f"PixCorr {values[image_id]:.3f}" if image_id in values else ""
            for image_id in findings.image_ids(subject)
        }
        cases = cases_of(findings, subject, notes, 1, lambda path: path.relative_to(findings.run_dir).as_posix())
        found.append(Gallery(findings.subject_label(subject), cases))
    return found


def cases_of(
    findings: Findings, subject: int, notes: dict[int, str], most: int, show: Callable[[Path], str] | None = None
) -> list[Case]:
    """Return some images of a subject with their first repeats at the main points.

    Args:
        findings: The run.
        subject: Whose brain.
        notes: Image id -> what stands below it.
        most: Repeats of each point.
        show: What stands for a picture's file (none: the picture itself, inlined).
    """
    rows, show = findings.pictured_rows(subject), show or data_uri
    labels = [
        ("without guidance", "with guidance")[row.point.is_guided]
        if row.point.is_plain and not findings.is_given
        else row.label
        for row in rows
    ]
    return [
        Case(
            image_id,
            show(findings.original(image_id)),
            [
                (label, [show(path) for path in findings.repeats(row, image_id)[:most]])
                for label, row in zip(labels, rows, strict=True)
            ],
            note,
        )
        for image_id, note in notes.items()
    ]


@dataclass(frozen=True)
class PictureGrid:
    """One image over kappa and eta, as the paper shows it.

    Args:
        case: What was seen, and its reconstruction without guidance.
        kappas: Row labels, most guidance first.
        etas: Column labels.
        cells: Rows of pictures, empty where a point was not evaluated.
    """

    case: Case
    kappas: list[str]
    etas: list[str]
    cells: list[list[str]]


def picture_grids(findings: Findings) -> list[PictureGrid]:
    """Return the grid of first repeats for a few images of the first subject, where more than one point is guided."""
    ids = spread(findings.image_ids(findings.subjects[0]), MAX_GRIDS)
    return grids_of(findings, ids, partial(data_uri, max_side=GRID_SIDE))


def grids_of(findings: Findings, image_ids: list[int], show: Callable[[Path], str]) -> list[PictureGrid]:
    """Return the grids of some images of the first subject; none where no more than one point is guided."""
    subject = findings.subjects[0]
    rows = {row.point: row for row in findings.rows_of(subject) if row.point.is_guided and not row.point.settings}
    kappas = sorted({point.kappa for point in rows}, reverse=True)
    etas = sorted({point.eta for point in rows})
    if len(rows) < 2:
        return []
    by_place = {(point.kappa, point.eta): row for point, row in rows.items()}
    unguided = findings.unguided(subject)

    def picture(row: Row | None, image_id: int) -> str:
        paths = findings.repeats(row, image_id) if row is not None else []
        return show(paths[0]) if paths else ""

    grids = []
    for image_id in image_ids:
        without = [("without guidance", [picture(unguided, image_id)])] if unguided else []
        case = Case(image_id, show(findings.original(image_id)), without)
        cells = [[picture(by_place.get((kappa, eta)), image_id) for eta in etas] for kappa in kappas]
        grids.append(PictureGrid(case, [f"κ {kappa:g}" for kappa in kappas], [f"η {eta:g}" for eta in etas], cells))
    return grids


def read_picture(path: Path) -> Image.Image:
    """Return a stored picture, RGB.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as stored:
            return stored.convert("RGB")
    except OSError as error:
        raise DataError(
            "A picture of the run is missing or damaged.",
            where=str(path),
            found=str(error),
            todo="run `nd evaluate` with the same recipe again; it computes what is missing",
        ) from error


def data_uri(path: Path, max_side: int = MAX_SIDE) -> str:
    """Return a picture as a data URI: as it is where it is small, scaled down to WebP otherwise.

    Raises:
        DataError: the file is missing or no picture.
    """
    picture = read_picture(path)
    if max(picture.size) <= max_side:
        return _uri("png", path.read_bytes())
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=WEBP_QUALITY)
    return _uri("webp", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
