"""One line of the conformance table, and the arrays it comes from."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.errors import DataError

NOT_CHECKED = "not checked"
CANNOT_RUN = "cannot be run"

# Largest absolute difference over the largest absolute reference value.
DOUBLE = 1e-6
"""References in float64: latents, noise predictions, losses, gradients, activations."""
DOUBLE_IMAGE = 1e-5
"""Images of float64 references are stored in float32."""
SINGLE = 1e-4
"""References in float32: two float32 runs differ by the order of their sums."""


@dataclass(frozen=True)
class Row:
    """One quantity of one case.

    Args:
        case_file: Name of the case's file.
        quantity: What was compared.
        error: Largest absolute difference over the largest absolute reference value; NaN if nothing was compared.
        tolerance: Largest error that holds.
        ok: Whether it holds; also true where nothing was compared, which the note says.
        note: What else there is to say.
    """

    case_file: str
    quantity: str
    error: float
    tolerance: float
    ok: bool
    note: str = ""

    @property
    def is_remark(self) -> bool:
        """Whether the row only says that something was left out."""
        return self.quantity == NOT_CHECKED


def compare(case_file: str, quantity: str, ours: object, reference: object, tolerance: float, note: str = "") -> Row:
    """Return the row of one quantity; shapes must agree up to axes of length 1."""
    ours_array, reference_array = _array(ours), _array(reference)
    if ours_array.squeeze().shape != reference_array.squeeze().shape:
        shapes = f"shapes differ: {ours_array.shape} here, {reference_array.shape} in the case"
        return Row(case_file, quantity, math.inf, tolerance, False, shapes)
    difference = np.abs(ours_array.squeeze() - reference_array.squeeze()).max(initial=0.0)
    scale = np.abs(reference_array).max(initial=0.0)
    error = float(difference / scale) if scale > 0 else float(difference)
    return Row(case_file, quantity, error, tolerance, error <= tolerance, note)  # NaN compares false: it fails


def not_checked(case_file: str, what: str) -> Row:
    """Return a row that says that something was left out."""
    return Row(case_file, NOT_CHECKED, math.nan, math.nan, True, what)


def isolated(case_file: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield a case's rows; a case that cannot be run becomes a row that fails and says why, and the others go on.

    A foreign file may break any assumption (a key, a shape, a damaged member), so the errors of reading, indexing and
    torch's shape checks are all taken for the case's own.
    """
    try:
        yield from rows
    except (ValueError, LookupError, RuntimeError, TypeError, OSError) as error:
        said = " ".join(str(error).split())
        yield Row(case_file, CANNOT_RUN, math.nan, math.nan, False, f"{type(error).__name__}: {said}")


def _array(values: object) -> npt.NDArray[np.float64]:
    plain = values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else values
    return np.asarray(plain, dtype=np.float64)


class Case:
    """The arrays of one ``.npz``; it remembers which were looked at, so that none is passed over in silence.

    Args:
        path: The file.

    Raises:
        DataError: the file cannot be read (pickled objects are not).
    """

    def __init__(self, path: Path) -> None:
        self.file = path.name
        try:
            with np.load(path, allow_pickle=False) as content:
                self._arrays = {name: content[name] for name in content.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError("A reference case could not be read.", where=str(path), found=str(error)) from error
        self._unread = set(self._arrays)

    def __contains__(self, name: str) -> bool:
        """Return whether the case holds an array."""
        return name in self._arrays

    def __getitem__(self, name: str) -> npt.NDArray[Any]:  # Any: cases hold floats, integers and bytes
        """Return an array.

        Raises:
            DataError: the case lacks it.
        """
        if name not in self._arrays:
            found = ", ".join(sorted(self.names))
            raise DataError("A reference case lacks an array.", where=self.file, expected=name, found=found)
        self._unread.discard(name)
        array: npt.NDArray[Any] = self._arrays[name]
        return array

    def has(self, *names: str) -> bool:
        """Return whether the case holds all of these arrays."""
        return all(name in self._arrays for name in names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arrays."""
        return tuple(self._arrays)

    def mark_read(self, *names: str) -> None:
        """Say that arrays were seen which hold nothing to compare."""
        self._unread -= set(names)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return an array as a tensor."""
        return torch.from_numpy(np.array(self[name])).to(dtype)

    def left_over(self) -> Iterator[Row]:
        """Yield one row that names the arrays that nobody looked at, if there are any."""
        if self._unread:
            yield not_checked(self.file, f"arrays {', '.join(sorted(self._unread))}")
