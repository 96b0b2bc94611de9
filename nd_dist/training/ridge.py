"""Fits a ridge regression of every target on the target subject's voxels: the optimum itself, without steps.

    basis of the voxels (rank 0) -> penalty of a target (rank 0) -> blocks of its columns (all ranks) -> model folder

A sample is an image with the mean of its trials, weighted by their number. The penalty minimises the leave-one-out
error, which has a closed form. A block's file is complete as soon as it is there, so a fit that was killed continues,
and a block's numbers depend on no other: on any number of ranks the files are the same.

Legend of shape suffixes: N images, V voxels, R directions of the basis, D numbers of a target, G penalties.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.checkpoint import FileRecord, read_tensors, write_tensors
from nd_dist.compute.device import rank_device
from nd_dist.config import Config
from nd_dist.errors import DataError, Requeue
from nd_dist.events import EventLog
from nd_dist.files import hash_json, read_json, write_json
from nd_dist.models.ridge import BASIS, BLOCK, KIND, block_name, num_blocks, write_description
from nd_dist.schema import TargetSpec
from nd_dist.training.ranks import gather_objects, on_main
from nd_dist.training.records import MODEL, check_fingerprint, read_done, write_done
from nd_dist.training.source import StageRequest, TrainingSource, stage_specs
from nd_dist.world import World

STAGE = 2
FIT = "fit"
"""Folder of the work beside the model, removed when the fit is finished."""
FACTS = "facts.json"
LEFT = "left.safetensors"
MIN_IMAGES = 3
NULL = 1e-10
"""Directions whose squared singular value is below this share of the largest carry rounding, and are left out."""
MULTIPLES = tuple(np.logspace(-4, 4, 33).tolist())
"""Penalties that are tried, as multiples of the mean squared singular value."""
TRIED_COLUMNS = 512
"""Columns of a target, evenly spaced, on which its penalty is chosen."""


@dataclass(frozen=True)
class Basis:
    """What fitting a target needs of the singular value decomposition of the weighted, centred voxels.

    Args:
        weight_N: Weights of the images; their sum is N.
        left_NR: Left singular vectors.
        values_R: Singular values, descending.
    """

    weight_N: torch.Tensor
    left_NR: torch.Tensor
    values_R: torch.Tensor


@dataclass(frozen=True)
class Penalty:
    """The penalty of a target and its leave-one-out error, as a share of the target's variance."""

    value: float
    error: float


@dataclass(frozen=True)
class Cost:
    """What a fit takes, counted from its sizes.

    Args:
        num_images: Images that are fitted to.
        num_voxels: Voxels of the subject.
        num_numbers: Numbers of all targets together.
        largest: Numbers of the largest target.
        num_targets: How many penalties are chosen.
    """

    num_images: int
    num_voxels: int
    num_numbers: int
    largest: int
    num_targets: int

    @classmethod
    def of(cls, num_images: int, num_voxels: int, specs: Sequence[TargetSpec]) -> Cost:
        """Return the cost of fitting these targets."""
        sizes = [spec.numel for spec in specs]
        return cls(num_images, num_voxels, sum(sizes), max(sizes), len(sizes))

    @property
    def rank(self) -> int:
        """Directions of the basis, at most."""
        return min(self.num_images - 1, self.num_voxels)

    @property
    def operations(self) -> int:
        """Floating point operations of all ranks together."""
        gram = min(self.num_images, self.num_voxels)
        tried = self.num_targets * len(MULTIPLES) * min(self.largest, TRIED_COLUMNS)
        products = self.num_voxels * gram + self.rank * (self.num_numbers + tried)
        return 2 * self.num_images * products + 10 * gram**3

    @property
    def device_bytes(self) -> int:
        """Memory where a rank computes: voxels twice and the decomposition of their Gram matrix, then a block."""
        gram = min(self.num_images, self.num_voxels)
        basis = 8 * (2 * self.num_images * self.num_voxels + 3 * gram**2)
        return max(basis, 8 * (self.num_images + 2 * min(self.largest, BLOCK)) * max(self.num_images, self.rank))

    @property
    def host_bytes(self) -> int:
        """Memory of a rank beside that: one target of all images."""
        return 4 * self.num_images * self.largest

    @property
    def disk_bytes(self) -> int:
        """Size of the model folder."""
        return 4 * self.rank * (self.num_numbers + self.num_voxels)

    def describe(self) -> str:
        """Return the cost in words."""
        return (
            f"ridge regression: {self.num_images} images, {self.num_voxels} voxels, {self.num_numbers} numbers; about "
            f"{self.operations / 1e12:.2g} TFLOP, a rank holds {self.device_bytes / 1e9:.2g} GB where it computes and "
            f"{self.host_bytes / 1e9:.2g} GB of a target, the model takes {self.disk_bytes / 1e9:.2g} GB on disk"
        )


