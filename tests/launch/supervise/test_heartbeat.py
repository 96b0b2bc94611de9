"""Who is taken for dead, and where."""

import os
import subprocess
from pathlib import Path

import pytest

from launch.supervise.heartbeat import Heartbeat, has_died_here, launch_record_path, process_identity
from nd_dist.files import write_json


@pytest.fixture
def gone() -> dict[str, object]:
    """The record of a launcher of this host that is no more."""
    with subprocess.Popen(["true"]) as process:
        pass
    return {**process_identity(), "pid": process.pid, "launch": "L", "wanted": "run"}


def test_a_process_number_counts_only_where_it_was_given_out(gone: dict[str, object]) -> None:
    assert has_died_here(gone)
    assert not has_died_here({**gone, "pid": os.getpid()})
    assert not has_died_here({**gone, "host": "elsewhere"})
    assert not has_died_here({**gone, "pid_namespace": "pid:[1]"}), "a container on this host"


def test_a_rank_in_a_container_does_not_take_its_launcher_outside_for_dead(
    gone: dict[str, object], tmp_path: Path
) -> None:
    write_json(launch_record_path(tmp_path), {**gone, "pid_namespace": "pid:[1]"})
    assert Heartbeat(tmp_path, "L").look() == "run"
    write_json(launch_record_path(tmp_path), gone)
    assert Heartbeat(tmp_path, "L").look() == "end"
