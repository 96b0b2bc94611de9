"""An evaluation whose decoder takes longer than the launcher's patience, on two ranks."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from launch.plans.environment import environment
from launch.plans.hosts import Host
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import RankProgram
from launch.plans.tools import find_tools
from launch.recipe import config_path, config_yaml
from launch.supervise.run import Launch, run_plan
from launch.supervise.watch import Watcher
from nd_dist.config import LaunchConfig
from nd_dist.events import events_path, read_events
from nd_dist.files import write_text
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from tests.nd_dist.evaluation.slow_world import TARGET_S
from tests.nd_dist.evaluation.toy_world import NUM_VOXELS, SHAPES, toy_config, write_models

SILENCE_S = 10


@pytest.mark.launch
@pytest.mark.skipif(find_tools().mpirun == "", reason="no mpirun (pip install mpich)")
def test_slow_decoding_is_shared_by_the_ranks_shown_and_not_taken_for_hung(tmp_path: Path) -> None:
    write_models(tmp_path)
    shutil.rmtree(tmp_path / "decoder")
    config = toy_config(tmp_path)
    prior = config.decoder.model_copy(update={"prior_depth": 1, "prior_dim_head": 8})
    torch.manual_seed(1)
    specs = [TargetSpec(name, role_of(name), shape) for name, shape in SHAPES.items()]
    Decoder(prior, {1: NUM_VOXELS[1]}, specs).save(tmp_path / "decoder")
    config = config.model_copy(update={"launch": LaunchConfig(silence_s=SILENCE_S)})
    write_text(config_path(config), config_yaml(config))
    module = "tests.support.slow_decoding"
    program = RankProgram(module, (config.run_dir / "config.yaml").resolve(), "L", is_leased=True)
    plan = mpirun_plan(program, find_tools(), {"OMP_NUM_THREADS": "1"}, (Host("localhost", 2),))
    launch = Launch("slow_decoding", config.run_dir, "L", plan, silence_s=SILENCE_S)
    shown = io.StringIO()
    assert run_plan(launch, Watcher(Console(file=shown)), environment()) == [], "a rank was lost"
    assert "decode: 3/3" in shown.getvalue()
    assert (config.run_dir / "metrics.json").is_file()
    events = [list(read_events(events_path(config.run_dir, rank))) for rank in range(2)]
    decoded = [[event["unit"] for event in own if event.get("phase") == "decode"] for own in events]
    assert all(decoded), "both ranks decode"
    assert sorted(unit for own in decoded for unit in own) == [f"decode_subj01_images-0000{n}" for n in range(3)]
    longest = max(len(own) for own in decoded) * len(SHAPES) * TARGET_S
    assert longest > SILENCE_S, "the test would pass without a sign of life"
    assert any(event["event"] == "unit_goes_on" for own in events for event in own)