def fit(
    config: Config,
    world: World,
    source: TrainingSource,
    events: EventLog,
    should_stop: Callable[[], bool],
    facts: dict[str, object],
    request: StageRequest,
    folder: Path,
) -> float:
    """Fit all targets and leave the model in a folder, as a trained decoder's; return the leave-one-out error.

    Every rank calls it; called again, it goes on.

    Raises:
        DataError: voxels or targets are not finite, or there are fewer than three images.
        CheckpointError: the run folder holds another recipe's work.
        Requeue: stopped on demand; what is fitted stays.
    """
    (subject,) = request.subjects
    image_ids = source.fit_images(subject, request.sessions)
    specs = stage_specs(config, source)
    device = rank_device(world)
    on_main(partial(_begin, folder, facts))
    on_main(partial(_say_cost, events, len(image_ids), source.num_voxels[subject], specs))
    on_main(partial(_write_basis, folder, source, request, image_ids, device))
    basis = _read_basis(folder, device)
    penalties: dict[str, Penalty] = {}
    files: dict[str, FileRecord] = {}
    dealt, total = 0, sum(map(num_blocks, specs))
    for spec in specs:
        target = Target(spec.name, source, image_ids, basis.weight_N)
        penalty = on_main(partial(_penalty, folder, target, basis, config.decoder.ridge_penalty))
        penalties[spec.name] = penalty
        for index in range((world.rank - dealt) % world.size, num_blocks(spec), world.size):
            if should_stop():
                raise Requeue("Fitting was stopped on request; the same command resumes from here.")
            files[block_name(spec.name, index)] = _fit_block(folder, target, index, basis, penalty)
        dealt += num_blocks(spec)
        events.write("ridge_target", target=spec.name, penalty=penalty.value, loo_error=penalty.error)
        events.write("progress", task="ridge", done=dealt, total=total)
    for part in gather_objects(files):
        files |= part
    on_main(partial(_finish, folder, facts, source.num_voxels[subject], subject, specs, penalties, files))
    return float(np.mean([penalty.error for penalty in penalties.values()]))


def ridge_facts(config: Config, data: Mapping[str, object]) -> dict[str, object]:
    """Return the facts that decide the fit, as flat JSON keys."""
    training = config.training
    return {
        "decoder.kind": KIND,
        "decoder.ridge_penalty": config.decoder.ridge_penalty,
        "training.target_subject": training.target_subject,
        "training.targets": list(training.targets),
        "training.sessions": None if training.sessions is None else list(training.sessions),
        "training.heldout_fraction": training.heldout_fraction,
        "training.int8_targets": training.int8_targets,
        **data,
    }


