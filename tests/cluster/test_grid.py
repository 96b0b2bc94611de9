"""The grid of trainings over two hosts: ctrl-C at the head, a host that is cut off, and the same command again."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from nd_dist.events import events_path, read_events
from nd_dist.models.decoder import Decoder
from tests.cluster.hosts import Cluster
from tests.cluster.jobs import Job, end_of, record, run_nd, wait_until_clear, words_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow
NETWORKS = ("z", "g02")
STEPS = (150, 4)
LONG = (3000, 4)


def start(cluster: Cluster, folder: Path, steps: tuple[int, int] = STEPS) -> Job:
    """Start the grid on the first host and wait until both hosts train."""
    job = Job(cluster, "node1", grid_words(folder, steps), folder / "run")
    for network in NETWORKS:
        wait_until(lambda name=network: len(steps_of(folder, name)) > 8, f"steps of {network}")
    assert {host_of(folder, network) for network in NETWORKS} == {"node1", "node2"}
    return job


def grid_words(folder: Path, steps: tuple[int, int] = STEPS) -> list[str]:
    grid = {
        "decoder__heads": "single",
        "training__targets": f"[{','.join(NETWORKS)}]",
        "training__steps": f"[{steps[0]},{steps[1]}]",
    }
    return ["train", "demo", *words_of(folder, **grid), "--subjects", "1", "--hostfile", str(folder / "hosts")]


def events_of(folder: Path, network: str) -> list[dict[str, object]]:
    return list(read_events(events_path(folder / "run" / "subj01" / network, 0)))


def steps_of(folder: Path, network: str) -> list[tuple[object, object]]:
    return [(e["stage"], e["step"]) for e in events_of(folder, network) if e["event"] == "train_step"]


def host_of(folder: Path, network: str) -> object:
    """Return the host on which a network's training began."""
    return next(event["host"] for event in events_of(folder, network) if event["event"] == "rank_start")


def assert_completed(cluster: Cluster, folder: Path) -> None:
    """Run the same command again: every training ends, and the subject's decoder is there."""
    run_nd(cluster, "node1", *grid_words(folder))
    every = {(stage, step) for stage in (1, 2) for step in range(STEPS[stage - 1])}
    for network in NETWORKS:
        assert set(steps_of(folder, network)) == every
    merged = Decoder.load(folder / "run" / "subj01" / "checkpoints" / "stage2" / "model")
    assert {target.name for target in merged.targets} == set(NETWORKS)
    wait_until_clear(cluster)


def test_ctrl_c_lets_every_training_save_and_the_same_command_makes_every_step_once(
    healthy: Cluster, broken: Path
) -> None:
    job = start(healthy, broken)
    job.signal(signal.SIGINT)
    code, text = end_of(job, "ctrl-C, the grid over ssh", time.monotonic())
    assert code == 5, text
    assert_completed(healthy, broken)
    for network in NETWORKS:
        assert len(steps_of(broken, network)) == sum(STEPS), "a step was lost or made twice"


def test_a_grid_is_stopped_from_a_host_that_takes_no_part_in_it(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken, LONG)
    answer = run_nd(healthy, "node3", "stop", str(broken / "run"))
    code, text = end_of(job, "nd stop of the grid on another host", time.monotonic())
    assert (code, "Stopped by `nd stop`" in text) == (5, True), text
    assert answer.count("stopped train") == len(NETWORKS)


def test_a_host_that_is_cut_off_is_named_clears_itself_and_the_same_command_goes_on(
    healthy: Cluster, broken: Path
) -> None:
    job = start(healthy, broken, LONG)
    began = time.monotonic()
    healthy.cut("node2")
    wait_until(lambda: not healthy.hosts["node2"].leftovers(), "node2 cleared itself")
    record(fault="link cut for good, the grid over ssh", host_clear_s=round(time.monotonic() - began, 1))
    job.signal(signal.SIGINT)  # the other host's training would last for long
    code, text = end_of(job, "link cut for good, the grid over ssh, then ctrl-C", time.monotonic())
    assert code == 5, text
    assert "host node2 does not respond any more" in text
    healthy.repair()
    again = Job(healthy, "node1", grid_words(broken, LONG), broken / "run")
    for network in NETWORKS:
        wait_until(lambda name=network: loaded(broken, name), f"a loaded checkpoint of {network}")
    again.signal(signal.SIGINT)
    assert end_of(again, "ctrl-C, the grid over ssh", time.monotonic())[0] == 5


def loaded(folder: Path, network: str) -> list[dict[str, object]]:
    return [event for event in events_of(folder, network) if event["event"] == "checkpoint_loaded"]


def test_a_killed_host_fails_its_training_only(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    healthy.crash("node2")
    code, text = end_of(job, "host killed, the grid over ssh", time.monotonic())
    assert code == 4, text
    assert "Hosts that do not respond any more: node2" in text
    done = {network for network in NETWORKS if len(steps_of(broken, network)) == sum(STEPS)}
    assert len(done) == 1, "the other host's network is done with both stages"
    healthy.repair()
    assert_completed(healthy, broken)
