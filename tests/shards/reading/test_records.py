from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from shards.reading.records import allow_more_open_files, max_open_shards


def in_process(soft: int, hard: int) -> list[int]:
    """Return (soft limit, open shards) before and after asking for more, in a process of its own."""
    program = f"""
import resource
from shards.reading import records
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
for _ in range(2):
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], records.max_open_shards())
    records.allow_more_open_files()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_shards_take_half_of_the_files_that_may_be_open() -> None:
    assert in_process(256, 256) == [256, 128] * 2
    assert in_process(128, 512) == [128, 64, 512, 256]


def test_no_more_files_are_asked_for_than_shards_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for limits in ((1024, resource.RLIM_INFINITY), (1024, 10**6), (20_000, 10**6), (resource.RLIM_INFINITY,) * 2):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        allow_more_open_files()
    assert asked == [(8192, resource.RLIM_INFINITY), (8192, 10**6)]
    assert max_open_shards() == 4096
