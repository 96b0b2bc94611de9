"""A torch profiler trace of a few training steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import profiler

from nd_dist.files import atomic_path

SKIPPED, WARM_UP, RECORDED = 2, 1, 3
"""Steps left alone (first steps allocate), steps that only warm the profiler, steps in the trace."""


def trace_path(run_dir: Path, stage: int, rank: int) -> Path:
    """Return the file of a rank's trace."""
    return run_dir / "profile" / f"stage{stage}-rank-{rank:04d}.json"


@contextmanager
def profiled(path: Path, is_wanted: bool) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after every step; writes the trace once its steps are made, or at the end."""
    if not is_wanted:
        yield lambda: None
        return

    def write(finished: profiler.profile) -> None:
        with atomic_path(path) as part:
            finished.export_chrome_trace(str(part))

    activities = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(profiler.ProfilerActivity.CUDA)
    schedule = profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1)
    with profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write, record_shapes=True, profile_memory=True
    ) as running:
        yield running.step
