"""``python -m launch.phantom_networks`` as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.phantom_networks import main
from nd_dist.errors import CheckpointError, ConfigError, RankFailure, Requeue
from nd_dist.events import events_path, read_events
from shards.phantom.networks.trainer import average_path
from tests.ranks.launching import ROOT, environment
from tests.support.waiting import HANG_S, wait_until

TOY = ["stages=[vae]", "vae.steps=60", "vae.batch_size=4",
       "checkpoint_every=20"]  # fmt: skip


def start(out_dir: Path, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launch.phantom_networks", str(out_dir), *TOY, "--ranks", str(ranks)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def interrupt(out_dir: Path, act: Callable[[subprocess.Popen[bytes]], None]) -> int:
    """Start two ranks, act once five steps are made, and return the exit code."""
    process = start(out_dir, 2)

    def has_trained() -> bool:
        assert process.poll() is None
        return sum(event["event"] == "train_step" for event in read_events(events_path(out_dir, 0))) >= 5

    wait_until(has_trained)
    act(process)
    return process.wait(HANG_S)


def kill_last_rank(out_dir: Path) -> None:
    events = read_events(events_path(out_dir, 1))
    os.kill([event["pid"] for event in events if event["event"] == "rank_start"][-1], signal.SIGKILL)


@pytest.mark.slow
def test_after_a_killed_rank_and_after_a_stop_the_same_command_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight, killed, stopped = (tmp_path / name for name in ("straight", "killed", "stopped"))
    assert start(straight, 2).wait(HANG_S) == 0
    assert interrupt(killed, lambda _: kill_last_rank(killed)) == RankFailure.exit_code
    assert start(killed, 2).wait(HANG_S) == 0
    assert interrupt(stopped, lambda process: process.send_signal(signal.SIGTERM)) == Requeue.exit_code
    saved = [event["step"] for event in read_events(events_path(stopped, 0)) if event["event"] == "checkpoint_saved"]
    assert saved[-1] >= 5  # not only where one was due
    assert start(stopped, 2).wait(HANG_S) == 0
    expected = load_file(average_path(straight, "vae"))
    for folder in (killed, stopped):
        found = load_file(average_path(folder, "vae"))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_exporting_before_training_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"python -m launch\.phantom_networks"):
        main([str(tmp_path), "--export", str(tmp_path / "folders")])


@pytest.mark.parametrize("override", ["vea.steps=3", "stages=[vea]", "vae"])
def test_an_unknown_key_or_network_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        main([str(tmp_path), override])


def test_ranks_that_do_not_divide_a_batch_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide the 8 rows"):
        main([str(tmp_path), "--ranks", "3"])
    assert not (tmp_path / "config.yaml").exists()


def test_a_dry_run_shows_deepspeeds_launcher_and_its_hosts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("alpha slots=2\nbeta slots=2\n")
    main([str(tmp_path / "out"), "--hostfile", str(tmp_path / "hosts"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "deepspeed.launcher.runner" in printed
    assert "launch.ranks.phantom_networks" in printed
    assert "alpha" in printed
    assert printed.endswith("# would start\n")
    assert not (tmp_path / "out").exists()
