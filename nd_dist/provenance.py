"""Where a number comes from: versions, code state, hashes, host. Put beside every result that is reported."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from typing import Any

from nd_dist.config import Config
from nd_dist.files import hash_json
from nd_dist.versions import CODE_DIR, VERSION, installed_versions

NUMERIC = re.compile(
    "(CUBLAS|CUDNN|GOMP|KMP|MIOPEN|MKL|OMP|OPENBLAS|ROCBLAS|TORCH)_|NVIDIA_TF32_OVERRIDE$|NCCL_(ALGO|PROTO)$"
)
"""Names of the variables of libraries that can move a number."""


def package_versions() -> dict[str, str]:
    """Return the installed version of every package that can move a number."""
    return {"python": platform.python_version(), "nd_dist": VERSION, **installed_versions()}


def git_state() -> str:
    """Return the commit of the checkout that runs, with ``+changes`` where files differ; "installed" outside one."""
    command = ["git", "-C", str(CODE_DIR), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "installed"


def config_hash(config: Config) -> str:
    """Return the hash of a whole recipe."""
    return hash_json(config.model_dump(mode="json"))


def provenance(config: Config, **more: object) -> dict[str, Any]:
    """Return the record that goes with a result: versions, code, config and its hash, variables, and ``more``."""
    return {
        "versions": package_versions(),
        "code": git_state(),
        "config_hash": config_hash(config),
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "environment": {name: value for name, value in sorted(os.environ.items()) if NUMERIC.match(name)},
        "platform": f"{platform.system()} {platform.machine()}, {sys.implementation.name}",
        **more,
    }
