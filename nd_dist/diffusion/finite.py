"""Samples that went wrong: named by their unit, and either the run stops or it goes on without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.errors import NdDistError

Policy = Literal["stop", "report"]
PICTURE = "picture"


class NonFiniteSample(NdDistError):
    """A sample's target, gradient, latent or picture holds NaN or infinity."""


@dataclass(frozen=True)
class SampleFailure:
    """One sample that went wrong.

    Args:
        row: Its row in the batch.
        request: Which reconstruction it was.
        what: What was not finite: ``target g04``, ``gradient``, ``latent``, ``picture``.
        timestep: Where it happened; -1 before the first step, and after the last one for pictures.
    """

    row: int
    request: NoiseRequest
    what: str
    timestep: int = -1

    def happened_before(self, timestep: int) -> bool:
        """Return whether it happened in the targets or in a step before that of ``timestep`` (timesteps fall)."""
        return self.timestep > timestep or (self.timestep < 0 and self.what != PICTURE)

    def describe(self) -> dict[str, str | int]:
        """Return the facts for a record (JSON)."""
        return {"repeat": self.request.repeat, "what": self.what, "timestep": self.timestep}

    def error(self) -> NonFiniteSample:
        """Return the error that stops a run."""
        moment = f", timestep {self.timestep}" if self.timestep >= 0 else ""
        return NonFiniteSample(
            f"A reconstruction is not finite: {self.what}{moment}.",
            where=f"image {self.request.image_id}, repeat {self.request.repeat} (seed {self.request.run_seed})",
            expected="finite numbers",
            found=f"NaN or infinity in its {self.what}",
            todo="check this image's targets; else use a smaller kappa, or sampler.dtype=float32 or bfloat16",
        )


class FiniteGuard:
    """Looks for NaN and infinity in every row of a batch; a row that failed is set to zero and remembered.

    What is found on a GPU stays there until ``settle`` reads it: the host does not wait in every step.

    Args:
        requests: The reconstructions, one per row.
        policy: ``stop`` raises at the first failure; ``report`` goes on, rows do not touch each other.
    """

    def __init__(self, requests: Sequence[NoiseRequest], policy: Policy) -> None:
        self._requests, self._policy = requests, policy
        self._failures: dict[int, SampleFailure] = {}
        self._unread: list[tuple[str, int, torch.Tensor]] = []

    @property
    def failures(self) -> tuple[SampleFailure, ...]:
        """The failures so far, by row; of each row only the first."""
        return tuple(self._failures[row] for row in sorted(self._failures))

    def check(self, what: str, values: torch.Tensor, timestep: int = -1) -> torch.Tensor:
        """Return ``values`` (B, ...) with failed rows set to zero.

        Raises:
            NonFiniteSample: the policy is to stop, and a row on the CPU is not finite.
        """
        finite_B = torch.isfinite(values).flatten(1).all(dim=1)
        self._unread.append((what, timestep, finite_B))
        if values.device.type == "cpu":
            self.settle()
            if bool(finite_B.all()):
                return values
        return values.masked_fill(~finite_B.view(-1, *[1] * (values.ndim - 1)), 0.0)

    def settle(self) -> None:
        """Read what was found since the last time.

        Raises:
            NonFiniteSample: the policy is to stop, and a row is not finite.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        finite_KB = torch.stack([finite_B for _, _, finite_B in unread]).cpu()
        for (what, timestep, _), finite_B in zip(unread, finite_KB, strict=True):
            for row in (~finite_B).nonzero().flatten().tolist():
                failure = SampleFailure(row, self._requests[row], what, timestep)
                if self._policy == "stop":
                    raise failure.error()
                self._failures.setdefault(row, failure)

    def check_all(self, tensors: Mapping[str, torch.Tensor], prefix: str = "target ") -> dict[str, torch.Tensor]:
        """Return named tensors, each checked as ``check`` does."""
        return {name: self.check(prefix + name, values) for name, values in tensors.items()}
