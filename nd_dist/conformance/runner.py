"""Runs every family of reference cases that a folder holds. Which cases exist is the folder's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nd_dist.conformance import guidance_cases, loss_cases, metric_cases, model_cases, sampler_cases
from nd_dist.conformance.rows import NOT_CHECKED, Row, isolated, not_checked
from nd_dist.conformance.sampler_index import INDEX_PATTERN
from nd_dist.errors import DataError


@dataclass(frozen=True)
class Family:
    """One kind of reference cases.

    Args:
        folder: Sub-folder that holds them.
        check: Yields the rows of the sub-folder's cases.
        supporting: Files of the sub-folder that are no cases: lists, inputs, weights (glob patterns).
    """

    folder: str
    check: Callable[[Path], Iterator[Row]]
    supporting: tuple[str, ...] = ()


FAMILIES = (
    Family("sampler", sampler_cases.check, (INDEX_PATTERN, "checks.json", "inputs*.npz")),
    Family("guidance", guidance_cases.check),
    Family("models", model_cases.check, ("configs.json", "*.safetensors")),
    Family("losses", loss_cases.check),
    Family("metrics", metric_cases.check),
)
SUPPORTING = ("README*", "weights/*")


def run_conformance(directory: Path) -> list[Row]:
    """Return one row per case and quantity of a folder of reference cases; files that no family knows get a row too.

    A case that cannot be run (damaged, weights missing, settings unknown) is a row that fails; the others go on.
    Everything runs on one thread: on networks this small more threads only wait for each other.

    Args:
        directory: Folder with any of the sub-folders ``sampler``, ``guidance``, ``models``, ``losses``, ``metrics``,
            and ``weights`` where sampler or guidance cases need it.

    Raises:
        DataError: the folder does not exist or holds no case.
    """
    if not directory.is_dir():
        raise DataError("The folder of reference cases does not exist.", where=str(directory))
    rows: list[Row] = []
    with _one_thread():
        for family in FAMILIES:
            if (directory / family.folder).is_dir():
                rows += isolated(f"{family.folder}/", family.check(directory / family.folder))
    if not any(row.quantity != NOT_CHECKED for row in rows):
        raise DataError(
            "The folder holds no reference case that is known here.",
            where=str(directory),
            expected=f"sub-folders {', '.join(family.folder for family in FAMILIES)}",
            found=sorted(path.name for path in directory.iterdir()),
        )
    return rows + [not_checked(name, "no checker knows this file") for name in _unknown_files(directory, rows)]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unknown_files(directory: Path, rows: list[Row]) -> list[str]:
    seen = {row.case_file for row in rows}
    supporting = [*SUPPORTING]
    supporting += [f"{family.folder}/{pattern}" for family in FAMILIES for pattern in family.supporting]
    known = {path for pattern in supporting for path in directory.glob(pattern)}
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [str(path.relative_to(directory)) for path in files if path not in known and path.name not in seen]
