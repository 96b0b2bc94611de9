"""How many shards a process may keep open. Nothing but the standard library: reader processes import it."""

from __future__ import annotations

import resource
from contextlib import suppress

_MOST = 4096  # eight subjects have some 1,500 shards


def max_open_shards() -> int:
    """Return how many shards stay open: a quarter of the files that this process may open.

    Threads that read may use as many again (``max_shards_at_once``), mappings hold a file each, and the rest is for
    others.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(4, min(_MOST, soft // 4))


def max_shards_at_once(threads: int) -> int:
    """Return how many shards each of some threads may use at a time."""
    return max(1, max_open_shards() // threads)


def allow_more_open_files() -> None:
    """Let this process and its children open as many files as shards ask for, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MOST if hard == resource.RLIM_INFINITY else min(4 * _MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
