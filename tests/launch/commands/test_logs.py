import subprocess
import time
from pathlib import Path

from launch.supervise.lock import RunFolder
from nd_dist.events import log_path
from tests.support.command_line import ND, nd_process
from tests.support.waiting import HANG_S, wait_until


def write(run_dir: Path, command: str, rank: int, text: str) -> None:
    path = log_path(run_dir, command, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(text)


def test_the_log_of_rank_0_of_the_last_command_is_printed_as_it_is(tmp_path: Path) -> None:
    long = "x" * 300 + " [bold]not markup[/bold]\n"
    write(tmp_path, "train", 0, "old\n")
    time.sleep(0.02)
    write(tmp_path, "evaluate", 0, long)
    assert nd_process("logs", str(tmp_path)).stdout == long
    assert nd_process("logs", str(tmp_path), "--command", "train").stdout == "old\n"


def test_a_rank_or_command_without_a_log_is_refused_with_the_logs_that_there_are(tmp_path: Path) -> None:
    write(tmp_path, "train", 0, "text\n")
    for words in (["--rank", "3"], ["--command", "pack"], ["--rank", "3", "-f"]):
        result = nd_process("logs", str(tmp_path), *words)
        assert (result.returncode, "logs/train/rank-0000.log" in result.stderr) == (3, True)


def test_following_shows_what_is_appended_then_the_next_commands_log_until_the_launch_ends(tmp_path: Path) -> None:
    write(tmp_path, "train", 0, "of an earlier training\n")
    time.sleep(0.02)
    write(tmp_path, "pack", 0, "first\n")
    folder = RunFolder(tmp_path, "L")
    output = tmp_path / "output"

    def wait_for(text: str) -> None:
        wait_until(lambda: text in output.read_text())

    with open(output, "wb") as stream:
        following = subprocess.Popen([*ND, "logs", str(tmp_path), "-f"], stdout=stream)
    wait_for("first\n")
    write(tmp_path, "pack", 0, "second\n")
    wait_for("second\n")
    write(tmp_path, "train", 0, "third\n")
    wait_for("third\n")
    write(tmp_path, "train", 0, "last\n")
    folder.release()
    assert following.wait(timeout=HANG_S) == 0
    header = f"==> {log_path(tmp_path, 'train', 0)} <==\n"
    assert output.read_text() == f"first\nsecond\n{header}third\nlast\n"


def test_following_waits_for_the_first_line_of_a_launch_that_just_began(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "L")
    following = subprocess.Popen([*ND, "logs", str(tmp_path), "-f"], stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    write(tmp_path, "train", 0, "hello\n")
    folder.release()
    assert following.communicate(timeout=HANG_S)[0].endswith("hello\n")
