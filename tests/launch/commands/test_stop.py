import subprocess
import sys
from pathlib import Path

import pytest

from launch.commands.status import status_of
from launch.supervise.heartbeat import ask_launcher, asked_of_launcher
from launch.supervise.lock import RunFolder
from nd_dist.config import Config
from nd_dist.files import read_json
from tests.support.command_line import ND, nd
from tests.support.rank_processes import assert_gone, rank_pids, start_launcher
from tests.support.waiting import HANG_S, wait_until

ELSEWHERE = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]


def test_a_running_launch_saves_and_stops_and_the_command_waits_for_it(config: Config) -> None:
    process = start_launcher(config)
    result = nd("stop", str(config.run_dir))
    _, error = process.communicate(timeout=HANG_S)
    assert result.returncode == 0, result.stderr
    assert f"launch L (pid {process.pid} on " in result.stdout
    assert "stopped rank_program" in result.stdout
    assert b"Requeue: Stopped by `nd stop`" in error
    assert_gone(rank_pids(config, 2))


def test_a_second_stop_with_now_does_not_wait_for_ranks_that_do_not_save(config: Config) -> None:
    process = start_launcher(config, "deaf")
    waiting = subprocess.Popen([*ND, "stop", str(config.run_dir)], stdout=subprocess.DEVNULL)
    wait_until(lambda: asked_of_launcher(config.run_dir, "L") == "stop")
    result = nd("stop", str(config.run_dir), "--now")
    process.communicate(timeout=HANG_S)
    assert_gone(rank_pids(config, 2))
    assert (result.returncode, waiting.wait(timeout=HANG_S)) == (0, 0)
    assert status_of(config.run_dir).state == "stopped"


@pytest.mark.skipif(
    subprocess.run([*ELSEWHERE, "true"], capture_output=True, check=False).returncode != 0,
    reason="another host's name takes root",
)
def test_a_launch_on_another_host_is_stopped_through_its_files_alone(config: Config) -> None:
    process = start_launcher(config)
    words = [*ELSEWHERE, *ND, "stop", str(config.run_dir)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    process.communicate(timeout=HANG_S)
    assert "stopped rank_program" in result.stdout, result.stderr
    assert_gone(rank_pids(config, 2))


def test_where_nothing_runs_nothing_is_asked(config: Config) -> None:
    result = nd("stop", str(config.run_dir))
    assert (result.returncode, "nothing is running" in result.stdout) == (0, True)
    assert not (config.run_dir / ".state").exists()
    assert nd("stop", str(config.run_dir / "none")).returncode == 3


def test_what_is_asked_of_a_launch_reaches_its_ranks_and_its_launcher_and_is_never_taken_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "L")
    stop = folder.stop
    record = tmp_path / ".state" / "launcher.json"
    try:
        ask_launcher(tmp_path, "another launch", "end")
        ask_launcher(tmp_path, "L", "end")
        wait_until(lambda: stop.name != "")
        assert (stop.name, stop.count, stop.wanted) == ("`nd stop`", 2, "end")
        folder.keep_wish("stop")
        assert asked_of_launcher(tmp_path, "L") == "end"
        folder.tell("stop")
        assert read_json(record)["wanted"] == "end"
    finally:
        folder.release()
    assert asked_of_launcher(tmp_path, "L") == "end", "who looks later learns why it stopped"
    assert asked_of_launcher(tmp_path, "M") == "run"


def test_a_signal_is_kept_like_a_stop_on_request(config: Config) -> None:
    process = start_launcher(config)
    process.terminate()
    process.communicate(timeout=HANG_S)
    assert asked_of_launcher(config.run_dir, "L") == "stop"
    assert status_of(config.run_dir).state == "stopped"


def test_a_grid_of_trainings_is_stopped_like_a_run(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom launch.supervise.lock import RunFolder\n"
        f"folder = RunFolder(Path({str(tmp_path)!r}), 'grid-1-1')\n"
        "print('ready', flush=True)\nwhile not folder.stop.name:\n    time.sleep(0.05)\n"
        "folder.release()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as grid:
        assert grid.stdout is not None
        grid.stdout.readline()
        result = nd("stop", str(tmp_path))
        assert grid.wait(timeout=HANG_S) == 0
    assert (result.returncode, "asked launch grid-1-1" in result.stdout) == (0, True)
