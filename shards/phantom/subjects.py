"""Simulated brains: a grid with an ROI, voxels that respond to pictures, noise, and sessions that drift.

Early voxels pool one map of ``features.early_maps`` in a receptive field; higher voxels mix a random network's
features with what the scene means. A voxel's signal and noise have variances ``nc`` and ``1 - nc`` (its noise
ceiling); every session has its own gain, offset and drift, so that normalising matters.

Shape suffixes: N pictures, V voxels of the ROI, T trials of a session, F features, X, Y, Z the brain grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nd_dist.config import PhantomConfig
from nd_dist.seeds import unit_seed
from shards.phantom.features import MAP_SIDE, PictureFeatures

EARLY_SHARE = 0.45
GRID_SHARE = 5.0  # volumes of the grid for one of the ROI
BAD_SHARE = 0.02  # voxels that are constant, in all sessions or in one
NOISE_RANK, NOISE_RANK_SHARE = 4, 0.15

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Brain:
    """A subject's anatomy; voxels are numbered as ``volume_XYZ[labels > 0]`` numbers them.

    Args:
        labels: (X, Y, Z) ``nsdgeneral``: 1 in the ROI, 0 elsewhere in the cortex, -1 outside.
        is_brain: (X, Y, Z) where betas are not zero.
        is_early: (V,) early voxels; the others are higher ones.
    """

    labels: npt.NDArray[np.int16]
    is_brain: npt.NDArray[np.bool_]
    is_early: npt.NDArray[np.bool_]

    @property
    def num_voxels(self) -> int:
        """Number of voxels V."""
        return len(self.is_early)

    @property
    def grid(self) -> tuple[int, int, int]:
        """The brain grid (X, Y, Z)."""
        size_x, size_y, size_z = self.labels.shape
        return size_x, size_y, size_z


def make_brain(config: PhantomConfig, seed: int, subject: int) -> Brain:
    """Return a subject's anatomy: an ellipsoid with the ROI at its back; size and grid differ between subjects."""
    rng = _rng(seed, "brain", subject)
    num_voxels = round(config.num_voxels * rng.uniform(0.85, 1.15))
    side = (GRID_SHARE * num_voxels) ** (1 / 3)
    grid = (
        round(side) + subject % 2,
        round(side * 1.2) + subject % 3,
        round(side * 0.95) + (subject + 1) % 2,
    )
    axes = [(np.arange(size) + 0.5) / size * 2 - 1 for size in grid]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    is_brain = x**2 + y**2 + z**2 <= 1
    distance = np.where(is_brain, x**2 + (y + 1) ** 2 + (z + 0.2) ** 2, np.inf)
    nearest = np.argsort(distance, axis=None, kind="stable")[:num_voxels]
    labels = np.where(is_brain & (x**2 + y**2 + z**2 > 0.3), 0, -1).astype(np.int16)
    labels.ravel()[nearest] = 1
    rank = np.zeros(labels.size, dtype=np.int64)
    rank[nearest] = np.arange(num_voxels)
    is_early = rank.reshape(grid)[labels > 0] < EARLY_SHARE * num_voxels
    return Brain(labels, is_brain, is_early)


