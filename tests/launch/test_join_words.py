"""What is said to somebody who starts the wrong program under a launcher, before anything is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plans.environment import is_foreign

SHELL = {name: value for name, value in os.environ.items() if not is_foreign(name)}


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    shell = {**SHELL, **variables}
    return subprocess.run([sys.executable, "-m", *words], env=shell, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [[], ["train"], ["train", "--ranks", "2"], ["conformance", "demo"]])
def test_other_words_are_refused_with_what_is_expected(words: list[str]) -> None:
    result = run("launch.join", *words)
    assert result.returncode == 2
    assert "COMMAND RECIPE key=value" in result.stderr


@pytest.mark.launch
@pytest.mark.parametrize("command", ["pack", "train", "evaluate", "sweep"])
def test_the_module_of_a_ranks_work_is_no_program_and_says_what_is(command: str) -> None:
    result = run(f"launch.ranks.{command}", "demo")
    assert result.returncode == 2
    assert f"python -m launch.join {command} RECIPE" in result.stderr


@pytest.mark.launch
@pytest.mark.parametrize("command", ["pack", "train", "evaluate", "sweep"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_nd_itself_under_a_launcher_says_what_to_run_and_touches_nothing(
    command: str, more: list[str], tmp_path: Path
) -> None:
    words = [command, "demo", f"run_dir={tmp_path / 'run'}", f"shards_dir={tmp_path / 'shards'}", *more]
    result = run("launch.cli", *words, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert result.returncode == 3
    assert f"python -m launch.join {command} RECIPE" in result.stderr
    assert list(tmp_path.iterdir()) == []
