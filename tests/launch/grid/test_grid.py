"""The grid of trainings: its plan as values, and a small one with real `nd train` processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.grid.plan import (
    GridRequest,
    Slot,
    Training,
    blocked,
    grid_table,
    next_starts,
    numbers,
    plan_grid,
    plan_slots,
    points_of,
)
from launch.grid.process import command_of
from launch.grid.run import make_grid
from launch.grid.state import config_of
from launch.plans.choose import LaunchOptions
from launch.plans.hosts import Host
from launch.recipe import load_recipe, takes
from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.events import events_path, read_events
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TARGETS
from tests.support.command_line import ND, nd, nd_process
from tests.support.waiting import HANG_S, wait_until


def paper(*overrides: str) -> Config:
    return load_recipe("paper", ["run_dir=runs/p", *overrides])


def test_a_subject_needs_sixteen_trainings_and_four_subjects_sixty_four() -> None:
    plan = plan_grid(paper(), GridRequest(subjects=(1, 2, 5, 7), stages=(1, 2), all_targets=True))
    assert len(plan) == len(set(plan)) == 64
    assert len([training for training in plan if training.subject == 5]) == 16
    assert {training.network for training in plan} == set(TARGETS)


def test_with_joint_heads_one_training_a_stage_makes_all_targets() -> None:
    plan = plan_grid(paper("decoder.heads=joint"), GridRequest(subjects=(1, 2), stages=(1, 2), all_targets=True))
    assert [(t.subject, t.stage, t.targets) for t in plan] == [(s, k, TARGETS) for s in (1, 2) for k in (1, 2)]
    assert plan[0].run_dir == Path("runs/p/subj01")


def test_a_training_is_the_recipe_with_its_own_folder_subject_target_and_stage() -> None:
    config = paper()
    plan = plan_grid(config, GridRequest((2,), (1, 2), True))
    training = next(t for t in plan if (t.network, t.stage) == ("g04", 2))
    own = load_recipe("paper", training.overrides)
    assert own.run_dir == Path("runs/p/subj02/g04")
    assert (own.training.target_subject, own.training.targets, own.training.stages) == (2, ("g04",), (2,))


def test_subjects_that_are_not_in_the_recipe_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[9\]"):
        plan_grid(paper(), GridRequest(subjects=(1, 9)))
    with pytest.raises(ConfigError, match="not a list of numbers"):
        numbers("1;2", "--subjects")


def test_hosts_are_cut_into_places_of_so_many_gpus() -> None:
    hosts = (Host("a", 4), Host("b", 3))
    slots = plan_slots(hosts, GridRequest(ranks=2), has_gpus=True, is_local=False)
    assert [(slot.host, slot.devices) for slot in slots] == [("a", (0, 1)), ("a", (2, 3)), ("b", (0, 1))]
    crowded = plan_slots(hosts[1:], GridRequest(at_once=5), has_gpus=True, is_local=False)
    assert [slot.devices for slot in crowded] == [(0,), (1,), (2,), (0,), (1,)]
    assert [s.devices for s in plan_slots((Host("localhost", 1),), GridRequest(at_once=2), False, True)] == [(), ()]
    with pytest.raises(ConfigError, match="room"):
        plan_slots(hosts, GridRequest(ranks=8), has_gpus=True, is_local=False)


def states_of(plan: tuple[Training, ...], **chosen: str) -> dict[Training, Any]:
    return {t: chosen.get(f"{t.network}{t.stage}", "waiting") for t in plan}


def test_a_second_stage_waits_for_its_own_first_stage_only() -> None:
    plan = plan_grid(paper("training.targets=[c,z]"), GridRequest(stages=(1, 2)))
    free = [Slot(i, "a", (i,), True) for i in range(4)]
    assert [(t.network, t.stage) for t, _ in next_starts(plan, states_of(plan), free)] == [("c", 1), ("z", 1)]
    states = states_of(plan, c1="done", z1="running")
    assert [(t.network, t.stage, slot.number) for t, slot in next_starts(plan, states, free[2:])] == [("c", 2, 2)]
    assert [(t.network, t.stage) for t in blocked(plan, states_of(plan, z1="failed"))] == [("z", 2)]
    assert next_starts(plan, states_of(plan, c1="running", z1="failed"), free) == []


def test_the_table_has_a_row_for_every_network_and_a_column_for_every_stage() -> None:
    plan = plan_grid(paper("training.targets=[c,z]"), GridRequest(subjects=(1, 7), stages=(1, 2)))
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(grid_table(plan, states_of(plan, c1="running"), dict.fromkeys(plan, 0.25)))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "waiting" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [subject, network, "running 25%" if network == "c" else "waiting", "waiting"]
        for subject in ("01", "07") for network in ("c", "z")
    ]  # fmt: skip


def test_a_training_on_another_host_goes_over_ssh_with_its_gpus(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("far slots=2\n")
    grid = make_grid(paper("training.targets=[c]"), GridRequest(stages=(1,)), LaunchOptions(hostfile=hostfile))
    environ = {"PYTHONPATH": "/code", "NCCL_DEBUG": "two words", "HF_TOKEN": "secret"}
    *ssh, host, remote = command_of(grid.slots[1], grid.words(grid.plan[0]), "grid-1-2", environ)
    assert ssh[:4] == ["ssh", "-tt", "-e", "none"]
    assert host == "far"
    words = shlex.split(remote)
    assert words[:5] == ["cd", os.getcwd(), "&&", "exec", "env"]
    assert {"NCCL_DEBUG=two words", "PYTHONPATH=/code", "CUDA_VISIBLE_DEVICES=1"} <= set(words)
    assert "secret" not in remote
    assert words[words.index(sys.executable) :][:5] == [sys.executable, "-X", "launch=grid-1-2", "-m", "launch.cli"]
    assert "training.targets=[c]" in words


def test_the_grid_runs_on_this_machine_and_says_so_where_an_allocation_has_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert make_grid(paper(), GridRequest(), LaunchOptions(2, launcher="local")).note == ""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    grid = make_grid(paper(), GridRequest(), LaunchOptions(2))
    assert {slot.host for slot in grid.slots} == {"localhost"}
    assert "1 of this allocation's 4 nodes" in grid.note
    with pytest.raises(ConfigError, match="nd submit train --all-targets"):
        make_grid(paper(), GridRequest(), LaunchOptions(2, launcher="srun"))


def test_a_dry_run_shows_the_table_and_every_command_and_writes_nothing(tmp_path: Path) -> None:
    words = ["train", "paper", f"run_dir={tmp_path / 'run'}", "--all-targets", "--subjects", "1,7", "--dry-run"]
    shown = nd(*words).stdout
    assert "32 trainings" in shown
    assert "training.target_subject=7 'training.targets=[g12]' 'training.stages=[2]'" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a very small packed phantom and recipe."""
    folder = tmp_path_factory.mktemp("grid")
    words = [
        "phantom.num_subjects=3", "phantom.num_sessions=2", "phantom.trials_per_session=24", "phantom.num_shared=6",
        "phantom.num_voxels=60", "data.subjects=[1,2,3]", "decoder.hidden_size=16",
        "decoder.heads=single", "training.targets=[z,g02]", "training.samples_per_subject=[2,4]",
        "training.steps=[4,4]", "training.checkpoint_every=2", f"nsd_root={folder / 'nsd'}",
        f"shards_dir={folder / 'shards'}",
    ]  # fmt: skip
    subprocess.run([*ND, "phantom", str(folder / "nsd"), *words], check=True, capture_output=True)
    subprocess.run([*ND, "pack", "demo", *words, f"run_dir={folder / 'pack'}"], check=True, capture_output=True)
    return words


