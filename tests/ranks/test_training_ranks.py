"""Training on two real ranks (gloo, CPU): few launches, each with several trainings, because a launch is slow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nd_dist.config import Config
from nd_dist.errors import CheckpointError
from nd_dist.events import EventLog
from nd_dist.models.decoder import Decoder
from nd_dist.training.run import train
from nd_dist.world import World
from tests.ranks.launching import events_of, losses_of, run_ranks, run_with_deepspeed, train_alone, write_job
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import SyntheticSource
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.launch

CHANGES: dict[str, dict[str, Any]] = {
    "zero1": {"steps": (12, 4), "checkpoint_every": 4},
    "zero0": {"stages": (1,), "zero_stage": 0, "steps": (12, 1), "checkpoint_every": 4},
    "zero2": {"stages": (1,), "zero_stage": 2, "gradient_accumulation": 2},
    "zero3": {"stages": (1,), "zero_stage": 3, "validate_every": 3},
    "clipped": {"stages": (1,), "zero_stage": 2, "gradient_clip": 5.0},
    "bfloat16": {"stages": (1,), "dtype": "bfloat16", "zero_stage": 2},
}
EXACT = [name for name in CHANGES if name != "bfloat16"]


def recipe(folder: Path, name: str) -> Config:
    return small_recipe(folder / name, **CHANGES[name])


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """All recipes trained on two ranks under the deepspeed launcher."""
    folder = tmp_path_factory.mktemp("two")
    configs = {name: recipe(folder, name) for name in CHANGES}
    result = run_with_deepspeed(2, *(write_job(folder / f"{n}.json", config) for n, config in configs.items()))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return configs


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The same recipes in this process, a world of one."""
    folder = tmp_path_factory.mktemp("one")
    configs = {name: recipe(folder, name) for name in CHANGES}
    train_alone(configs.values())
    return configs


@pytest.mark.parametrize("name", EXACT)
def test_the_loss_curve_is_the_same_on_one_and_two_ranks(
    name: str, on_one: dict[str, Config], on_two: dict[str, Config]
) -> None:
    one, two = (losses_of(events_of(configs[name])) for configs in (on_one, on_two))
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, rel=1e-5)


