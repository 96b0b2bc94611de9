import json
import os
import time
from pathlib import Path

from launch.commands.status import is_launcher_alive, summarize
from launch.supervise.heartbeat import launch_record_path
from launch.supervise.lock import RunFolder
from tests.support.command_line import nd


def event(name: str, rank: int, time: float, **fields: object) -> dict[str, object]:
    return {"event": name, "rank": rank, "time": time, "command": "train", **fields}


def start(rank: int, at: float, host: str, launch: str = "B") -> dict[str, object]:
    return event("rank_start", rank, at, launch=launch, host=host, size=2)


def step(rank: int, at: float, number: int, samples_per_s: float = 40.0) -> dict[str, object]:
    return event("train_step", rank, at, stage=1, step=number, step_s=0.5, samples_per_s=samples_per_s)


RUNNING = [
    [start(0, 1, "node1"), step(0, 2, 0, 10.0), step(0, 3, 1, 30.0),
     event("progress", 0, 3, task="stage 1", done=2, total=9)],
    [start(1, 1, "node2"), step(1, 3, 1)],
]  # fmt: skip


def test_a_running_training_shows_stage_step_speed_hosts_and_the_age_of_its_last_event() -> None:
    status = summarize(RUNNING, is_running=True, now=10.0)
    assert (status.state, status.command, status.stage, status.step) == ("running", "train", 1, 2)
    assert (status.samples_per_s, status.progress, status.age_s) == (20.0, "stage 1 2/9", 7.0)
    assert status.hosts == {"node1": (0,), "node2": (1,)}


def test_events_of_earlier_launches_do_not_count() -> None:
    old = [start(0, 0, "node9", "A"), event("rank_failed", 0, 0.5, launch="A", kind="X", host="node9", message="old")]
    status = summarize([[*old, *RUNNING[0]], RUNNING[1]], is_running=True, now=10.0)
    assert status.last_error == ""
    assert status.hosts == {"node1": (0,), "node2": (1,)}


def test_a_failed_run_names_the_first_failure() -> None:
    lost = event("rank_lost", 1, 4, launch="B", host="node2", cause="it was killed by SIGKILL")
    other = event(
        "rank_failed", 0, 5, launch="B", kind="RuntimeError", host="node1", message="peer closed", exit_code=4
    )
    status = summarize([[*RUNNING[0], other], [*RUNNING[1], lost]], is_running=False, now=10.0)
    assert (status.state, status.last_error) == ("failed", "rank 1 on node2: it was killed by SIGKILL")


def test_done_stopped_and_vanished_runs_are_told_apart() -> None:
    done = [[*own, event("rank_done", rank, 6, launch="B")] for rank, own in enumerate(RUNNING)]
    assert summarize(done, is_running=False, now=9.0).state == "done"
    saved = event("rank_failed", 0, 5, launch="B", kind="Requeue", host="node1", message="saved", exit_code=5)
    assert summarize([[*RUNNING[0], saved], RUNNING[1]], is_running=False, now=9.0).state == "stopped"
    assert summarize(RUNNING, is_running=False, now=9.0).state == "gone"
    assert summarize([], is_running=False, now=9.0).state == "empty"


def test_a_launcher_is_alive_while_it_keeps_its_record_fresh(tmp_path: Path) -> None:
    assert not is_launcher_alive(tmp_path, time.time())
    folder = RunFolder(tmp_path, "L")
    assert is_launcher_alive(tmp_path, time.time())
    os.utime(launch_record_path(tmp_path), (1, 1))
    folder.release()
    assert not is_launcher_alive(tmp_path, time.time())


def test_the_command_prints_what_the_events_say(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "events").mkdir()
    for rank, own in enumerate(RUNNING):
        text = "".join(json.dumps(each) + "\n" for each in own)
        (tmp_path / "events" / f"rank-{rank:04d}.jsonl").write_text(text)
    result = nd("status", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for fragment in ("gone train", "stage 1, step 2, 20.0 samples/s", "node2: ranks 1", "logs"):
        assert fragment in result.stdout
    assert nd("status", str(tmp_path / "none")).returncode == 3