class Target:
    """One target of the images, read from the source when it is first needed, centred block by block."""

    def __init__(self, name: str, source: TrainingSource, image_ids: Sequence[int], weight_N: torch.Tensor) -> None:
        self.name, self._source, self._image_ids, self._weight_N = name, source, image_ids, weight_N

    @cached_property
    def _values(self) -> npt.NDArray[np.float32]:
        values = self._source.image_targets(self.name, self._image_ids)
        return values.reshape(len(values), -1)

    @property
    def num_columns(self) -> int:
        """Numbers D of the target."""
        return int(self._values.shape[1])

    def columns(self, chosen: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weighted, centred values (N, columns) and their weighted mean, float64, on the basis's device.

        Raises:
            DataError: a value is not finite.
        """
        values = np.ascontiguousarray(self._values[:, chosen])
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise DataError(
                "A target that a ridge regression is fitted to is not finite.",
                where=f"target {self.name}, image {self._image_ids[bad[0]]}",
                found=f"{len(bad)} of {len(values)} images",
                todo="look for the damage with `nd verify`, and pack the target again",
            )
        rows_ND = torch.from_numpy(values).to(self._weight_N.device).double()
        mean_D = (self._weight_N[:, None] * rows_ND).sum(dim=0) / self._weight_N.sum()
        return (rows_ND - mean_D) * self._weight_N.sqrt()[:, None], mean_D


def _begin(folder: Path, facts: dict[str, object]) -> None:
    """Make the folder of the work, or go on in one of the same facts."""
    work = folder / FIT
    if (work / FACTS).exists():
        check_fingerprint(facts, read_json(work / FACTS), folder)
        return
    if read_done(folder) or (folder / MODEL).exists():
        check_fingerprint(facts, read_done(folder).get("fingerprint", {}), folder)
    write_json(work / FACTS, facts)


def _say_cost(events: EventLog, num_images: int, num_voxels: int, specs: Sequence[TargetSpec]) -> None:
    """Say what the fit will take; refuse what cannot be fitted."""
    if num_images < MIN_IMAGES:
        raise DataError(
            "A ridge regression needs more training images.", expected=f"at least {MIN_IMAGES}", found=num_images
        )
    cost = Cost.of(num_images, num_voxels, specs)
    events.write("ridge_cost", images=num_images, operations=cost.operations, disk_bytes=cost.disk_bytes)


def _write_basis(
    folder: Path, source: TrainingSource, request: StageRequest, image_ids: Sequence[int], device: torch.device
) -> None:
    """Decompose the voxels, unless that was done before; the sign of a direction is arbitrary, so it is kept."""
    if (folder / FIT / LEFT).exists():
        return
    (subject,) = request.subjects
    voxels_NV, counts = source.mean_voxels(subject, image_ids, request.sessions)
    bad = np.argwhere(~np.isfinite(voxels_NV))
    if len(bad):
        raise DataError(
            "Voxels that a ridge regression is fitted to are not finite.",
            where=f"subject {subject}, image {image_ids[bad[0][0]]}, voxel {bad[0][1]}",
            found=f"{len(bad)} values",
            todo="look for the damage with `nd verify`, and pack the subject again",
        )
    weight_N = torch.tensor(counts, dtype=torch.float64, device=device)
    basis, mean_V, right_VR = decompose(torch.from_numpy(voxels_NV).to(device), weight_N / weight_N.mean())
    write_tensors(folder / MODEL / BASIS, {"mean": mean_V.float(), "right": right_VR.float()})
    left = {"weight": basis.weight_N, "left": basis.left_NR, "values": basis.values_R}
    write_tensors(folder / FIT / LEFT, left)


def decompose(voxels_NV: torch.Tensor, weight_N: torch.Tensor) -> tuple[Basis, torch.Tensor, torch.Tensor]:
    """Return the basis of voxels, their mean (V,) and right singular vectors (V, R): by the smaller Gram, in float64.

    A voxel that never varies has no share in any direction.
    """
    mean_V = (weight_N[:, None] * voxels_NV).sum(dim=0) / weight_N.sum()
    rows_NV = (voxels_NV.double() - mean_V) * weight_N.sqrt()[:, None]
    is_primal = rows_NV.shape[1] <= rows_NV.shape[0]
    squares, vectors = torch.linalg.eigh(rows_NV.T @ rows_NV if is_primal else rows_NV @ rows_NV.T)
    kept = squares > NULL * squares[-1].clamp(min=1e-30)
    values_R, vectors = squares[kept].flip(0).sqrt(), vectors[:, kept].flip(1)
    others = (rows_NV @ vectors if is_primal else rows_NV.T @ vectors) / values_R
    left_NR, right_VR = (others, vectors) if is_primal else (vectors, others)
    return Basis(weight_N, left_NR, values_R), mean_V, right_VR


def _read_basis(folder: Path, device: torch.device) -> Basis:
    left = {name: value.to(device) for name, value in read_tensors(folder / FIT / LEFT).items()}
    return Basis(left["weight"], left["left"], left["values"])


def _penalty(folder: Path, target: Target, basis: Basis, wanted: float | None) -> Penalty:
    """Return the penalty of a target: the recipe's, or the best one; what was chosen before is kept."""
    path = folder / FIT / f"{target.name}.json"
    if path.exists():
        return Penalty(**read_json(path))
    penalty = choose_penalty(target, basis, wanted)
    write_json(path, {"value": penalty.value, "error": penalty.error})
    return penalty


def choose_penalty(target: Target, basis: Basis, wanted: float | None) -> Penalty:
    """Return the wanted penalty, or the one of the smallest leave-one-out error, with that error."""
    rows_ND, _ = target.columns(slice(None, None, max(1, target.num_columns // TRIED_COLUMNS)))
    mean_square = float(basis.values_R.square().mean()) if len(basis.values_R) else 1.0
    tried = [wanted] if wanted is not None else [multiple * mean_square for multiple in MULTIPLES]
    errors = leave_one_out(basis, rows_ND, tried)
    best = int(np.argmin(errors))
    return Penalty(tried[best], errors[best])


def leave_one_out(basis: Basis, rows_ND: torch.Tensor, penalties: Sequence[float]) -> list[float]:
    """Return the leave-one-out error at each penalty, as a share of the variance; 1 for a target that never varies.

    Args:
        basis: The voxels.
        rows_ND: Weighted, centred target.
        penalties: What is added to the squared singular values.

    Source: the residual of image i in a fit without it is its residual divided by 1 - h_i, h the diagonal of the hat
    matrix, the mean's share included (Allen 1974, PRESS).
    """
    total = float(rows_ND.square().sum())
    scores_RD, mean_share_N = basis.left_NR.T @ rows_ND, basis.weight_N / basis.weight_N.sum()
    errors = []
    for penalty in penalties:
        shrink_R = basis.values_R.square() / (basis.values_R.square() + penalty)
        leverage_N = basis.left_NR.square() @ shrink_R + mean_share_N
        residual_ND = rows_ND - basis.left_NR @ (shrink_R[:, None] * scores_RD)
        left_out_ND = residual_ND / (1.0 - leverage_N).clamp(min=1e-12)[:, None]
        errors.append(float(left_out_ND.square().sum()) / total if total > 0 else 1.0)
    return errors


def _fit_block(folder: Path, target: Target, index: int, basis: Basis, penalty: Penalty) -> FileRecord:
    """Write what each direction adds to a block of a target's columns, unless it is there."""
    path = folder / MODEL / block_name(target.name, index)
    if path.exists():
        return FileRecord.of(path)
    rows_ND, mean_D = target.columns(slice(index * BLOCK, (index + 1) * BLOCK))
    shrink_R = basis.values_R / (basis.values_R.square() + penalty.value)
    weight_RD = shrink_R[:, None] * (basis.left_NR.T @ rows_ND)
    return write_tensors(path, {"weight": weight_RD.float(), "bias": mean_D.float()})


def _finish(
    folder: Path,
    facts: dict[str, object],
    num_voxels: int,
    subject: int,
    specs: Sequence[TargetSpec],
    penalties: dict[str, Penalty],
    files: dict[str, FileRecord],
) -> None:
    """Make the folder a model, say that the stage is finished, and remove the work."""
    model = folder / MODEL
    files = {**files, BASIS: FileRecord.of(model / BASIS)}
    values = {name: penalty.value for name, penalty in penalties.items()}
    write_description(model, subject, num_voxels, specs, values, files)
    errors = [penalty.error for penalty in penalties.values()]
    write_done(folder, facts, 0, float(np.mean(errors)), hash_json({name: of.sha256 for name, of in files.items()}))
    shutil.rmtree(folder / FIT)
