"""Conformance: this implementation against reference cases, file by file and quantity by quantity.

To add a family of cases, write one file with a ``check(folder)`` generator and enter it in ``runner.FAMILIES``.
"""

from nd_dist.conformance.rows import Row
from nd_dist.conformance.runner import run_conformance

__all__ = ["Row", "run_conformance"]