class SimulatedSubject:
    """One subject's voxels.

    Args:
        config: Counts and noise ceiling.
        seed: Seed of the phantom.
        subject: Subject id, 1-based.
        features: What all pictures are.
        seen: (K,) image ids that the subject's design holds; their responses have mean 0 and variance 1.
    """

    def __init__(
        self, config: PhantomConfig, seed: int, subject: int, features: PictureFeatures, seen: npt.NDArray[np.int64]
    ) -> None:
        self._seed, self._subject = seed, subject
        self.brain = make_brain(config, seed, subject)
        rng = _rng(seed, "voxels", subject)
        num_voxels = self.brain.num_voxels
        self.noise_ceiling_V = config.noise_ceiling * rng.beta(3, 1.5, num_voxels)
        self._percent_V = rng.uniform(0.7, 2.0, num_voxels)
        self._noise_basis = rng.standard_normal((NOISE_RANK, num_voxels)) / np.sqrt(NOISE_RANK)
        num_bad = max(2, round(BAD_SHARE * num_voxels))
        bad = rng.permutation(num_voxels)[:num_bad]
        self.dead = np.sort(bad[: num_bad // 2])
        """Voxels that are constant in every session."""
        self.edge = np.sort(bad[num_bad // 2 :])
        """Voxels that are constant in one session, ``edge_session``."""
        self.edge_session = int(rng.integers(1, config.num_sessions + 1))
        self._response_NV = np.zeros((len(features.scene), num_voxels), dtype=np.float32)
        is_early = self.brain.is_early
        self._response_NV[:, is_early] = _early(features, seen, int(is_early.sum()), rng)
        self._response_NV[:, ~is_early] = _higher(features, seen, int((~is_early).sum()), rng)

    @property
    def ncsnr(self) -> npt.NDArray[np.float64]:
        """(V,) signal's over noise's standard deviation, NaN where it is constant."""
        ncsnr = np.sqrt(self.noise_ceiling_V / np.maximum(1 - self.noise_ceiling_V, 1e-3))
        ncsnr[self.dead] = np.nan
        return ncsnr

    def betas(self, session: int, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return one session's betas (T, V) in percent signal change.

        Args:
            session: 1-based session.
            image_ids: (T,) pictures of its trials.
        """
        rng = _rng(self._seed, "session", self._subject, session)
        num_trials, num_voxels = len(image_ids), self.brain.num_voxels
        noise_TV = np.sqrt(1 - NOISE_RANK_SHARE) * rng.standard_normal((num_trials, num_voxels))
        noise_TV += np.sqrt(NOISE_RANK_SHARE) * rng.standard_normal((num_trials, NOISE_RANK)) @ self._noise_basis
        signal_TV = np.sqrt(self.noise_ceiling_V) * self._response_NV[image_ids]
        values_TV = signal_TV + np.sqrt(1 - self.noise_ceiling_V) * noise_TV
        gain_V = np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.15, num_voxels))
        offset_V = rng.normal(0, 0.6) + rng.normal(0, 0.4, num_voxels)
        drift_T = np.linspace(-0.5, 0.5, num_trials)[:, None]
        betas_TV = self._percent_V * (gain_V * values_TV + offset_V + 0.3 * rng.normal(0, 1, num_voxels) * drift_T)
        betas_TV[:, self.dead] = 0
        if session == self.edge_session:
            betas_TV[:, self.edge] = 0
        return np.asarray(betas_TV)

    def volumes(self, session: int, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int16]:
        """Return one session's betas as NSD stores them: (X, Y, Z, T) int16, percent signal change x 300."""
        rng = _rng(self._seed, "outside", self._subject, session)
        brain = self.brain
        volumes_XYZT = np.zeros((*brain.grid, len(image_ids)), dtype=np.int16)
        num_brain = int(brain.is_brain.sum())
        volumes_XYZT[brain.is_brain] = np.rint(rng.normal(0, 300, (num_brain, len(image_ids))))
        stored_TV = np.clip(np.rint(self.betas(session, image_ids) * 300), -32768, 32767)
        volumes_XYZT[brain.labels > 0] = stored_TV.T
        return volumes_XYZT


def _early(
    features: PictureFeatures, seen: npt.NDArray[np.int64], num_voxels: int, rng: np.random.Generator
) -> Floats:
    """Return responses (N, V): one map each, pooled in a Gaussian receptive field."""
    count, num_maps, _ = features.early.shape
    centre_x, centre_y = rng.uniform(0.5, MAP_SIDE - 1.5, (2, num_voxels))
    radius = rng.uniform(0.8, 2.2, num_voxels)
    rows, columns = np.divmod(np.arange(MAP_SIDE**2)[:, None], MAP_SIDE)
    squared = (columns - centre_x) ** 2 + (rows - centre_y) ** 2
    field_SV = np.exp(-squared / (2 * radius**2)).astype(np.float32)
    map_of_voxel = np.concatenate([rng.permutation(num_maps) for _ in range(-(-num_voxels // num_maps))])[:num_voxels]
    response_NV = np.empty((count, num_voxels), dtype=np.float32)
    for index in range(num_maps):
        chosen = np.flatnonzero(map_of_voxel == index)
        response_NV[:, chosen] = features.early[:, index] @ field_SV[:, chosen]
    return _standardise(response_NV, seen)


def _higher(
    features: PictureFeatures, seen: npt.NDArray[np.int64], num_voxels: int, rng: np.random.Generator
) -> Floats:
    """Return responses (N, V): every voxel its own mixture of network features and meaning."""
    parts = []
    for values_NF in (features.network, features.scene):
        scaled_NF = _standardise(values_NF, seen)
        weights_FV = rng.standard_normal((values_NF.shape[1], num_voxels)).astype(np.float32)
        parts.append(_standardise(scaled_NF @ weights_FV, seen))
    share_V = rng.uniform(0.2, 0.8, num_voxels).astype(np.float32)
    return _standardise(np.sqrt(share_V) * parts[0] + np.sqrt(1 - share_V) * parts[1], seen)


def _standardise(values: npt.NDArray[np.floating], seen: npt.NDArray[np.int64]) -> Floats:
    """Return columns with mean 0 and variance 1 over the rows ``seen``."""
    chosen = values[seen]
    return np.asarray((values - chosen.mean(axis=0)) / np.maximum(chosen.std(axis=0), 1e-6), dtype=np.float32)


def _rng(seed: int, *words: int | str) -> np.random.Generator:
    """Return the generator of a named part of a phantom."""
    return np.random.Generator(np.random.PCG64(unit_seed(seed, *words)))
