"""Processes that load first and then start together, so that a clock measures their work and not their imports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

Answer = dict[str, Any]  # Any: JSON


def wait_for_start() -> None:
    """Say in a process that it has loaded, and wait for the others."""
    print("ready", flush=True)
    sys.stdin.readline()


def answer(content: Mapping[str, object]) -> None:
    """Give a process's result: one line of JSON."""
    print(json.dumps(content), flush=True)


def run_together(commands: Sequence[Sequence[str]], env: Mapping[str, str]) -> tuple[float, list[Answer]]:
    """Start a process per command; return the seconds from the start of all to the last answer, and the answers.

    Args:
        commands: Each calls ``wait_for_start`` once it has loaded, and ``answer`` at its end.
        env: Their environment.
    """
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=dict(env)) for words in commands]
    streams = [(process.stdin, process.stdout) for process in processes]
    for _, output in streams:
        assert output is not None
        output.readline()
    began = time.perf_counter()
    for start, _ in streams:
        assert start is not None
        start.write("go\n")
        start.flush()
    answers = [json.loads(output.readline()) for _, output in streams if output is not None]
    took_s = time.perf_counter() - began
    for process in processes:
        process.communicate()
    return took_s, answers
