import sys
from pathlib import Path

import pytest

from launch.plans.choose import LaunchOptions, make_plan
from launch.plans.slurm import allocated_hosts
from launch.plans.tools import Tools, slurm_mpi
from launch.recipe import load_recipe
from nd_dist.errors import ConfigError


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[08-10],login")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")


def test_the_hosts_of_an_allocation_come_from_slurm(allocation: None) -> None:
    environ = {"SLURM_JOB_NODELIST": "gpu[08-10],login", "SLURM_NTASKS_PER_NODE": "4"}
    assert [(host.name, host.slots) for host in allocated_hosts(environ, 1)] == [
        ("gpu08", 4), ("gpu09", 4), ("gpu10", 4), ("login", 4),
    ]  # fmt: skip
    plan = make_plan("train", load_recipe("demo"), LaunchOptions(launcher="srun"), Tools("python"), "L")
    assert plan.ranks == 16
    evaluate = make_plan("evaluate", load_recipe("demo"), LaunchOptions(launcher="srun"), Tools("python"), "L")
    assert "--kill-on-bad-exit=0" in evaluate.argv


def test_srun_outside_an_allocation_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="nd submit"):
        allocated_hosts({}, 1)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_srun_is_given_the_recipes_own_words(command: str, allocation: None) -> None:
    words = ["slurm.srun_options=[--container-image=/images/nd.sqsh,--container-mounts=/scratch]"]
    argv = make_plan(command, load_recipe("demo", words), LaunchOptions(launcher="srun"), Tools("python"), "L").argv
    program = argv.index("python") if command == "evaluate" else argv.index("bash")
    assert argv[program - 2 : program] == ("--container-image=/images/nd.sqsh", "--container-mounts=/scratch")


def test_mpi_ranks_are_started_by_the_plugin_that_the_recipe_names_or_the_one_that_was_found(allocation: None) -> None:
    def plan(found: str, *words: str) -> tuple[str, ...]:
        tools = Tools("python", slurm_mpi=found)
        return make_plan("evaluate", load_recipe("demo", words), LaunchOptions(launcher="srun"), tools, "L").argv

    assert "--mpi=pmix" in plan("pmix")
    assert "--mpi=pmi2" in plan("pmix", "slurm.mpi=pmi2")
    assert "--mpi=none" in plan("", "slurm.mpi=none")
    with pytest.raises(ConfigError, match="slurm.mpi="):
        plan("")


@pytest.mark.parametrize(
    ("library", "plugins", "expected"),
    [
        ("MPICH Version: 5.0.2", "pmix none cray_shasta pmi2", "pmi2"),
        ("Intel(R) MPI Library 2021.18", "none pmi2", "pmi2"),
        ("Open MPI v5.0.11", "none pmi2 pmix pmix_v4", "pmix"),
        ("Open MPI v4.1.4", "none pmi2", ""),
        ("MPI VERSION : CRAY MPICH version 8", "none cray_shasta", "cray_shasta"),
        ("MPICH Version: 5.0.2", "none pmix", ""),
    ],
)
def test_the_plugin_fits_the_library_of_mpi4py(
    library: str, plugins: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("srun", f"MPI plugin types are...\n{plugins}"), ("python", library)):
        (tmp_path / name).write_text(f"#!/bin/sh\ncat >&2 <<END\n{text}\nEND\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm_mpi(str(tmp_path / "python")) == expected


def test_without_an_answer_of_srun_there_is_no_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_mpi(sys.executable) == ""
