import json
import subprocess
import time
from pathlib import Path

from launch.commands.status import find_runs, status_of, summarize
from launch.supervise.heartbeat import Wanted, launch_record_path, running_launch
from launch.supervise.lock import RunFolder
from nd_dist.config import Config
from tests.support.command_line import ND, nd, nd_process
from tests.support.rank_processes import start_launcher
from tests.support.waiting import HANG_S


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
    status = summarize(RUNNING, running="B", now=10.0)
    assert (status.state, status.command, status.stage, status.step) == ("running", "train", 1, 2)
    assert (status.samples_per_s, status.progress, status.age_s) == (20.0, "stage 1 2/9", 7.0)
    assert status.hosts == {"node1": (0,), "node2": (1,)}


def test_events_of_earlier_launches_do_not_count() -> None:
    old = [start(0, 0, "node9", "A"), event("rank_failed", 0, 0.5, launch="A", kind="X", host="node9", message="old")]
    status = summarize([[*old, *RUNNING[0]], RUNNING[1]], running="B", now=10.0)
    assert status.last_error == ""
    assert status.hosts == {"node1": (0,), "node2": (1,)}


def test_a_failed_run_names_the_first_failure() -> None:
    lost = event("rank_lost", 1, 4, launch="B", host="node2", cause="it was killed by SIGKILL")
    other = event(
        "rank_failed", 0, 5, launch="B", kind="RuntimeError", host="node1", message="peer closed", exit_code=4
    )
    status = summarize([[*RUNNING[0], other], [*RUNNING[1], lost]], running="", now=10.0)
    assert (status.state, status.last_error) == ("failed", "rank 1 on node2: it was killed by SIGKILL")


def test_done_stopped_and_vanished_runs_are_told_apart() -> None:
    done = [[*own, event("rank_done", rank, 6, launch="B")] for rank, own in enumerate(RUNNING)]
    assert summarize(done, running="", now=9.0).state == "done"
    saved = event("rank_failed", 0, 5, launch="B", kind="Requeue", host="node1", message="saved", exit_code=5)
    assert summarize([[*RUNNING[0], saved], RUNNING[1]], running="", now=9.0).state == "stopped"
    assert summarize(RUNNING, running="", now=9.0).state == "gone"
    assert summarize([], running="", now=9.0).state == "empty"


def test_what_was_ended_on_request_did_not_fail_whatever_its_ranks_met(tmp_path: Path) -> None:
    met = event("rank_failed", 0, 5, launch="B", kind="RuntimeError", host="node1", message="closed", exit_code=4)

    def status_after(wanted: Wanted) -> tuple[str, str]:
        status = summarize([[*RUNNING[0], met], RUNNING[1]], "", 9.0, {"B": wanted}.__getitem__)
        return status.state, status.last_error

    assert status_after("end") == ("stopped", "")
    assert status_after("stop") == ("failed", "rank 0 on node1: closed")
    assert summarize(RUNNING, "", 9.0, lambda _: "end").state == "stopped"


def test_an_evaluation_that_lost_a_rank_is_done_when_another_did_its_work() -> None:
    def of(command: str, *own: dict[str, object]) -> list[dict[str, object]]:
        return [{**each, "command": command} for each in own]

    for command, state in (("evaluate", "done"), ("train", "failed")):
        done = of(command, start(0, 1, "node1"), event("rank_done", 0, 6, launch="B"))
        lost = of(command, start(1, 1, "node2"), event("rank_lost", 1, 4, launch="B", host="node2", cause="killed"))
        assert summarize([done, lost], running="", now=9.0).state == state


def test_a_launch_whose_ranks_have_not_begun_is_starting_and_not_the_one_before() -> None:
    done = [[*own, event("rank_done", rank, 6, launch="B")] for rank, own in enumerate(RUNNING)]
    status = summarize(done, running="evaluate-17-3", now=9.0)
    assert (status.state, status.command, status.stage) == ("starting", "evaluate", 0)


def test_a_launch_works_in_a_folder_while_its_record_is_kept_fresh(tmp_path: Path) -> None:
    assert running_launch(tmp_path, time.time()) == {}
    folder = RunFolder(tmp_path, "L")
    assert running_launch(tmp_path, time.time())["launch"] == "L"
    assert running_launch(tmp_path, time.time() + 3600) == {}
    folder.release()
    assert running_launch(tmp_path, time.time()) == {}


def test_the_status_is_true_as_soon_as_the_launcher_was_killed(config: Config) -> None:
    process = start_launcher(config)
    assert status_of(config.run_dir).state == "running"
    process.kill()
    process.communicate()
    assert launch_record_path(config.run_dir).exists()
    assert status_of(config.run_dir).state in ("gone", "stopped")  # its ranks may have had the time to save


def test_a_watched_status_ends_with_the_launch(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    folder = RunFolder(tmp_path, "train-1-1")
    watching = subprocess.Popen([*ND, "status", str(tmp_path), "--watch"], stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(3)
        assert watching.poll() is None
    finally:
        folder.release()
    assert watching.communicate(timeout=HANG_S)[0].split() == ["state", "empty"]
    assert watching.returncode == 0


def run_of(folder: Path, *own: list[dict[str, object]]) -> Path:
    (folder / "events").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    for rank, events in enumerate(own):
        text = "".join(json.dumps(each) + "\n" for each in events)
        (folder / "events" / f"rank-{rank:04d}.jsonl").write_text(text)
    return folder


def test_a_folder_of_several_runs_is_listed_in_one_line_each(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, *RUNNING) for name in ("subj01", "grid/subj02/c", "grid/subj02/z")]
    run_of(tmp_path / "subj01" / "reconstructions" / "deep" / "er", *RUNNING)  # what lies in a run is its own
    result = nd_process("status", str(tmp_path), COLUMNS="40")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(map(str, runs))
    assert all("gone train" in line and "stage 1 2/9" in line and "ago" in line for line in lines)


def test_a_grid_that_runs_heads_the_list_of_its_trainings(tmp_path: Path) -> None:
    run_of(tmp_path / "subj01" / "c", *RUNNING)
    folder = RunFolder(tmp_path, "grid-1-1")
    result = nd("status", str(tmp_path))
    folder.release()
    assert [line.split()[1:3] for line in result.stdout.splitlines()] == [["running", "grid"], ["gone", "train"]]


def test_runs_are_found_at_a_folder_and_below_it(tmp_path: Path) -> None:
    assert list(find_runs(tmp_path)) == list(find_runs(tmp_path / "none")) == []
    run = run_of(tmp_path / "a")
    assert list(find_runs(tmp_path)) == list(find_runs(run)) == [run]


def test_the_command_prints_what_the_events_say(tmp_path: Path) -> None:
    result = nd("status", str(run_of(tmp_path / "run", *RUNNING)))
    assert result.returncode == 0, result.stderr
    for fragment in ("gone train", "stage 1, step 2, 20.0 samples/s", "node2: ranks 1", "logs"):
        assert fragment in result.stdout
    assert nd("status", str(tmp_path / "none")).returncode == 3
