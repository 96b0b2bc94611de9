"""Remembers a wish to stop while something runs, so that it can be passed on and everything can save first."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any

from launch.supervise.heartbeat import WISHES, Wanted


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals that this process was not started to ignore, as ``nohup`` and a shell's ``&`` ask for."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


class StopSignal:
    """Within its block, the signals of a user (ctrl-C), a scheduler or a closed terminal are noted, not obeyed.

    ``name`` is the last one's name (empty: none came), ``count`` how many came; `nd stop` counts as one, with --now as
    two: a second one does not wait until everything is saved. No more than ``most`` signals count.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""
        self.count = 0
        self.most = 2
        self._before: dict[int, Any] = {}  # Any: whatever signal.signal returned

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in heeded(self._NUMBERS)}
        return self

    @property
    def wanted(self) -> Wanted:
        """What a launch shall do after the signals so far."""
        return WISHES[min(self.count, 2)]

    def ask(self, wanted: Wanted) -> None:
        """Take note of `nd stop`, or with ``end`` of `nd stop --now`."""
        self.name, self.count = self.name or "`nd stop`", max(self.count, WISHES.index(wanted))

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name, self.count = signal.Signals(number).name, max(self.count, min(self.count + 1, self.most))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
