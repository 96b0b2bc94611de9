"""What AdamW decays, in both forms."""

from __future__ import annotations

from typing import Literal

import pytest
from torch import nn

from nd_dist.config import TrainingConfig
from nd_dist.models.decoder import VOXEL_PREFIX
from nd_dist.training.parameters import parameter_groups

NETWORK = nn.ModuleDict({VOXEL_PREFIX.rstrip("."): nn.Linear(3, 2), "norm": nn.LayerNorm(2), "head": nn.Linear(2, 2)})
LINEAR_WEIGHTS = {f"{VOXEL_PREFIX}weight", "head.weight"}


@pytest.mark.parametrize(
    ("decay", "decayed"),
    [("official", LINEAR_WEIGHTS | {f"{VOXEL_PREFIX}bias", "norm.weight"}), ("weights", LINEAR_WEIGHTS)],
)
def test_the_released_rule_decays_norms_and_voxel_biases_and_the_other_matrices_only(
    decay: Literal["official", "weights"], decayed: set[str]
) -> None:
    groups = parameter_groups(NETWORK.named_parameters(), TrainingConfig(decay=decay, weight_decay=0.5))
    names = {id(parameter): name for name, parameter in NETWORK.named_parameters()}
    found = {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert found == {0.5: decayed, 0.0: set(names.values()) - decayed}
