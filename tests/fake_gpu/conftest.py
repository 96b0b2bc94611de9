"""What the checks on the pretended GPU share. They run in a process of their own: see ``test_fake_gpu``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields

import pytest

from benchmarks.support.gpu_budget import Cost, read_budget, write_budget

WRITE = "ND_GPU_BUDGET"
SLACK = 1.03  # other versions of torch count a few operations more or less
STALE = 0.85


class Budget:
    """Holds paths to the table, or collects a new one."""

    def __init__(self, is_written: bool) -> None:
        self._is_written = is_written
        self._found: dict[str, Cost] = {}
        self._allowed = {} if is_written else read_budget()

    def check(self, path: str, cost: Cost) -> None:
        """Fail where a path costs more than the table allows, or so much less that the table is out of date."""
        self._found[path] = cost
        if self._is_written:
            return
        assert path in self._allowed, f"{path} has no budget: {WRITE}=write pytest tests/fake_gpu writes the table"
        for item in fields(Cost):
            now, allowed = getattr(cost, item.name), getattr(self._allowed[path], item.name)
            most = allowed if item.name == "waits" else allowed * SLACK + 0.1
            assert now <= most, f"{path}: {item.name} is {now}, the budget {allowed}"
            assert now >= allowed * STALE - 0.5, f"{path}: {item.name} is only {now}, the budget {allowed} is stale"

    def close(self) -> None:
        """Write the table where that was asked for."""
        if self._is_written:
            write_budget(self._found)
        else:
            assert not (left := set(self._allowed) - set(self._found)), f"no path costs what the table says: {left}"


@pytest.fixture(scope="session")
def budget() -> Iterator[Budget]:
    """The budget table."""
    table = Budget(os.environ.get(WRITE) == "write")
    yield table
    table.close()
