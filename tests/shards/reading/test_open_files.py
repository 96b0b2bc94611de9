from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from shards.reading.open_files import allow_more_open_files, max_open_shards, max_shards_at_once


def in_process(soft: int, hard: int) -> list[int]:
    """Return (soft limit, open shards, shards at once) before and after asking for more, in a process of its own."""
    program = f"""
import resource
from shards.reading import open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
for _ in range(2):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    print(soft, open_files.max_open_shards(), open_files.max_shards_at_once(4))
    open_files.allow_more_open_files()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_shards_take_their_share_of_the_files_that_may_be_open() -> None:
    assert in_process(256, 256) == [256, 64, 16] * 2
    assert in_process(128, 512) == [128, 32, 8, 512, 128, 32]


def test_no_more_files_are_asked_for_than_shards_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for limits in ((1024, resource.RLIM_INFINITY), (1024, 10**6), (20_000, 10**6), (resource.RLIM_INFINITY,) * 2):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        allow_more_open_files()
    assert asked == [(16_384, resource.RLIM_INFINITY), (16_384, 10**6)]
    assert (max_open_shards(), max_shards_at_once(2)) == (4096, 2048)
