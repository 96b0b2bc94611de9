"""The environment of started processes: what ranks are given on every host, and what this machine's processes get."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from nd_dist.config import Config
from nd_dist.versions import CODE_DIR

# Variables that the ranks on other hosts are given: everything that can move a number or a packet
CARRIED_PREFIXES = ("CUDA_LAUNCH_", "DS_", "FI_", "GLOO_", "HF_", "MKL_", "MPICH_", "NCCL_", "OMP_", "TORCH_", "UCX_")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY")


def carried_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the caller's variables that the ranks on every host are given; nothing that looks like a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(CARRIED_PREFIXES) and not SECRET.search(name)
    }


def rank_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every rank is given, on every host, in addition to its host's own."""
    threads, interface = str(config.launch.threads_per_rank), config.launch.interface
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return {
        **carried_environment(environ),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": environ.get("PYTHONPATH", ""),
        **chosen,
    }


def environment() -> Mapping[str, str]:
    """Return the environment for child processes: the caller's, with this package importable from anywhere."""
    others = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(CODE_DIR), *others]))}
