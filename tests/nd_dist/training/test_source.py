from __future__ import annotations

import pytest

from nd_dist.config import Config, DataConfig, TrainingConfig
from nd_dist.config.training import OwnSchedule
from nd_dist.errors import ConfigError
from nd_dist.training.records import training_fingerprint
from nd_dist.training.source import stage_length, stage_request, stage_specs
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


def test_a_batch_of_the_recipe_is_the_same_on_any_number_of_ranks() -> None:
    assert {stage_request(CONFIG, 1, ranks).num_rows for ranks in (1, 4, 5, 64)} == {12}
    training = CONFIG.training
    assert stage_length(CONFIG, stage_request(CONFIG, 1, 64)) == (training.steps[0], training.learning_rate)


def test_rows_per_rank_let_batch_and_rate_grow_and_steps_shrink_with_the_ranks() -> None:
    training = CONFIG.training.model_copy(update={"rows_per_rank": 6, "steps": (1000, 1000), "learning_rate": 1e-3})
    config = CONFIG.model_copy(update={"training": training})
    request = stage_request(config, 1, world_size=8)  # 48 rows of two subjects, where the recipe has 12
    assert request.num_rows == 48
    assert stage_length(config, request) == (250, pytest.approx(2e-3))
    assert stage_request(config, 1, world_size=3).samples_per_subject == 9
    alone = stage_request(config, 2, world_size=1)
    assert (alone.num_rows, stage_length(config, alone)) == (6, (1333, pytest.approx(1e-3 * (6 / 8) ** 0.5)))


def test_pictures_are_asked_for_where_a_teacher_looks_at_them() -> None:
    with_teacher = CONFIG.training.model_copy(update={"teacher": "folder"})
    assert stage_request(CONFIG.model_copy(update={"training": with_teacher}), 1, 1).pictures
    without_z = with_teacher.model_copy(update={"targets": ("c",)})
    assert not stage_request(CONFIG.model_copy(update={"training": without_z}), 1, 1).pictures
    assert not stage_request(CONFIG, 1, 1).pictures


def test_specs_come_in_the_recipes_order_and_missing_targets_are_named() -> None:
    assert [spec.name for spec in stage_specs(CONFIG, SyntheticSource())] == ["z", "c"]
    wanted = CONFIG.model_copy(update={"training": TrainingConfig(targets=("c", "g12"))})
    with pytest.raises(ConfigError, match="g12"):
        stage_specs(wanted, SyntheticSource())


def test_a_training_of_one_target_may_have_steps_and_samples_of_its_own() -> None:
    own = {"z": OwnSchedule(steps=(50, 60), samples_per_subject=(12, 84))}
    for targets, expected in ((("z",), (50, 12)), (("z", "c"), (40, 6)), (("c",), (40, 6))):
        training = TrainingConfig(targets=targets, steps=(40, 40), samples_per_subject=(6, 42), per_target=own)
        config = CONFIG.model_copy(update={"training": training})
        request = stage_request(config, 1, world_size=1)
        assert (stage_length(config, request)[0], request.samples_per_subject) == expected
        facts = training_fingerprint(config, {"data.content": "i"}, 1)
        assert (facts["training.steps"], facts["training.samples_per_subject"]) == expected
