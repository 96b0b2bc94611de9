"""Every rank on every host has the same variables, whatever starter reached it: all of `os.environ` is compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster
from tests.cluster.jobs import hostfile, require_launcher
from tests.support.environments import SECRETS, SHELL, SLURM, WORDS, assert_as_planned, rank_environments

# of the rank, of its host, or of the way to it; everything else must be equal
OWN = (
    "RANK", "LOCAL_RANK", "CROSS_RANK", "PMI_", "PMIX_", "HYDI_", "OMPI_", "SSH_", "SHELL", "SHLVL", "USER", "LOGNAME",
    "MAIL", "HOME", "PWD", "OLDPWD", "_", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_", "TERM",
    "COLUMNS", "MOTD_SHOWN", *SECRETS, "PDSH_", "OMPI_ALLOW", "DS_ENV_FILE",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # DeepSpeed sets it where it is imported, in its launcher too
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "launcher"), [("train", "deepspeed-pdsh"), ("train", "deepspeed-openmpi"), ("pack", "mpirun")]
)
def test_ranks_on_two_hosts_have_the_same_variables(
    command: str, launcher: str, healthy: Cluster, tmp_path: Path
) -> None:
    require_launcher(launcher)
    folder = healthy.folder / tmp_path.name
    folder.mkdir()
    hosts = hostfile(folder, "node1 slots=1", "node2 slots=1")
    words = [command, str(folder / "run"), "environment", *WORDS, f"--hostfile={hosts}", f"--launcher={launcher}"]
    shell = {**healthy.environment(), **SHELL, **SLURM, "CUDA_VISIBLE_DEVICES": "4,5"}
    program = [sys.executable, "-m", "tests.support.launch_program", *words]
    result = healthy.run("node1", program, env=shell)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in (*SECRETS, "CUDA_VISIBLE_DEVICES"):
        assert result.stdout.count(name) == 1, result.stdout
    first, second = environments = rank_environments(folder / "run", 2)
    assert_as_planned(environments)
    names = {name for name in {**first, **second} if first.get(name) != second.get(name)}
    assert not {name for name in names if not name.startswith(OWN)}, names
    for found in environments:
        assert found.get("CUDA_VISIBLE_DEVICES") in (None, "0"), "GPUs of the launching machine"
        assert not [name for name in found if name.startswith("SLURM_")]
