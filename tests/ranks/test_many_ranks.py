"""Ranks that do not divide a step: 3 rows of each subject on 1, 2, 4, 5 and 8 ranks; some have no row at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nd_dist.config import Config, DataConfig
from nd_dist.events import EventLog
from nd_dist.models.decoder import Decoder
from nd_dist.training.run import train
from nd_dist.world import World
from tests.ranks.launching import events_of, losses_of, run_ranks, train_alone, write_job
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import SyntheticSource

FP16 = {"initial_scale_power": 14, "hysteresis": 1}  # too large at first; the fewer rows a rank has, the longer
CHANGES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
    "whole": {"shard_layers": False, "zero_stage": 2},
    "clipped": {"gradient_clip": 5.0, "gradient_accumulation": 2},
    "float16": {"dtype": "float16", "zero_stage": 2, "gradient_clip": 5.0, "deepspeed": {"fp16": FP16}},
}
FEW = ("zero1", "zero3", "clipped", "float16")
SIZES = [(4, FEW), *(pytest.param((size, tuple(CHANGES)), marks=pytest.mark.slow) for size in (4, 5, 8))]
Runs = dict[str, Config]
pytestmark = pytest.mark.launch


def recipe(folder: Path, name: str) -> Config:
    """Stage 1: 9 rows of 3 subjects; stage 2: 3 rows of one."""
    steps = {
        "steps": (8, 3),
        "samples_per_subject": (3, 3),
        "checkpoint_every": 5,
        "keep_checkpoints": 3,
        "validate_every": 5,
    }
    config = small_recipe(folder / name, **steps, **CHANGES[name])
    return config.model_copy(update={"data": DataConfig(subjects=(1, 2, 5, 7))})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All recipes in a world of one."""
    folder = tmp_path_factory.mktemp("alone")
    configs = {name: recipe(folder, name) for name in CHANGES}
    train_alone(configs.values())
    return configs


def of_ranks(folder: Path, num_ranks: int, names: Sequence[str]) -> Runs:
    """Recipes on some ranks, one launch."""
    configs = {name: recipe(folder, name) for name in names}
    jobs = [write_job(folder / f"{name}.json", config) for name, config in configs.items()]
    assert run_ranks(num_ranks, *jobs) == [0] * num_ranks
    return configs


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}-{len(size[1])}")
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Runs]:
    """How many ranks, and their recipes."""
    size, names = request.param
    return size, of_ranks(tmp_path_factory.mktemp(f"ranks{size}"), size, names)


def exact(runs: Runs) -> list[str]:
    """The recipes whose numbers do not depend on the number of ranks."""
    return [name for name in runs if name != "float16"]


def test_curves_are_those_of_one_rank_for_every_zero_stage_clipped_accumulated_and_whole(
    alone: Runs, together: tuple[int, Runs]
) -> None:
    for name in exact(together[1]):
        one, many = (losses_of(events_of(configs[name])) for configs in (alone, together[1]))
        assert len(one) == 11
        assert many == pytest.approx(one, rel=1e-5), name
    reference = losses_of(events_of(alone["zero1"]))
    for name in ("zero0", "zero2", "zero3", "whole"):
        assert losses_of(events_of(alone[name])) == pytest.approx(reference, rel=1e-5), name


def test_float16_trains_with_the_divided_layers_and_one_loss_scale_on_any_number_of_ranks(
    alone: Runs, together: tuple[int, Runs]
) -> None:
    for configs in (alone, together[1]):
        steps = [event for event in events_of(configs["float16"]) if event["event"] == "train_step"]
        skipped = [event["is_skipped"] for event in steps]
        assert any(skipped), "the first loss scale is too large, and all parts of the model must skip such a step"
        assert not all(skipped)
    one, many = (losses_of(events_of(configs["float16"])) for configs in (alone, together[1]))
    assert many == pytest.approx(one, rel=0.02)


