"""Pictures of a run as files, for papers and READMEs: a strip of reconstructions, the kappa x eta grid, the table.

Which images are shown is a rule, not a choice: the first ids of the first subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nd_dist.files import atomic_path, write_text
from nd_dist.report.findings import Findings, Row
from nd_dist.report.pictures import cases_of, grids_of, read_picture
from nd_dist.report.table_files import main_table

STRIP, GRID, TABLE = "strip.png", "grid.png", "table.md"
NUM_STRIP_IMAGES, NUM_GRID_IMAGES = 8, 2
MAX_REPEATS = 5
SIDE = 64
GAP, EDGE = 10, 2
LINE = 18
FONT_SIZE = 12
COLORS = 256  # a palette halves the files, and the eye does not see it at this size
PAPER, INK = (255, 255, 255), (40, 40, 40)

Tile = Path | str | None  # a picture, words, or nothing


def write_figures(run_dir: Path, out_dir: Path) -> list[Path]:
    """Write ``strip.png``, ``grid.png`` (where a grid was evaluated) and ``table.md``; return what was written.

    Args:
        run_dir: Folder of a run that has been evaluated.
        out_dir: Where to; made where it is missing.

    Raises:
        DataError: there are no metrics yet, or a picture is missing.
    """
    findings = Findings(run_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    figures = {STRIP: strip(findings), GRID: guidance_grid(findings)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            with atomic_path(out_dir / name) as part:
                _with_palette(figure).save(part, format="PNG", optimize=True)
            written.append(out_dir / name)
    write_text(out_dir / TABLE, main_table(findings))
    return [*written, out_dir / TABLE]


def strip(findings: Findings) -> Image.Image:
    """Return one line per image: what was seen, the repeats without guidance, with it, and by ridge regression."""
    subject = findings.subjects[0]
    notes = dict.fromkeys(findings.image_ids(subject)[:NUM_STRIP_IMAGES], "")
    cases = cases_of(findings, subject, notes, MAX_REPEATS, str)
    heads = [["seen"], *([_ascii(row)] for row in findings.pictured_rows(subject))]
    lines = [[[Path(case.original)], *([*map(Path, pictures)] for _, pictures in case.groups)] for case in cases]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return _sheet([heads, *lines], widths)


def guidance_grid(findings: Findings) -> Image.Image | None:
    """Return, for a few images, what was seen and the first repeat over kappa (down) and eta (across)."""
    ids = findings.image_ids(findings.subjects[0])[:NUM_GRID_IMAGES]
    lines: list[list[Sequence[Tile]]] = []
    grids = grids_of(findings, ids, str)
    for grid in grids:
        lines.append([["seen", "kappa 0"], ["", *(eta.replace("η", "eta") for eta in grid.etas)]])
        seen = [Path(grid.case.original), *(_tile(picture) for _, (picture,) in grid.case.groups)]
        for kappa, cells in reversed(list(zip(grid.kappas, grid.cells, strict=True))):
            lines.append([seen, [kappa.replace("κ ", "kappa\n"), *map(_tile, cells)]])
            seen = []
    return _sheet(lines, [2, 1 + len(grids[0].etas)]) if grids else None


def _tile(picture: str) -> Path | None:
    return Path(picture) if picture else None


def _ascii(row: Row) -> str:
    """Return a point in words that every font has."""
    point = row.point
    return (
        f"with guidance (kappa {point.kappa:g}, eta {point.eta:g})"
        if point.is_guided and point.is_plain
        else row.label
    )


def _sheet(lines: Sequence[Sequence[Sequence[Tile]]], widths: Sequence[int]) -> Image.Image:
    """Return tiles on paper.

    Args:
        lines: Line -> block -> tiles; a line of words alone is a heading and as high as a line of text.
        widths: Tiles in each block.
    """
    heights = [LINE if _is_heading(line) else SIDE + EDGE for line in lines]
    starts = [sum(widths[:block]) * (SIDE + EDGE) + block * GAP for block in range(len(widths))]
    size = (starts[-1] + widths[-1] * (SIDE + EDGE) - EDGE, sum(heights) - EDGE)
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for start, block in zip(starts, line, strict=True):
            for position, tile in enumerate(block):
                place = (start + position * (SIDE + EDGE), top)
                if isinstance(tile, Path):
                    sheet.paste(_picture(tile), place)
                elif tile is not None:
                    draw.multiline_text((place[0], place[1] + EDGE), tile, fill=INK, font=font)
        top += height
    return sheet


def _with_palette(sheet: Image.Image) -> Image.Image:
    """Return a sheet with 256 colours: rare ones have their place in the palette, shades between them are dithered."""
    palette = sheet.quantize(COLORS, Image.Quantize.MAXCOVERAGE, kmeans=2)
    return sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _is_heading(line: Sequence[Sequence[Tile]]) -> bool:
    return all(isinstance(tile, str) for block in line for tile in block)


def _picture(path: Path) -> Image.Image:
    """Return a stored picture at the size of a tile."""
    picture = read_picture(path)
    return picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
