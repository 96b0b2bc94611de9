"""Where the published network starts, instead of at random: at the ridge regression that it can express.

With the official mixer at sequence length 1 the decoder of c and g is an affine map through a space of H numbers. Its
squared error has a closed-form optimum up to that width: regress every target on each subject's voxels, take the H
directions in which the predictions vary most as the shared space (the backbone maps it to the targets), and let each
voxel encoder predict a picture's place in that space. A new subject's encoder is fitted onto a space that is there.

z's network is not affine: in the joint decoder it starts from the shared space, alone it starts at random.

Legend of shape suffixes: N images, V voxels, R directions of a subject's basis, H width of the space, D numbers of a
target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nd_dist.models.backbone import Backbone
from nd_dist.models.decoder import SHARED, Decoder
from nd_dist.models.heads import TokenHead
from nd_dist.models.voxels import RidgeEncoder
from nd_dist.training.ridge import Basis, Target, choose_penalty, decompose
from nd_dist.training.source import StageRequest, TrainingSource

MAX_ROWS = 8192
"""Predictions, of all subjects together, from which the shared space is made."""
RANK_SHARE = 1e-12
"""Directions of less than this share of the largest one's variance carry rounding."""


@dataclass(frozen=True)
class _Subject:
    """One subject's regression: the basis, what takes voxels to it, and penalties of the targets."""

    image_ids: list[int]
    basis: Basis
    mean_V: torch.Tensor
    right_VR: torch.Tensor
    penalties: dict[str, float]

    def target(self, head: _Head, source: TrainingSource) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each direction adds to a target (R, D), and the target's mean (D,)."""
        rows_ND, mean_D = Target(head.name, source, self.image_ids, self.basis.weight_N).columns(slice(None))
        squares_R = self.basis.values_R.square()
        shrink_R = self.basis.values_R / (squares_R + self.penalties[head.name])
        return shrink_R[:, None] * (self.basis.left_NR.T @ rows_ND), mean_D


@dataclass(frozen=True)
class _Head:
    """One affine head: its linear map from the space, and the constant that the mixer adds before it."""

    name: str
    linear: nn.Linear
    shift: torch.Tensor


def start_at_ridge(
    decoder: Decoder, source: TrainingSource, request: StageRequest, device: torch.device, has_space: bool
) -> list[str]:
    """Replace the weights of the decoder's affine parts by those of a ridge regression; return the targets' names.

    A decoder of z alone has no affine part and stays as it is.

    Args:
        decoder: On the CPU; its voxel encoders are new.
        source: The data.
        request: Subjects and sessions of the stage.
        device: Where to compute.
        has_space: Whether the heads are trained already, and only encoders are to be fitted.

    Raises:
        DataError: voxels or targets are not finite.
    """
    spaces = _spaces(decoder)
    subjects = {
        s: _regress(s, source, request, [h for heads in spaces.values() for h in heads], device)
        for s in request.subjects
    }
    for key, heads in spaces.items():
        if not has_space:
            _make_space(heads, list(subjects.values()), source)
        encoder = decoder.voxels[key]
        assert isinstance(encoder, RidgeEncoder)
        for number, subject in subjects.items():
            _fit_encoder(encoder.subjects[str(number)], heads, subject, source)
    return [head.name for heads in spaces.values() for head in heads]


def _spaces(decoder: Decoder) -> dict[str, list[_Head]]:
    """Return encoder -> the affine heads on its space."""
    spaces: dict[str, list[_Head]] = {}
    for name, head in decoder.heads.items():
        if isinstance(head, TokenHead) and isinstance(head.backbone, Backbone):
            key = SHARED if decoder.config.heads == "joint" else name
            linear = head.backbone.linear
            with torch.no_grad():
                shift = head.backbone.mixer(linear.weight.new_zeros(1, 1, linear.in_features))[0, 0]
            spaces.setdefault(key, []).append(_Head(name, linear, shift))
    return spaces


