"""Which parameters decay, and what DeepSpeed is told: derived from the recipe here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nd_dist.config import TrainingConfig
from nd_dist.models.decoder import VOXEL_PREFIX
from nd_dist.schema import INITIAL

ADAM_EPS = 1e-8
REDUCE_BUCKET = 50_000_000
"""Gradients that DeepSpeed averages at a time; ZeRO 3 keeps a buffer of so many, and its default is ten times more."""


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Return AdamW in its fused form: one pass over memory, which is most of a step with few rows."""
    return torch.optim.AdamW(groups, eps=ADAM_EPS, fused=True)


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], training: TrainingConfig
) -> list[dict[str, Any]]:
    """Return AdamW's groups by decay and by rate (``rate_share``: a group's share of the step's learning rate).

    Args:
        named: Names in the decoder, and parameters.
        training: Says how strongly and what decays. ``official``: all but names containing "bias", of the voxel
            encoders these too (the released rule); ``weights``: parameters of two axes and more. What started at the
            ridge regression has ``ridge_rate_share``.
    """
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        is_exempt = "bias" in name and not name.startswith(VOXEL_PREFIX)
        if training.decay == "weights":
            is_exempt = parameter.ndim < 2
        share = training.ridge_rate_share if training.start == "ridge" and has_ridge_start(name) else 1.0
        groups.setdefault((is_exempt, share), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if is_exempt else training.weight_decay, "rate_share": share}
        for (is_exempt, share), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def has_ridge_start(name: str) -> bool:
    """Return whether a parameter of the decoder is one that ``ridge_start`` sets: z's own encoder and head are not."""
    if name.startswith(VOXEL_PREFIX):
        return not name.startswith(f"{VOXEL_PREFIX}{INITIAL}.")
    return ".backbone.linear." in name


def deepspeed_config(training: TrainingConfig, rows_per_rank: int, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: what follows from the recipe, and ``training.deepspeed`` put into it.

    Args:
        training: The recipe's training section.
        rows_per_rank: Rows of one micro-batch on one rank.
        world_size: Number of ranks.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows_per_rank,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": rows_per_rank * world_size * training.gradient_accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed's own default clips; the engine does it, by the norm of all gradients
        "zero_optimization": {"stage": training.zero_stage, "reduce_bucket_size": REDUCE_BUCKET},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if training.dtype == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # the engine looks at the norm
    if training.dtype == "float16":
        config["fp16"] = {"enabled": True}
    return _merged(config, training.deepspeed)


def _merged(own: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with others put into them."""
    both = {key: _merged(own[key], more[key]) for key in own.keys() & more.keys() if isinstance(own[key], Mapping)}
    return {**own, **more, **both}
