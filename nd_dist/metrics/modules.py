"""The metrics as ``torchmetrics.Metric`` classes, for any training loop: update, compute, synchronised over ranks.

They hold what each picture gives, not running sums, so a value is the same on any number of ranks and in any batches.
Legend: B pictures, R repeats, C = 3 channels, H height, W width, D feature values. Pixels are in [0,1].
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from nd_dist.metrics.agreement import repeat_agreement
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.identification import Distractors, correlation_matrix, two_way
from nd_dist.metrics.pixel import Picture, SsimKind, pixel_correlation, structural_similarity
from nd_dist.metrics.retrieval import FIELD_CANDIDATES, FIELD_DRAWS, cosine_matrix, draw_candidates, retrieve
from nd_dist.metrics.statistics.bootstrap import mean_of

Float64 = npt.NDArray[np.float64]


class _MeanOfEach(Metric):  # type: ignore[misc]  # torchmetrics has no types here
    """The mean of one value a picture."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def compute(self) -> Tensor:
        """Return the mean over all pictures, float64."""
        return torch.tensor(mean_of(_joined(self.values)), dtype=torch.float64)


class PixCorr(_MeanOfEach):
    """Pearson correlation of the RGB pixels of each pair; resize first (``nd_dist.pixels.Resize``)."""

    def update(self, recons_BCHW: Tensor, originals_BCHW: Tensor) -> None:
        """Take pairs of pictures."""
        self.values.append(pixel_correlation(recons_BCHW.cpu(), originals_BCHW.cpu()).to(self.device))


class Ssim(_MeanOfEach):
    """SSIM of the grey pictures of each pair.

    Args:
        kind: ``2d``, or ``columns`` as scikit-image computed it up to 0.19.
    """

    def __init__(self, kind: SsimKind = "2d") -> None:
        super().__init__()
        self._kind = kind

    def update(self, recons_BCHW: Tensor, originals_BCHW: Tensor) -> None:
        """Take pairs of pictures."""
        values_B = structural_similarity(recons_BCHW.cpu(), originals_BCHW.cpu(), self._kind)
        self.values.append(values_B.to(self.device))


class RepeatAgreement(_MeanOfEach):
    """Agreement of the repeated reconstructions of a picture.

    Args:
        of: ``pixcorr`` or ``ssim`` of all pairs of repeats.
    """

    def __init__(self, of: Literal["pixcorr", "ssim"] = "pixcorr") -> None:
        super().__init__()
        self._metric = {"pixcorr": Picture.correlation, "ssim": Picture.similarity}[of]

    def update(self, repeats_BRCHW: Tensor) -> None:
        """Take the repeats of some pictures."""
        sets = [[Picture(pixels_CHW) for pixels_CHW in repeats] for repeats in repeats_BRCHW.cpu()]
        values = [repeat_agreement(repeats, self._metric) for repeats in sets]
        self.values.append(torch.tensor(values, dtype=torch.float64, device=self.device))


class CorrelationDistance(_MeanOfEach):
    """Correlation distance of feature pairs (EffNet-B, SwAV): lower is better."""

    higher_is_better = False

    def update(self, recons_BD: Tensor, originals_BD: Tensor) -> None:
        """Take pairs of features (B, ...)."""
        sides = [features.flatten(1).cpu().double().numpy() for features in (originals_BD, recons_BD)]
        self.values.append(torch.from_numpy(correlation_distance(sides[0], sides[1])).to(self.device))


class _OfAll(Metric):  # type: ignore[misc]
    """What needs the features of all pictures at once."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    firsts: list[Tensor]
    seconds: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("firsts", "seconds"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _take(self, firsts_BD: Tensor, seconds_BD: Tensor) -> None:
        self.firsts.append(firsts_BD.detach().flatten(1))
        self.seconds.append(seconds_BD.detach().flatten(1))


class TwoWayIdentification(_OfAll):
    """Two-way identification on features of pictures; chance is 0.5, a tie fails.

    Args:
        distractors: ``real`` (MindEye, Brain-Diffuser) or ``reconstruction`` (Takagi, DynaDiff).
    """

    def __init__(self, distractors: Distractors = "real") -> None:
        super().__init__()
        self._distractors = distractors

    def update(self, recons_BD: Tensor, originals_BD: Tensor) -> None:
        """Take features (B, ...) of pairs."""
        self._take(originals_BD, recons_BD)

    def compute(self) -> Tensor:
        """Return the share of comparisons won, float64."""
        correlations_NN = correlation_matrix(_joined(self.firsts), _joined(self.seconds))
        return torch.tensor(two_way(correlations_NN, self._distractors), dtype=torch.float64)


class Retrieval(_OfAll):
    """Top-1 retrieval among candidates; chance is one over their number.

    Args:
        find: ``image`` (given the brain response) or ``brain`` (given the picture).
        num_candidates: Candidates of a draw; all pictures where there are fewer.
        num_draws: Draws that are averaged.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        find: Literal["image", "brain"] = "image",
        num_candidates: int = FIELD_CANDIDATES,
        num_draws: int = FIELD_DRAWS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._find, self._draws = find, (seed, num_candidates, num_draws)

    def update(self, brains_BD: Tensor, images_BD: Tensor) -> None:
        """Take features (B, ...) of brain responses and of their pictures."""
        self._take(brains_BD, images_BD)

    def compute(self) -> Tensor:
        """Return the mean accuracy of the draws, float64."""
        cosines_NN = cosine_matrix(_joined(self.firsts), _joined(self.seconds))
        picks_RK = draw_candidates(len(cosines_NN), *self._draws)
        return torch.tensor(retrieve(cosines_NN, picks_RK, find=self._find).mean, dtype=torch.float64)


def _joined(rows: list[Tensor] | Tensor) -> Float64:
    """Return all rows that were taken, of all ranks once they are synchronised, as float64."""
    joined = rows if isinstance(rows, Tensor) else torch.cat(rows)
    return np.asarray(joined.cpu().double().numpy(), dtype=np.float64)
