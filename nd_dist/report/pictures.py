"""Pictures of the report's page: rows of repeats, the grid over kappa and eta, the best and the worst images."""

from __future__ import annotations

from dataclasses import dataclass

from nd_dist.metrics.table import Metric, metric_of, ordered
from nd_dist.report.findings import Findings, Row
from nd_dist.report.thumbnails import data_uri

MAX_PICTURE_ROWS = 12
MAX_REPEATS = 5
MAX_GRIDS = 2
NUM_EXTREMES = 4
GRID_SIDE = 128


@dataclass(frozen=True)
class PictureRow:
    """One image: what was seen, and its reconstructions."""

    image_id: int
    original: str
    unguided: list[str]
    guided: list[str]
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Picture rows of one subject."""

    subject: int
    unguided_label: str
    guided_label: str
    rows: list[PictureRow]
    num_images: int = 0


def gallery(findings: Findings, subject: int) -> Gallery:
    """Return images spread evenly over all of a subject's (not chosen by quality), all repeats of each."""
    ids = findings.image_ids(subject)
    most = max(4, MAX_PICTURE_ROWS // len(findings.subjects))
    return _gallery(findings, subject, dict.fromkeys(_spread(ids, most), ""), MAX_REPEATS)


def _spread(ids: list[int], most: int) -> list[int]:
    """Return at most ``most`` of the images, evenly spread."""
    count = min(most, len(ids))
    return [ids[position * len(ids) // count] for position in range(count)]


@dataclass(frozen=True)
class Extremes:
    """The best and the worst images of a subject by one metric."""

    subject: int
    metric: Metric
    best: Gallery
    worst: Gallery


def extremes(findings: Findings, subject: int) -> list[Extremes]:
    """Return best and worst images by PixCorr and by the last two-way metric; none where images are too few."""
    shown = findings.guided(subject) or findings.unguided(subject)
    if shown is None:
        return []
    two_way = [name for name in ordered(shown.metrics) if metric_of(name).chance == 0.5]
    found = []
    for name in ["pixcorr", *two_way[-1:]]:
        values = findings.values(shown, name)
        if len(values) < 2 * NUM_EXTREMES:
            continue
        metric = metric_of(name)
        ranked = sorted(values, key=lambda image_id: (-values[image_id], image_id))
        beaten = max(1, (len(values) - 1) * (len(findings.repeats(shown, ranked[0])) or 1))
        scale = 1.0 if name == "pixcorr" else 1.0 / beaten
        notes = {image_id: f"{metric.label} {metric.text(scale * values[image_id])}" for image_id in ranked}
        best = {image_id: notes[image_id] for image_id in ranked[:NUM_EXTREMES]}
        worst = {image_id: notes[image_id] for image_id in ranked[: -NUM_EXTREMES - 1 : -1]}
        galleries = [_gallery(findings, subject, chosen, 1) for chosen in (best, worst)]
        found.append(Extremes(subject, metric, *galleries))
    return found


def _gallery(findings: Findings, subject: int, notes: dict[int, str], max_repeats: int) -> Gallery:
    guided, unguided = findings.guided(subject), findings.unguided(subject)

    def pictures(row: Row | None, image_id: int) -> list[str]:
        return [data_uri(path) for path in findings.repeats(row, image_id)[:max_repeats]] if row else []

    rows = [
        PictureRow(
            image_id,
            data_uri(findings.original(image_id)),
            pictures(unguided, image_id),
            pictures(guided, image_id),
            note,
        )
        for image_id, note in notes.items()
    ]
    return Gallery(
        subject,
        unguided.label if unguided else "",
        guided.label if guided else "",
        rows,
        len(findings.image_ids(subject)),
    )


@dataclass(frozen=True)
class PictureGrid:
    """One image over kappa and eta, as the paper shows it.

    Args:
        subject: Whose brain.
        image_id: The image.
        original: What was seen.
        unguided: Its reconstruction without guidance; empty where there is none.
        kappas: Row labels, most guidance first.
        etas: Column labels.
        cells: Rows of pictures, empty where a point was not evaluated.
    """

    subject: int
    image_id: int
    original: str
    unguided: str
    kappas: list[str]
    etas: list[str]
    cells: list[list[str]]


def picture_grids(findings: Findings, subject: int) -> list[PictureGrid]:
    """Return the grid of first repeats for a few images, where at least two kappas or etas were evaluated."""
    rows = {row.point: row for row in findings.rows_of(subject) if row.point.is_guided and not row.point.settings}
    kappas = sorted({point.kappa for point in rows}, reverse=True)
    etas = sorted({point.eta for point in rows})
    if len(rows) < 2:
        return []
    unguided = findings.unguided(subject)
    by_place = {(point.kappa, point.eta): row for point, row in rows.items()}

    def picture(row: Row | None, image_id: int) -> str:
        paths = findings.repeats(row, image_id) if row is not None else []
        return data_uri(paths[0], GRID_SIDE) if paths else ""

    return [
        PictureGrid(
            subject,
            image_id,
            data_uri(findings.original(image_id), GRID_SIDE),
            picture(unguided, image_id),
            [f"κ {kappa:g}" for kappa in kappas],
            [f"η {eta:g}" for eta in etas],
            [[picture(by_place.get((kappa, eta)), image_id) for eta in etas] for kappa in kappas],
        )
        for image_id in _spread(findings.image_ids(subject), MAX_GRIDS)
    ]
