"""How a test waits: until it is so. A hang ends some time; a busy machine is no failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
HANG_S = 1800  # seconds; far beyond what any test needs, on any machine


def wait_until(condition: Callable[[], T], what: str = "", pause_s: float = 0.01) -> T:
    """Ask again and again, and return the first answer that counts as true.

    Raises:
        AssertionError: there was none; ``what`` says what was waited for.
    """
    end = time.monotonic() + HANG_S
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited {HANG_S} s in vain: {what}"
        time.sleep(pause_s)
    return answer
