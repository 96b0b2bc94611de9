"""The hosts of batch systems, from what they say to the processes of a job."""

from pathlib import Path

import pytest

from launch.plans.allocation import batch_hosts, is_slurm_head, slurm_hosts
from launch.plans.hosts import Host
from nd_dist.errors import ConfigError

TWO = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("said", "slots"),
    [
        ({"SLURM_TASKS_PER_NODE": "4(x2)"}, [4, 4]),
        ({"SLURM_TASKS_PER_NODE": "3,1", "SLURM_NTASKS": "4"}, [3, 1]),
        ({"SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4"}, [2, 2]),
        ({"SLURM_NTASKS_PER_NODE": "4"}, [4, 4]),
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, [8, 8]),  # sbatch -N2 --gpus-per-node=8
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_PER_NODE": "a100:8"}, [8, 8]),
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "8"}, [1, 1]),  # asked for
        ({"SLURM_TASKS_PER_NODE": "1"}, [6, 6]),  # of a step
        ({}, [6, 6]),
    ],
)
def test_slots_are_the_tasks_that_were_asked_for_else_the_gpus(said: dict[str, str], slots: list[int]) -> None:
    assert slurm_hosts({**TWO, **said}, ranks_per_node=6) == (Host("n1", slots[0]), Host("n2", slots[1]))


def test_runs_of_equal_counts_are_read() -> None:
    environ = {"SLURM_JOB_NODELIST": "gpu[08-10],login", "SLURM_TASKS_PER_NODE": "2(x3),1"}
    assert [(host.name, host.slots) for host in slurm_hosts(environ, 1)] == [
        ("gpu08", 2), ("gpu09", 2), ("gpu10", 2), ("login", 1),
    ]  # fmt: skip


def test_counts_of_an_unknown_form_and_no_allocation_are_refused() -> None:
    with pytest.raises(ConfigError, match="SLURM_TASKS_PER_NODE"):
        slurm_hosts({**TWO, "SLURM_TASKS_PER_NODE": "2*2"}, 1)
    with pytest.raises(ConfigError, match="nd submit"):
        slurm_hosts({}, 1)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TWO, True),  # salloc
        ({**TWO, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}, True),  # the script of sbatch
        ({**TWO, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, True),  # salloc's shell on a node
        ({**TWO, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --pty bash
        ({"SLURM_JOB_ID": "5"}, False),
        ({}, False),
    ],
)
def test_only_outside_of_steps_steps_can_be_started(environ: dict[str, str], expected: bool) -> None:
    assert is_slurm_head(environ) is expected


def test_pbs_lsf_and_sge_list_the_hosts_of_a_job(tmp_path: Path) -> None:
    names, rows = tmp_path / "nodes", tmp_path / "pe"
    names.write_text("a.cluster\na.cluster\nb.cluster\nb.cluster\n")
    rows.write_text("a.cluster 2 all.q@a.cluster UNDEFINED\nb.cluster 2 all.q@b.cluster UNDEFINED\n")
    for environ in (
        {"PBS_NODEFILE": str(names)},
        {"LSB_DJOB_HOSTFILE": str(names)},
        {"LSB_MCPU_HOSTS": "a.cluster 2 b.cluster 2"},
        {"LSB_HOSTS": "a.cluster a.cluster b.cluster b.cluster"},
        {"PE_HOSTFILE": str(rows)},
    ):
        assert batch_hosts(environ) == (Host("a.cluster", 2), Host("b.cluster", 2)), environ
    assert batch_hosts({"PBS_JOBID": "1"}) == ()
    with pytest.raises(ConfigError, match="cannot be read"):
        batch_hosts({"PE_HOSTFILE": str(tmp_path / "none")})
