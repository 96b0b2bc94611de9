"""What others add without editing this package: entry points of their own packages, and classes named in a recipe.

    [project.entry-points."nd_dist.metrics"]     # of the package my_lab
    sharpness = "my_lab.sharpness:metric"

An entry names a function that returns a ``Metric`` (group ``nd_dist.metrics``), a ``Protocol`` (``nd_dist.protocols``)
or, given the device, a ``Judge`` (``nd_dist.judges``). It imports from nd_dist when it is called, not before.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from nd_dist.errors import ConfigError


def registered(group: str, *given: object) -> dict[str, Any]:  # Any: what others register
    """Return what installed packages register in a group, by the entry's name; their functions get what is given."""
    return {entry.name: entry.load()(*given) for entry in sorted(entry_points(group=f"nd_dist.{group}"))}


def named_object(key: str, name: str) -> Any:
    """Return what a recipe names as ``module:Class``.

    Args:
        key: Where the recipe names it.
        name: The words.

    Raises:
        ConfigError: there is no such module, or it has no such class.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key} names something that is not there.",
            where=key,
            expected="clip, latent, pixels, or module:Class of an importable module",
            found=f"{name} ({error})",
        ) from error
