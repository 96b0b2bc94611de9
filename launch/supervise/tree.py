"""What a starting process leaves on this machine: found through the kernel, also where it gave itself a session."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time

import psutil

GONE_WITHIN_S = 10.0
POLL_S = 0.02
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class ProcessTree:
    """Everything that is started below this process while the context is open, but for what was there before.

    mpirun starts its ssh in sessions of their own: killing mpirun's session leaves them, and where a link is cut they
    wait for ever. Inside the context the kernel makes orphans children of this process (Linux), so none gets away.
    """

    def __init__(self) -> None:
        self._before: set[psutil.Process] = set()

    def __enter__(self) -> ProcessTree:
        self._before = set(psutil.Process().children(recursive=True))
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        return self

    def __exit__(self, *_: object) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 0)

    def kill(self) -> None:
        """Kill everything of the tree and wait until it is gone, but for what hangs in the kernel."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (alive := self._found()) and time.monotonic() < deadline:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                with contextlib.suppress(ChildProcessError):  # a grandchild: it is this process's once its parent ends
                    os.waitpid(process.pid, os.WNOHANG)
            time.sleep(POLL_S)

    def _found(self) -> list[psutil.Process]:
        return [process for process in psutil.Process().children(recursive=True) if process not in self._before]


def prctl(option: int, value: int) -> None:
    """Set an option of this process that only Linux has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
