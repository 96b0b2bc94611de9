"""State dicts of the released code in this project's names. Pure renaming and reshaping: nothing is read or built.

The released networks are BrainNetwork (c, g), Voxel2StableDiffusionModel (z) and MindEyeV2's diffusion prior.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from nd_dist.errors import CheckpointError

State = dict[str, torch.Tensor]
Rules = tuple[tuple[str, str], ...]

_BACKBONE: Rules = (
    (r"backbone_linear\.", "backbone.linear."),
    (r"clip_proj\.", "contrastive."),
    *(
        (rf"mixer_blocks{released}\.(\d+)\.{part}\.", rf"backbone.mixer.{own}_blocks.\1.{name}.")
        for released, own in ((1, "hidden"), (2, "token"))
        for part, name in (("0", "norm"), (r"1\.0", "linear_in"), (r"1\.3", "linear_out"))
    ),
)
_LATENT: Rules = (
    (r"mlp\.(\d+)\.0\.", r"blocks.\1.linear."),
    (r"mlp\.(\d+)\.1\.", r"blocks.\1.norm."),
    (r"lin1\.", "linear."),
    (r"norm\.", "norm."),
    (r"upsampler\.", "upsampler."),
    (r"maps_projector\.", "student."),
)
_LAYER = r"net\.causal_transformer\.layers\.(\d+)\."
_PRIOR: Rules = (
    (r"net\.learned_query$", "network.learned_query"),
    (r"net\.null_brain_embeds$", "network.null_brain"),
    (r"net\.null_image_embed$", "network.null_image"),
    (r"net\.to_time_embeds\.0\.1\.net\.0\.0\.", "network.time.0."),
    (r"net\.to_time_embeds\.0\.1\.net\.1\.0\.", "network.time.2."),
    (r"net\.to_time_embeds\.0\.1\.net\.2\.", "network.time.4."),
    (r"net\.causal_transformer\.rel_pos_bias\.relative_attention_bias\.", "network.relative_attention_bias."),
    (_LAYER + r"0\.norm\.g$", r"network.layers.\1.attention.norm.scale"),
    (_LAYER + r"0\.null_kv$", r"network.layers.\1.attention.null_kv"),
    (_LAYER + r"0\.to_q\.", r"network.layers.\1.attention.to_q."),
    (_LAYER + r"0\.to_kv\.", r"network.layers.\1.attention.to_kv."),
    (_LAYER + r"0\.to_out\.0\.", r"network.layers.\1.attention.to_out."),
    (_LAYER + r"0\.to_out\.1\.g$", r"network.layers.\1.attention.out_norm.scale"),
    (_LAYER + r"1\.0\.g$", r"network.layers.\1.feedforward.norm.scale"),
    (_LAYER + r"1\.1\.", r"network.layers.\1.feedforward.linear_in."),
    (_LAYER + r"1\.5\.", r"network.layers.\1.feedforward.linear_out."),
    (r"net\.causal_transformer\.norm\.g$", "network.norm.scale"),
    (r"net\.causal_transformer\.project_out\.", "network.project_out."),
)
_PRIOR_COMPUTED = re.compile(r"noise_scheduler\.|.*rotary_emb\.freqs$")
"""Released buffers that this project computes: the schedule and the rotary frequencies."""


def token_head_state(released: Mapping[str, torch.Tensor], seq_len: int = 1) -> State:
    """Return the state of a ``TokenHead`` without prior from a released BrainNetwork.

    At sequence length 1 the hidden-mixing blocks and LayerNorm weights that have no effect are left out.

    Args:
        released: Its state dict, without a ``backbone.`` prefix.
        seq_len: Sequence length that it was made for.

    Raises:
        CheckpointError: a name is unknown.
    """
    if seq_len > 1:
        return _renamed(released, _BACKBONE)
    kept = {name: value for name, value in released.items() if not name.startswith("mixer_blocks")}
    return {**_renamed(kept, _BACKBONE), **_token_shifts(released)}


def _token_shifts(released: Mapping[str, torch.Tensor]) -> State:
    """Return the scalars of all token-mixing blocks at sequence length 1, stacked over blocks."""
    num_blocks = sum(name.startswith("mixer_blocks2.") and name.endswith(".1.3.weight") for name in released)
    parts = {
        "norm_bias": "0.bias",
        "in_weight": "1.0.weight",
        "in_bias": "1.0.bias",
        "out_weight": "1.3.weight",
        "out_bias": "1.3.bias",
    }
    return {
        f"backbone.mixer.token_shifts.{own}": torch.stack(
            [released[f"mixer_blocks2.{block}.{part}"].reshape(()) for block in range(num_blocks)]
        )
        for own, part in parts.items()
    }


def voxel_encoder_state(released: Mapping[str, torch.Tensor], subjects: tuple[int, ...]) -> State:
    """Return the state of a voxel encoder from released ``linears.i.*``; ``subjects[i]`` is the i-th subject.

    Raises:
        CheckpointError: a name is unknown.
    """
    return _renamed(released, tuple((rf"linears\.{i}\.", f"subjects.{s}.") for i, s in enumerate(subjects)))


def latent_head_state(released: Mapping[str, torch.Tensor]) -> State:
    """Return the state of a ``LatentHead`` with student map from a released Voxel2StableDiffusionModel.

    Raises:
        CheckpointError: a name is unknown.
    """
    return _renamed(released, _LATENT)


def prior_state(released: Mapping[str, torch.Tensor]) -> State:
    """Return the state of a ``DiffusionPrior`` from a released prior; computed buffers are left out.

    Raises:
        CheckpointError: a name is unknown.
    """
    return _renamed({name: v for name, v in released.items() if not _PRIOR_COMPUTED.match(name)}, _PRIOR)


def without_prefix(released: Mapping[str, torch.Tensor], prefix: str) -> State:
    """Return the entries that begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in released.items() if name.startswith(prefix)}


def _renamed(released: Mapping[str, torch.Tensor], rules: Rules) -> State:
    """Return the entries with the first matching rule applied to their names."""
    state: State = {}
    for name, value in released.items():
        matches = (re.sub(f"^{pattern}", own, name) for pattern, own in rules if re.match(pattern, name))
        if not (renamed := next(matches, "")):
            raise CheckpointError("A released weight has a name that is not known.", where=name)
        state[renamed] = value
    return state