def test_the_loss_curve_is_the_same_for_all_zero_stages(on_two: dict[str, Config]) -> None:
    curves = {name: losses_of(events_of(on_two[name])) for name in ("zero0", "zero1", "zero3")}
    first_stage = {key: loss for key, loss in curves["zero1"].items() if key[0] == 1}
    assert len(first_stage) == 12
    assert first_stage == pytest.approx(curves["zero0"], rel=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_validations_are_the_same_on_one_and_two_ranks(
    name: str, on_one: dict[str, Config], on_two: dict[str, Config]
) -> None:
    one, two, other = (validations_of(events) for events in (
        events_of(on_one[name]), events_of(on_two[name], 0), events_of(on_two[name], 1)
    ))  # fmt: skip
    assert two == other
    assert one.keys() == two.keys()
    for step, values in two.items():
        assert values == pytest.approx(one[step], rel=1e-4)


def test_bfloat16_follows_float32_loosely(on_two: dict[str, Config]) -> None:
    half, full = (losses_of(events_of(on_two[name])) for name in ("bfloat16", "clipped"))
    assert half == pytest.approx(full, rel=0.03)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_the_exported_model_predicts_the_same_from_one_and_two_ranks(
    name: str, on_one: dict[str, Config], on_two: dict[str, Config]
) -> None:
    one, two = (Decoder.load(c[name].run_dir / "checkpoints" / "stage1" / "model") for c in (on_one, on_two))
    voxels = torch.from_numpy(SyntheticSource().clean_voxels(5, np.arange(8)))
    expected, found = (model.predict(voxels, 5, list(range(8))) for model in (one, two))
    for target, value in expected.items():
        torch.testing.assert_close(found[target], value, rtol=1e-3, atol=1e-3)


def test_rank_zero_writes_every_step_and_all_process_groups_have_the_recipes_timeout(
    on_two: dict[str, Config],
) -> None:
    assert len(losses_of(events_of(on_two["zero1"], 0))) == 16
    assert losses_of(events_of(on_two["zero1"], 1)) == {}
    for rank in (0, 1):
        assert set(events_of(on_two["zero1"], rank)[-1]["group_timeouts_s"]) == {HANG_S}


def test_a_killed_rank_ends_the_run_and_the_same_command_continues_bit_for_bit(
    on_one: dict[str, Config], on_two: dict[str, Config], tmp_path: Path
) -> None:
    config = recipe(tmp_path, "zero1")
    assert run_ranks(2, write_job(tmp_path / "kill.json", config, kill_at=11, kill_rank=1))[1] == -9
    assert "finished" not in {event["event"] for event in events_of(config)}
    newest = json.loads((config.run_dir / "checkpoints" / "stage1" / "latest.json").read_text())["name"]
    bad = small_recipe(tmp_path / "bad", stages=(1,))
    grown = {name: back_to(on_one[name], tmp_path / "grown" / name, "step-0000008") for name in ("zero0", "zero1")}
    grown["zero3"] = back_to(on_one["zero3"], tmp_path / "grown" / "zero3", "step-0000006")
    jobs = [
        write_job(tmp_path / "again.json", config),
        *(write_job(tmp_path / f"{name}.json", job) for name, job in grown.items()),
        write_job(tmp_path / "bad.json", bad, bad_step=3, bad_rank=1),
    ]
    codes = run_ranks(2, *jobs)

    events = events_of(config)
    loaded = next(i for i, event in enumerate(events) if event["event"] == "checkpoint_loaded")
    assert events[loaded]["tag"] == newest
    resumed, whole = losses_of(events[loaded:]), losses_of(events_of(on_two["zero1"]))
    assert len(resumed) == 16 - events[loaded]["step"]
    assert resumed == {key: whole[key] for key in resumed}

    # the next jobs of that launch: trainings of one rank go on with two
    for name, job in grown.items():
        check_resumed(events_of(job), on_one[name], saved_by=1)

    # the last one: a NaN in one rank's data stops both before the step, with names
    assert codes == [1, 1]
    for rank in (0, 1):
        failed = events_of(bad, rank)[-1]
        assert failed["kind"] == "NonFiniteError"
        assert "step 3" in failed["message"]
        assert "rank 1: subjects [2], images [" in failed["message"]
    assert max(losses_of(events_of(bad, 0))) == (1, 2)


@pytest.mark.parametrize("name", EXACT)
def test_a_training_of_two_ranks_goes_on_with_one(name: str, on_two: dict[str, Config], tmp_path: Path) -> None:
    tag = "step-0000008" if name in ("zero0", "zero1") else "step-0000006"
    config = back_to(on_two[name], tmp_path, tag)
    train(config, World(), SyntheticSource(), EventLog(config.run_dir, 0, "train"), lambda: False)
    check_resumed(events_of(config), on_two[name], saved_by=2)
    assert not list(config.run_dir.glob("checkpoints/*/*universal*"))


def test_zero_one_and_two_read_each_others_checkpoints(on_two: dict[str, Config], tmp_path: Path) -> None:
    config = back_to(on_two["zero0"], tmp_path / "a", "step-0000008")
    other = config.model_copy(update={"training": config.training.model_copy(update={"zero_stage": 1})})
    with pytest.raises(CheckpointError, match=r"training\.zero_stage=0"):
        train(other, World(), SyntheticSource(), EventLog(other.run_dir, 0, "train"), lambda: False)
    config = back_to(on_two["zero1"], tmp_path / "b", "step-0000008")
    other = config.model_copy(update={"training": config.training.model_copy(update={"zero_stage": 2})})
    train(other, World(), SyntheticSource(), EventLog(other.run_dir, 0, "train"), lambda: False)
    check_resumed(events_of(other), on_two["zero1"], saved_by=2)


def back_to(config: Config, folder: Path, tag: str) -> Config:
    """A copy of a finished run as it was when a checkpoint of stage 1 was the newest."""
    shutil.copytree(config.run_dir / "checkpoints" / "stage1", folder / "checkpoints" / "stage1")
    (folder / "checkpoints" / "stage1" / "done.json").unlink()
    (folder / "checkpoints" / "stage1" / "latest.json").write_text(json.dumps({"format": 1, "name": tag}))
    return config.model_copy(update={"run_dir": folder})


def check_resumed(events: list[dict[str, Any]], whole: Config, saved_by: int) -> None:
    """The losses after a restart are those of the uninterrupted run, to 1e-5."""
    loaded = next(event for event in events if event["event"] == "checkpoint_loaded")
    assert loaded["saved_by_ranks"] == saved_by
    resumed, expected = losses_of(events), losses_of(events_of(whole))
    assert min(resumed) == (1, loaded["step"])
    assert resumed.keys() == {key for key in expected if key >= (1, loaded["step"])}
    assert resumed == pytest.approx({key: expected[key] for key in resumed}, rel=1e-5)


def validations_of(events: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, float]]:
    return {(e["stage"], e["step"]): e["values"] for e in events if e["event"] == "validation"}
