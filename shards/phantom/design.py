"""Who sees which picture when, in NSD's scheme: one order of indices for all, first indices shared by all subjects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nd_dist.config import PhantomConfig
from nd_dist.errors import ConfigError
from nd_dist.seeds import unit_seed

NUM_REPEATS = 3
MAX_RUNS = 12  # NSD: 12 runs of 62 or 63 trials, 75 slots each
BLANK_SLOTS = 12


@dataclass(frozen=True)
class PhantomDesign:
    """The design of a phantom; every id is 0-based.

    Args:
        order: (T,) index of the picture of every trial into a subject's list of pictures; below ``num_shared`` the
            picture is one that all subjects see.
        subject_images: (subjects, pictures of a subject) image ids.
        num_shared: Shared pictures.
        run_trials: Trials in every run of a session.
        num_sessions: Sessions of each subject.
    """

    order: npt.NDArray[np.int64]
    subject_images: npt.NDArray[np.int64]
    num_shared: int
    run_trials: tuple[int, ...]
    num_sessions: tuple[int, ...]

    @property
    def trials_per_session(self) -> int:
        """Trials in a session."""
        return sum(self.run_trials)

    @property
    def num_images(self) -> int:
        """Number of different pictures of all subjects."""
        num_subjects, per_subject = self.subject_images.shape
        return int(self.num_shared + num_subjects * (per_subject - self.num_shared))

    def images(self, subject: int) -> npt.NDArray[np.int64]:
        """Return the image id of every trial that a subject (1-based) really had."""
        num_trials = self.num_sessions[subject - 1] * self.trials_per_session
        return np.asarray(self.subject_images[subject - 1, self.order[:num_trials]])


def count_images(config: PhantomConfig) -> int:
    """Return how many different pictures a phantom of these settings shows.

    Raises:
        ConfigError: the trials leave no room for pictures that are not shared.
    """
    per_subject = -(-config.num_sessions * config.trials_per_session // NUM_REPEATS)
    if per_subject <= config.num_shared:
        raise ConfigError(
            "A phantom needs pictures beyond the shared ones.",
            where="phantom.num_shared",
            expected=f"fewer than {per_subject}, which is sessions x trials / {NUM_REPEATS}",
            found=config.num_shared,
        )
    return config.num_shared + config.num_subjects * (per_subject - config.num_shared)


def make_design(config: PhantomConfig, seed: int, shared_ids: tuple[int, ...]) -> PhantomDesign:
    """Return the design of a phantom.

    The last subject but one lacks the last quarter of the sessions, and the order sees to it that this subject never
    saw the first shared picture and saw the second one once, as happens in NSD.

    Args:
        config: Counts.
        seed: Seed of the phantom.
        shared_ids: Image ids of the test pictures.
    """
    rng = np.random.Generator(np.random.PCG64(unit_seed(seed, "design")))
    num_trials = config.num_sessions * config.trials_per_session
    per_subject = -(-num_trials // NUM_REPEATS)
    order = rng.permutation(np.repeat(np.arange(per_subject), NUM_REPEATS)[:num_trials])
    num_kept = config.num_sessions - max(1, config.num_sessions // 4)
    num_sessions = [config.num_sessions] * config.num_subjects
    if config.num_subjects > 1:
        num_sessions[-2] = num_kept
        cut = num_kept * config.trials_per_session
        for index, num_before in ((0, 0), (1, 1)):
            _push_behind(order, index, num_before, cut, config.num_shared)
    own_ids = rng.permutation(np.setdiff1d(np.arange(count_images(config)), shared_ids))
    own = own_ids.reshape(config.num_subjects, per_subject - config.num_shared)
    shared = np.tile(np.array(shared_ids, dtype=np.int64), (config.num_subjects, 1))
    num_runs = max(1, min(MAX_RUNS, config.trials_per_session // 5))
    run_trials = tuple(len(part) for part in np.array_split(np.arange(config.trials_per_session), num_runs))
    return PhantomDesign(order, np.hstack([shared, own]), config.num_shared, run_trials, tuple(num_sessions))


def _push_behind(order: npt.NDArray[np.int64], index: int, num_before: int, cut: int, num_shared: int) -> None:
    """Swap trials so that only ``num_before`` trials of picture ``index`` lie before ``cut``, where there is room."""
    if index >= num_shared:
        return
    early = np.flatnonzero(order[:cut] == index)[num_before:]
    late = cut + np.flatnonzero(order[cut:] >= num_shared)
    for here, there in zip(early, late, strict=False):
        order[here], order[there] = order[there], order[here]
