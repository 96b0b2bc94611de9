"""What goes into the processes of a launch, what goes along to other hosts, and what stays out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plans.environment import (
    carried_environment,
    environment,
    is_foreign,
    rank_environment,
    stays_behind,
    visible_devices,
)
from launch.plans.plan import LaunchPlan
from launch.recipe import load_recipe
from nd_dist.config import LaunchConfig
from nd_dist.errors import ConfigError
from nd_dist.provenance import provenance
from tests.support.environments import (
    FOREIGN,
    KNOWN,
    SECRETS,
    SHELL,
    SLURM,
    WORDS,
    assert_as_planned,
    rank_environments,
)

LAUNCH = [sys.executable, "-m", "tests.support.launch_program"]
STEP = {**SLURM, "SLURM_NODELIST": "here", "SLURM_JOB_NODELIST": "here"}


def test_what_moves_numbers_or_packets_is_carried_and_no_secret() -> None:
    kept = {name: value for name, value in KNOWN.items() if name != "MY_OWN"}
    given = {**SHELL, "HOME": "/root", "PATH": "/bin", "LD_LIBRARY_PATH": "/lib", "LS_COLORS": "x"}
    assert carried_environment(given) == kept
    assert carried_environment(given, ["MY_OWN", "WANDB_API_KEY"]) == {**KNOWN, "WANDB_API_KEY": "k"}


def test_known_variables_that_stay_behind_are_named_once() -> None:
    note = stays_behind({**SHELL, "CUDA_VISIBLE_DEVICES": "1"}, LaunchConfig(carry=("HF_TOKEN", "ABSENT")))
    assert note.count("AWS_SECRET_ACCESS_KEY, CUDA_VISIBLE_DEVICES, HTTPS_PROXY, WANDB_API_KEY") == 1
    assert "HF_TOKEN" not in note
    assert "ABSENT, which is not set" in note
    assert stays_behind(KNOWN, LaunchConfig()) == ""


def test_the_recipe_sets_variables_but_none_that_launchers_set() -> None:
    env = rank_environment(load_recipe("demo", ["launch.env={NCCL_IB_HCA: mlx5_0, NCCL_MIN_NCHANNELS: 4}"]), {})
    assert (env["NCCL_IB_HCA"], env["NCCL_MIN_NCHANNELS"]) == ("mlx5_0", "4")
    assert rank_environment(load_recipe("demo", ["launch.env.NCCL_DEBUG=INFO"]), {})["NCCL_DEBUG"] == "INFO"
    for wrong in ("launch.env={RANK: 1}", "launch.env={SLURM_JOB_ID: 1}", "launch.env={A B: 1}", "launch.carry=[A=1]"):
        with pytest.raises(ConfigError):
            rank_environment(load_recipe("demo", [wrong]), {})


@pytest.mark.parametrize(
    "name",
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CROSS_RANK", "PMI_RANK", "PMI_FD",
     "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_plm", "MPI_LOCALRANKID", "PBS_NODEFILE", "LSB_HOSTS",
     "PE_HOSTFILE", "SLURM_JOB_ID", "SLURMD_NODENAME", "SRUN_CPUS_PER_TASK", "PET_NNODES", *FOREIGN],
)  # fmt: skip
def test_variables_of_launchers_and_schedulers_are_foreign_to_a_launch(name: str) -> None:
    assert is_foreign(name)


@pytest.mark.parametrize("name", ["PATH", "OMPI_MCA_btl", "PMIX_MCA_gds", "OMPI_ALLOW_RUN_AS_ROOT", "LS_COLORS",
                                  "RANKING", "CUDA_VISIBLE_DEVICES", "SPBS_X", *KNOWN, *SECRETS])  # fmt: skip
def test_other_variables_are_not(name: str) -> None:
    assert not is_foreign(name)


def test_srun_keeps_its_allocation_but_nothing_of_a_step_above(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "SLURM_EXPORT_ENV": "NONE", "PMI_RANK": "0", "CUDA_VISIBLE_DEVICES": "4,5"}.items():
        monkeypatch.setenv(name, value)
    kept = environment(LaunchPlan(("srun", "true"), {}, 1))
    assert {name for name in kept if name.startswith(("SLURM", "PMI"))} == {
        "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODELIST", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE",
    }  # fmt: skip
    assert kept["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert not {name for name in environment(LaunchPlan(("mpirun",), {}, 1)) if name.startswith(("SLURM", "PMI"))}


@pytest.mark.parametrize(
    ("devices", "seen", "expected"),
    [
        ((), None, {}),
        ((), "2,3", {"CUDA_VISIBLE_DEVICES": "2,3"}),
        ((), "", {"CUDA_VISIBLE_DEVICES": ""}),
        ((1,), None, {"CUDA_VISIBLE_DEVICES": "1"}),
        ((1, 2), "4, 5,6", {"CUDA_VISIBLE_DEVICES": "5,6"}),
        ((0,), "GPU-a,GPU-b", {"CUDA_VISIBLE_DEVICES": "GPU-a"}),
        ((1,), "MIG-a,MIG-b", {"CUDA_VISIBLE_DEVICES": "MIG-b"}),
    ],
)
def test_gpus_are_chosen_by_name_among_those_that_are_visible(
    devices: tuple[int, ...], seen: str | None, expected: dict[str, str]
) -> None:
    assert visible_devices(devices, {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen}) == expected


def test_a_gpu_that_is_not_visible_is_refused() -> None:
    with pytest.raises(ConfigError, match="not visible"):
        visible_devices((2,), {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_variables_that_move_numbers_are_part_of_the_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    found = provenance(load_recipe("demo"))["environment"]
    assert found["NVIDIA_TF32_OVERRIDE"] == "0"
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not {*SECRETS, "WANDB_MODE", "AWS_PROFILE"} & set(found)


@pytest.fixture
def stub_srun(tmp_path: Path) -> Path:
    """A folder for PATH whose `srun` says that it was called and hangs, as in a step whose resources are taken."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nsleep 600\n")
    (folder / "srun").chmod(0o755)
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("devices", ["2,3", "GPU-a,GPU-b", ""])
@pytest.mark.parametrize(("command", "ranks"), [("train", 1), ("train", 2), ("pack", 2)])
def test_ranks_on_this_machine_get_the_visible_gpus_the_known_variables_and_nobody_elses(
    command: str, ranks: int, devices: str, stub_srun: Path, tmp_path: Path
) -> None:
    inherited = {name: value for name, value in os.environ.items() if not is_foreign(name)}
    shell = {**inherited, **SHELL, **STEP, "PATH": f"{stub_srun}:{os.environ['PATH']}"}
    words = [command, str(tmp_path / "run"), "environment", *WORDS, f"--ranks={ranks}"]
    result = subprocess.run(
        [*LAUNCH, *words], env={**shell, "CUDA_VISIBLE_DEVICES": devices}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    environments = rank_environments(tmp_path / "run", ranks)
    assert len(environments) == ranks
    assert_as_planned(environments)
    for found in environments:
        assert found["CUDA_VISIBLE_DEVICES"] == devices
        assert not [name for name in found if name.startswith(("SLURM_", "PBS_", "LSB_"))]
        assert found["WANDB_API_KEY"] == "k"  # they are this shell's own children
    differing = {name for name, value in environments[0].items() if environments[-1].get(name) != value}
    assert differing <= {"RANK", "LOCAL_RANK", "PMI_RANK", "MPI_LOCALRANKID", "PMI_FD", "HYDI_CONTROL_FD"}
    assert not (tmp_path / "called").exists()


@pytest.mark.launch
@pytest.mark.parametrize("devices", ["2,3", "GPU-a,MIG-b"])
def test_deepspeeds_own_launcher_gives_every_rank_the_visible_gpus(devices: str, tmp_path: Path) -> None:
    """The words that `nd train --ranks 2` runs, with a program that only shows the variable in the rank's place."""
    (tmp_path / "show.py").write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    from launch.plans.choose import LaunchOptions, make_plan
    from launch.plans.tools import find_tools

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", devices)
        plan = make_plan("train", load_recipe("demo"), LaunchOptions(ranks=2), find_tools(), "L")
        start = plan.argv[: plan.argv.index("--module")]
        words = [*start, str(tmp_path / "show.py"), str(tmp_path)]
        subprocess.run(words, env=environment(plan), check=True, capture_output=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [devices] * 2
