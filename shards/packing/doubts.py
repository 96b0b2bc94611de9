"""What cannot be real data: constant or equal trials, a session with many dead voxels, pictures of one colour.

A copy that broke off has the right size and header where the space was reserved first, and zeros at its end; a file
that was delivered twice stands under two names. Neither is packed unless ``data.accept`` names it.

A doubt is text, ``KIND SAMPLE``, the same when packed and when verified. Shape suffixes: T trials, V voxels, N
pictures, H, W, C.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from shards.format.codec import checksum, image_key
from shards.packing.normalize import invalid_voxels

CONSTANT_TRIALS, EQUAL_TRIALS = "constant-trials", "equal-trials"
CONSTANT_VOXELS, CONSTANT_PICTURES = "constant-voxels", "constant-pictures"
MOST_INVALID = 0.1
"""Share of a session's voxels that may be constant or not finite; NSD has far fewer."""
MOST_ZEROS = 0.5
"""Share of the other voxels that may be exactly zero in a trial."""
WORDS = {
    CONSTANT_TRIALS: "constant, or zero in most voxels",
    EQUAL_TRIALS: "the same as another trial, voxel by voxel",
    CONSTANT_VOXELS: f"more than {MOST_INVALID:.0%} of the voxels are constant or not finite",
    CONSTANT_PICTURES: "of a single colour",
}
_MAX_NAMED = 5


def trial_name(subject: int, session: int, trial: int) -> str:
    """Return how a trial is named: the beginning of its sample key."""
    return f"s{subject:02d}_e{session:02d}_t{trial:05d}"


def session_name(subject: int, session: int) -> str:
    """Return how a session is named."""
    return f"s{subject:02d}_e{session:02d}"


def session_doubts(
    betas_TV: npt.NDArray[np.float32], raw_T: npt.NDArray[np.uint64], trials: Sequence[str], session: str
) -> list[str]:
    """Return what cannot be real in a session's betas.

    Args:
        betas_TV: All its trials.
        raw_T: Their checksums.
        trials: (T,) their names.
        session: Its name.
    """
    is_invalid = invalid_voxels(betas_TV)
    is_constant = (betas_TV == betas_TV[:, :1]).all(axis=1) | ~np.isfinite(betas_TV).any(axis=1)
    num_zeros = ((betas_TV == 0) & ~is_invalid).sum(axis=1)
    is_constant |= num_zeros > MOST_ZEROS * np.count_nonzero(~is_invalid)
    doubts = [f"{CONSTANT_TRIALS} {trials[trial]}" for trial in np.flatnonzero(is_constant).tolist()]
    doubts += equal_trials(np.where(is_constant, 0, raw_T), trials)
    return doubts + invalid_doubts(int(is_invalid.sum()), len(is_invalid), session)


def raw_checksums(betas_TV: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """Return the checksum (T,) of every trial's betas."""
    rows = np.ascontiguousarray(betas_TV).view(np.uint8)
    return np.array([checksum(row.data) for row in rows], dtype="<u8")


def equal_trials(checksums: npt.NDArray[np.uint64], trials: Sequence[str]) -> list[str]:
    """Return the trials (T,) whose checksum (T,) an earlier one has; 0 is not known."""
    first = np.unique(checksums, return_index=True)[1]
    is_later = np.ones(len(checksums), dtype=np.bool_)
    is_later[first] = False
    return [f"{EQUAL_TRIALS} {trials[trial]}" for trial in np.flatnonzero(is_later & (checksums != 0)).tolist()]


def invalid_doubts(num_invalid: int, num_voxels: int, session: str) -> list[str]:
    """Return the doubt about a session with many invalid voxels."""
    return [f"{CONSTANT_VOXELS} {session}"] if num_invalid > MOST_INVALID * num_voxels else []


def picture_doubts(pictures_NHWC: npt.NDArray[np.uint8], image_ids: Sequence[int]) -> list[str]:
    """Return the pictures that are of one colour."""
    is_constant = (pictures_NHWC == pictures_NHWC[:, :1, :1]).all(axis=(1, 2, 3))
    return [f"{CONSTANT_PICTURES} {image_key(image_ids[row])}" for row in np.flatnonzero(is_constant).tolist()]


def settle(doubts: Sequence[str], accept: Collection[str], where: str) -> None:
    """Refuse what is doubtful and was not accepted.

    Raises:
        DataError: names every kind and the first samples of it.
    """
    refused = [doubt.split(" ") for doubt in doubts if doubt.split(" ")[0] not in accept]
    if not refused:
        return
    kinds = {kind: [sample for other, sample in refused if other == kind] for kind, _ in refused}
    found = [f"{_named(samples)}: {WORDS[kind]}" for kind, samples in kinds.items()]
    raise DataError(
        "What was read cannot be real data.",
        where=where,
        found="; ".join(found),
        todo="download the file again (a copy that broke off can have its full size, with zeros at the end); "
        f"data.accept=[{','.join(dict.fromkeys([*kinds, *accept]))}] packs it as it is",
    )


def _named(samples: Sequence[str]) -> str:
    """Return the first samples, and how many more there are."""
    more = len(samples) - _MAX_NAMED
    return ", ".join(samples[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