@pytest.mark.slow
def test_a_grid_killed_and_started_again_ends_with_every_training_done_once(shards: list[str], tmp_path: Path) -> None:
    words = [*ND, "train", "demo", *shards, f"run_dir={tmp_path}", "--subjects", "1", "--at-once", "2"]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "subj01" / "z" / "checkpoints" / "stage1" / "done.json").exists)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=HANG_S)
    assert first.returncode == 5, out  # "requeue me": everything saved

    again = subprocess.run(words, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert again.returncode == 0, again.stdout + again.stderr
    for network in ("z", "g02"):
        events = list(read_events(events_path(tmp_path / "subj01" / network, 0)))
        steps = [(e["stage"], e["step"]) for e in events if e["event"] == "train_step"]
        assert steps == [(stage, step) for stage in (1, 2) for step in range(4)]
    merged = Decoder.load(tmp_path / "subj01" / "checkpoints" / "stage2" / "model")
    own = Decoder.load(tmp_path / "subj01" / "g02" / "checkpoints" / "stage2" / "model").state_dict()
    assert {spec.name for spec in merged.targets} == {"z", "g02"}
    assert all((merged.state_dict()[name] == value).all() for name, value in own.items())


def test_a_list_that_a_setting_does_not_take_is_an_axis() -> None:
    words = ["training.learning_rate=[1e-4,3e-4]", "training.steps=[10,10]", "decoder.num_blocks=[2,4]"]
    plain, points = points_of(words, lambda word: takes("paper", word))
    assert plain == ["training.steps=[10,10]"]
    assert points == tuple(
        (f"training.learning_rate={rate}", f"decoder.num_blocks={blocks}")
        for rate in ("0.0001", "0.0003") for blocks in (2, 4)
    )  # fmt: skip
    steps = points_of(["training.steps=[[10,10],[20,20]]"], lambda word: takes("paper", word))[1]
    assert steps == (("training.steps=[10, 10]",), ("training.steps=[20, 20]",))
    with pytest.raises(ConfigError, match="nothing to vary"):
        points_of(["training.steps=[10,10]"], lambda word: takes("paper", word))


def test_every_point_is_a_recipe_with_folders_of_its_own() -> None:
    points = (("training.learning_rate=1e-05",), ("training.learning_rate=0.001", "decoder.heads=joint"))
    plan = plan_grid(paper("training.targets=[c,z]"), GridRequest(stages=(1,), points=points))
    assert [str(training.run_dir) for training in plan] == [
        "runs/p/learning_rate=1e-05/subj01/c",
        "runs/p/learning_rate=1e-05/subj01/z",
        "runs/p/learning_rate=0.001_heads=joint/subj01",
    ]
    for training, rate in zip(plan, (1e-5, 1e-5, 1e-3), strict=True):
        own = load_recipe("paper", training.overrides)
        assert own.training.learning_rate == config_of(paper(), training).training.learning_rate == rate
        assert own.run_dir == training.run_dir
    (latent,) = plan_grid(
        paper("training.targets=[z]"), GridRequest(stages=(1,), points=(("training.steps=[10, 10]",),))
    )
    for own in (load_recipe("paper", latent.overrides), config_of(paper(), latent)):
        assert own.training.schedule(1) == (10, 12), "the steps of the point, and z's own batch"


@pytest.mark.slow
def test_a_grid_over_settings_ends_with_one_table_of_validations(shards: list[str], tmp_path: Path) -> None:
    rates = ["--grid", "training.learning_rate=[1e-4,1e-2]", "training.validate_every=2", "training.targets=[g02]"]
    rates += ["training.heldout_fraction=0.4"]  # of some twenty images
    ended = nd_process("train", "demo", *shards, f"run_dir={tmp_path}", *rates, "--at-once", "2", "--ranks", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "grid.json").read_text())["trainings"]
    assert {(row["stage"], *row["settings"]) for row in found} == {
        (stage, f"training.learning_rate={rate}") for stage in (1, 2) for rate in ("0.0001", "0.01")
    }
    for row in found:
        assert row["images"] == "heldout"
        assert row["best"] <= row["last"]
        assert Path(row["run_dir"]).is_dir()
    lines = [line for line in ended.stdout.splitlines() if "heldout" in line]
    assert len(lines) == 4
    assert "learning_rate=0.0001" in ended.stdout
