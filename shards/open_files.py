"""How many shards a process may keep open. Nothing but the standard library: reader processes import it."""

from __future__ import annotations

import resource

_MOST = 4096  # eight subjects have some 1,500 shards


def max_open_shards() -> int:
    """Return how many shards stay open: a quarter of the files that this process may open.

    As many again may be in use by threads that read, and the rest is for others.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(4, min(_MOST, soft // 4))


def max_shards_at_once() -> int:
    """Return how many shards one thread has in use at a time."""
    return max_open_shards() // 4


def allow_more_open_files() -> None:
    """Let this process and its children open as many files as shards ask for, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MOST if hard == resource.RLIM_INFINITY else min(4 * _MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