def test_validations_and_models_are_those_of_one_rank(alone: Runs, together: tuple[int, Runs]) -> None:
    voxels = torch.from_numpy(SyntheticSource().clean_voxels(1, np.arange(8)))
    for name in exact(together[1]):
        found = [
            [event["values"] for event in events_of(configs[name]) if event["event"] == "validation"]
            for configs in (alone, together[1])
        ]
        assert len(found[0]) == len(found[1]) == 3
        for one, many in zip(*found, strict=True):
            assert many == pytest.approx(one, rel=1e-4)
        models = [Decoder.load(c[name].run_dir / "checkpoints" / "stage2" / "model") for c in (alone, together[1])]
        expected, predicted = (model.predict(voxels, 1, list(range(8))) for model in models)
        for target, value in expected.items():
            torch.testing.assert_close(predicted[target], value, rtol=1e-3, atol=1e-3)


def test_rank_zero_alone_writes_losses_and_the_others_now_and_then_their_pace(
    together: tuple[int, Runs],
) -> None:
    size, configs = together
    for rank in range(1, size):
        events = events_of(configs["zero1"], rank)
        assert losses_of(events) == {}
        paces = [event for event in events if event["event"] == "pace"]
        assert sum(pace["steps"] for pace in paces if pace["stage"] == 1) == 8
        assert all(0 <= pace["data_wait_share"] <= 1 for pace in paces)


def back_to_step_five(config: Config, folder: Path) -> Config:
    """A copy of a finished run as it was after five steps of stage 1."""
    stage = folder / "checkpoints" / "stage1"
    shutil.copytree(config.run_dir / "checkpoints" / "stage1" / "step-0000005", stage / "step-0000005")
    (stage / "latest.json").write_text(json.dumps({"format": 1, "name": "step-0000005"}))
    return config.model_copy(update={"run_dir": folder})


def check_resumed(config: Config, whole: Config, saved_by: int) -> None:
    loaded = next(event for event in events_of(config) if event["event"] == "checkpoint_loaded")
    assert (loaded["step"], loaded["saved_by_ranks"]) == (5, saved_by)
    resumed, expected = losses_of(events_of(config)), losses_of(events_of(whole))
    assert resumed == pytest.approx({key: loss for key, loss in expected.items() if key >= (1, 5)}, rel=1e-5)


def test_a_training_goes_on_with_more_and_with_fewer_ranks(
    alone: Runs, together: tuple[int, Runs], tmp_path: Path
) -> None:
    size, configs = together
    grown = {name: back_to_step_five(alone[name], tmp_path / "grown" / name) for name in exact(configs)}
    jobs = [write_job(tmp_path / f"{name}.json", config) for name, config in grown.items()]
    others = 2 if size != 2 else 3
    assert run_ranks(others, *jobs) == [0] * others
    for name, config in grown.items():
        check_resumed(config, alone[name], saved_by=1)
    for name in exact(configs):
        shrunk = back_to_step_five(configs[name], tmp_path / "shrunk" / name)
        train(shrunk, World(), SyntheticSource(), EventLog(shrunk.run_dir, 0, "train"), lambda: False)
        check_resumed(shrunk, alone[name], saved_by=size)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [6, 8, 10])
def test_kill_9_at_any_step_and_another_start_on_another_number_of_ranks(
    kill_at: int, alone: Runs, tmp_path: Path
) -> None:
    config = recipe(tmp_path, "zero1")
    assert run_ranks(4, write_job(tmp_path / "kill.json", config, kill_at=kill_at, kill_rank=3))[3] == -9
    before = len(events_of(config))
    assert run_ranks(8, write_job(tmp_path / "again.json", config)) == [0] * 8
    resumed = losses_of(events_of(config)[before:])
    whole = losses_of(events_of(alone["zero1"]))
    assert max(resumed) == (2, 2)
    assert resumed == pytest.approx({key: whole[key] for key in resumed}, rel=1e-5)