def _regress(
    number: int, source: TrainingSource, request: StageRequest, heads: Sequence[_Head], device: torch.device
) -> _Subject:
    image_ids = source.fit_images(number, request.sessions)
    voxels_NV, counts = source.mean_voxels(number, image_ids, request.sessions)
    weight_N = torch.tensor(counts, dtype=torch.float64, device=device)
    weight_N = weight_N / weight_N.mean()
    basis, mean_V, right_VR = decompose(torch.from_numpy(voxels_NV).to(device), weight_N)
    penalties = {
        head.name: choose_penalty(Target(head.name, source, image_ids, weight_N), basis, None).value for head in heads
    }
    return _Subject(image_ids, basis, mean_V, right_VR, penalties)


def _make_space(heads: Sequence[_Head], subjects: Sequence[_Subject], source: TrainingSource) -> None:
    """Give the heads the directions in which predictions vary most, every target counting alike."""
    gram_NN: torch.Tensor | float = 0.0
    for head in heads:
        rows_ND, _ = _predictions(head, subjects, source)
        gram_NN = gram_NN + rows_ND @ rows_ND.T / rows_ND.square().sum().clamp(min=1e-12)
    assert isinstance(gram_NN, torch.Tensor)
    squares, vectors = torch.linalg.eigh(gram_NN)
    width = min(heads[0].linear.in_features, int((squares > RANK_SHARE * squares[-1]).sum()))
    left_NH = vectors.flip(1)[:, :width]
    for head in heads:  # made again, because the predictions of all targets do not fit into memory together
        rows_ND, mean_D = _predictions(head, subjects, source)
        map_HD = left_NH.T @ rows_ND / len(left_NH) ** 0.5  # places in the space have deviation 1 or so
        shift_D = head.shift[:width].to(map_HD) @ map_HD
        with torch.no_grad():
            head.linear.weight.zero_()
            head.linear.weight[:, :width] = map_HD.T.to(head.linear.weight)
            head.linear.bias.copy_(mean_D - shift_D)


def _predictions(
    head: _Head, subjects: Sequence[_Subject], source: TrainingSource
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centred predictions (N, D) of a target for pictures of all subjects, and the mean (D,) of its means."""
    share, rows, means = max(1, MAX_ROWS // len(subjects)), [], []
    for subject in subjects:
        weight_RD, mean_D = subject.target(head, source)
        chosen = slice(None, None, -(-len(subject.image_ids) // share))
        rows.append((subject.basis.left_NR[chosen] * subject.basis.values_R) @ weight_RD)
        means.append(mean_D)
    return torch.cat(rows), torch.stack(means).mean(dim=0)


def _fit_encoder(linear: nn.Module, heads: Sequence[_Head], subject: _Subject, source: TrainingSource) -> None:
    """Give a subject's encoder the places in the space from which the heads come nearest to the ridge regression."""
    assert isinstance(linear, nn.Linear)
    device = subject.mean_V.device
    scores_RH: torch.Tensor | float = 0.0
    centre_H: torch.Tensor | float = 0.0
    gram_HH: torch.Tensor | float = 0.0
    for head in heads:
        map_DH, bias_D = head.linear.weight.detach().to(device).double(), head.linear.bias.detach().to(device).double()
        bias_D = bias_D + map_DH @ head.shift.to(device).double()
        weight_RD, mean_D = subject.target(head, source)
        weight = 1.0 / map_DH.square().sum().clamp(min=1e-12)
        scores_RH = scores_RH + weight * weight_RD @ map_DH
        centre_H = centre_H + weight * (mean_D - bias_D) @ map_DH
        gram_HH = gram_HH + weight * map_DH.T @ map_DH
    assert isinstance(gram_HH, torch.Tensor)
    inverse_HH = torch.linalg.pinv(gram_HH, hermitian=True, rtol=1e-10)
    weight_VH = subject.right_VR @ (scores_RH @ inverse_HH)
    with torch.no_grad():
        linear.weight.copy_(weight_VH.T)
        linear.bias.copy_(centre_H @ inverse_HH - subject.mean_V @ weight_VH)
