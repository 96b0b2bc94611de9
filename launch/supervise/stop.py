"""Remembers a signal to stop while something runs, so that it can be passed on and everything can save first."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals that this process was not started to ignore, as ``nohup`` and a shell's ``&`` ask for."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


class StopSignal:
    """Within its block, the signals of a user (ctrl-C), a scheduler or a closed terminal are noted, not obeyed.

    ``name`` is the last one's name (empty: none came), ``count`` how many came.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""
        self.count = 0
        self._before: dict[int, Any] = {}  # Any: whatever signal.signal returned

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in heeded(self._NUMBERS)}
        return self

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name, self.count = signal.Signals(number).name, self.count + 1

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
