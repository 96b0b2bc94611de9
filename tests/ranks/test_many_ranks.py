"""The long forms of what ``test_training_ranks`` tests with two ranks: four ranks, more ZeRO stages, many moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from nd_dist.config import Config
from nd_dist.events import EventLog
from nd_dist.training.run import train
from nd_dist.world import World
from tests.ranks.launching import events_of, losses_of, run_ranks, write_job
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import SyntheticSource

pytestmark = pytest.mark.slow
STAGES = (0, 1, 2, 3)


def recipe(folder: Path, zero_stage: int) -> Config:
    return small_recipe(folder / f"zero{zero_stage}", stages=(1,), steps=(30, 1), zero_stage=zero_stage)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], float]:
    config = recipe(tmp_path_factory.mktemp("alone"), 0)
    train(config, World(), SyntheticSource(), EventLog(config.run_dir, 0, "train"), lambda: False)
    return losses_of(events_of(config))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_thirty_steps_lose_the_same_on_any_number_of_ranks_and_any_zero_stage(
    num_ranks: int, alone: dict[tuple[int, int], float], tmp_path: Path
) -> None:
    configs = [recipe(tmp_path, stage) for stage in STAGES]
    jobs = [write_job(tmp_path / f"{stage}.json", config) for stage, config in zip(STAGES, configs, strict=True)]
    assert run_ranks(num_ranks, *jobs) == [0] * num_ranks
    for config in configs:
        assert losses_of(events_of(config)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kill_at", [1, 2, 3, 11, 30])
def test_kill_9_at_any_step_and_another_start_with_two_then_four_ranks(
    kill_at: int, alone: dict[tuple[int, int], float], tmp_path: Path
) -> None:
    config = recipe(tmp_path, 1)
    assert run_ranks(2, write_job(tmp_path / "kill.json", config, kill_at=kill_at, kill_rank=0))[0] == -9
    before = len(events_of(config))
    assert run_ranks(4, write_job(tmp_path / "again.json", config)) == [0] * 4
    resumed = losses_of(events_of(config)[before:])
    assert max(resumed) == (1, 29)
    assert resumed == pytest.approx({key: alone[key] for key in resumed}, rel=1e-5)
