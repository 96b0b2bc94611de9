"""Installed versions of the packages that can move a number. Standard library only, so that asking costs nothing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "webdataset", "mpi4py", "torchmetrics", "numpy")


def installed_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the version of each package, ``missing`` where it is not installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions
