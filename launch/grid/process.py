"""One training of the grid as a process: `nd train` on this machine, or over ssh on another host."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.grid.plan import Slot
from launch.plans.deepspeed import SSH_OPTIONS
from launch.plans.environment import carried_environment, visible_devices
from launch.supervise.tree import PR_SET_PDEATHSIG, prctl

CTRL_C = b"\x03"
# a terminal, so that the remote `nd` gets ctrl-C from here
SSH = ("ssh", "-tt", "-e", "none", *shlex.split(SSH_OPTIONS))
SSH_FAILED = 255  # ssh's own exit code; `nd` has none of that number


def command_of(
    slot: Slot, words: Sequence[str], launch_id: str, environ: Mapping[str, str], carry: Sequence[str] = ()
) -> list[str]:
    """Return the command of a training in a slot: here, or over ssh on the slot's host.

    Args:
        slot: Where.
        words: The training's words after the Python that runs it.
        launch_id: The grid's: an option without effect, by which the host's agent knows what belongs to the grid.
        environ: This process's environment; what moves numbers or packets goes along.
        carry: Names of further variables that go along.
    """
    if slot.is_local:
        return [sys.executable, *words]
    carried = {**carried_environment(environ, carry), "PYTHONPATH": environ["PYTHONPATH"], "TTY_COMPATIBLE": "0"}
    variables = [*(f"{name}={value}" for name, value in carried.items()), *slot_variables(slot)]
    command = shlex.join([*variables, sys.executable, "-X", f"launch={launch_id}", *words])
    return [*SSH, slot.host, f"cd {shlex.quote(os.getcwd())} && exec env {command}"]


def slot_variables(slot: Slot) -> list[str]:
    """Return the variable that gives a training its GPUs; here they count through those that this process sees."""
    given = visible_devices(slot.devices, os.environ if slot.is_local else {})
    return [f"{name}={value}" for name, value in given.items()]


class TrainingProcess:
    """A training that runs.

    Args:
        slot: Where.
        command: See ``command_of``.
        environ: Environment to start it from.
        log: Takes what it prints.
    """

    def __init__(self, slot: Slot, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.slot = slot
        variables = dict(word.split("=", 1) for word in slot_variables(slot)) if slot.is_local else {}
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                command,
                env={**environ, **variables},
                stdin=subprocess.DEVNULL if slot.is_local else subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # it saves when the grid is killed
            )

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Let it save and leave; asked twice, it does not wait for its ranks."""
        if self._process.stdin is None:
            self._process.send_signal(signal.SIGTERM)
            return
        with contextlib.suppress(OSError):  # it has just ended
            self._process.stdin.write(CTRL_C)
            self._process.stdin.flush()

    def give_up(self) -> None:
        """End this side of it: its host does not respond any more."""
        self._process.kill()

    def close(self) -> None:
        """Close what is open to a process that has ended."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
