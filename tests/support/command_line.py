"""`nd` as a user types it: its own ``main`` in this process, which pays for heavy imports once, or a new process."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from unittest.mock import patch

from launch.cli import main
from tests.support.waiting import HANG_S

ND = [sys.executable, "-m", "launch.cli"]
TERMINAL = {"COLUMNS": "200", "TERM": "dumb"}


@dataclass(frozen=True)
class Ended:
    """What a command left: exit code, and what it wrote to its two streams."""

    returncode: int
    stdout: str
    stderr: str


def nd(*words: str) -> Ended:
    """Run `nd` here."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["nd", *words]),
        patch.dict(os.environ, TERMINAL),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def nd_process(*words: str, **variables: str) -> Ended:
    """Run `nd` as a process, with further environment variables."""
    environ = {**os.environ, **TERMINAL, **variables}
    ended = subprocess.run([*ND, *words], capture_output=True, text=True, check=False, env=environ, timeout=HANG_S)
    return Ended(ended.returncode, ended.stdout, ended.stderr)
