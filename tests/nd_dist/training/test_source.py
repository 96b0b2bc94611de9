from __future__ import annotations

import pytest

from nd_dist.config import Config, DataConfig, TrainingConfig
from nd_dist.errors import ConfigError
from nd_dist.training.source import stage_request, stage_specs
from tests.ranks.synthetic import SyntheticSource

CONFIG = Config(
    data=DataConfig(subjects=(5, 1, 2)),
    training=TrainingConfig(target_subject=1, targets=("z", "c"), samples_per_subject=(6, 8), sessions=(1, 3)),
)


def test_stage_one_takes_all_subjects_but_the_target_and_all_sessions() -> None:
    request = stage_request(CONFIG, 1, world_size=2)
    assert (request.subjects, request.samples_per_subject, request.sessions) == ((2, 5), 6, None)


def test_stage_two_takes_the_target_and_its_chosen_sessions() -> None:
    request = stage_request(CONFIG, 2, world_size=4)
    assert (request.subjects, request.samples_per_subject, request.sessions) == ((1,), 8, (1, 3))


def test_a_stage_without_subjects_is_refused() -> None:
    alone = CONFIG.model_copy(update={"data": DataConfig(subjects=(1,))})
    with pytest.raises(ConfigError, match="no subject to train on"):
        stage_request(alone, 1, world_size=1)
    assert stage_request(alone, 2, world_size=1).subjects == (1,)


def test_samples_that_do_not_split_over_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 4 ranks"):
        stage_request(CONFIG, 1, world_size=4)


def test_specs_come_in_the_recipes_order_and_missing_targets_are_named() -> None:
    assert [spec.name for spec in stage_specs(CONFIG, SyntheticSource())] == ["z", "c"]
    wanted = CONFIG.model_copy(update={"training": TrainingConfig(targets=("c", "g12"))})
    with pytest.raises(ConfigError, match="g12"):
        stage_specs(wanted, SyntheticSource())
