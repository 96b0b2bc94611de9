"""Where this code lies, and which versions of the packages that can move a number are installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

VERSION = "0.1.0"
CODE_DIR = Path(__file__).resolve().parent.parent
"""Folder that holds this package and the two above it."""
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


def code_digest() -> str:
    """Return a short hash over the source files of the three packages that this interpreter imports."""
    digest = hashlib.sha256()
    for package in ("launch", "nd_dist", "shards"):
        for path in sorted((CODE_DIR / package).rglob("*.py")):
            digest.update(f"{path.relative_to(CODE_DIR)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
