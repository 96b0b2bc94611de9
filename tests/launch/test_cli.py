import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from launch.cli import app
from launch.recipe import load_recipe
from launch.study.study import load_study
from nd_dist.errors import ConfigError
from nd_dist.evaluation.points.axes import check_axes
from tests.support.command_line import nd, nd_process
from tests.support.shard_index import write_index

LAUNCHING = ("pack", "train", "evaluate", "sweep")
SHARED = ("--ranks", "--hostfile", "--launcher", "--include", "--exclude", "--dry-run")


def test_help_lists_every_command_and_imports_no_heavy_package() -> None:
    code = (
        "import sys\nsys.argv = ['nd', '--help']\nfrom launch.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'deepspeed', 'diffusers', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert command in result.stdout


def commands_of(group: Any) -> dict[str, Any]:  # Any: click's classes, wherever typer keeps them
    """Return every command by its words: ``train``, ``config keys``, ..."""
    found: dict[str, Any] = {}
    for name, command in getattr(group, "commands", {}).items():
        inner = commands_of(command)
        found |= {f"{name} {word}": each for word, each in inner.items()} if inner else {name: command}
    return found


COMMANDS = commands_of(typer.main.get_command(app))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_examples_that_the_command_takes(name: str) -> None:
    epilog = COMMANDS[name].epilog or ""
    examples = [line for line in epilog.split("\n\n") if line.startswith("nd ")]
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert words[: 1 + len(name.split())] == ["nd", *name.split()]
        COMMANDS[name].make_context(name, words[1 + len(name.split()) :])
        settings = [word for word in words if "=" in word]
        (load_study if name.startswith("study ") else load_recipe)("paper", settings)
    text = CliRunner().invoke(app, [*name.split(), "--help"]).output
    assert " ".join(text.split()).endswith(" ".join(examples[-1].split()))


@pytest.mark.parametrize("command", LAUNCHING)
def test_every_launching_command_shows_the_shared_options_and_its_own(command: str) -> None:
    options = {name for parameter in COMMANDS[command].params for name in parameter.opts}
    own = {"train": {"--stages", "--all-targets", "--at-once"}, "sweep": {"--estimate"}}.get(command, set())
    assert {"recipe", "overrides", *SHARED, *own} <= options
    help_text = CliRunner().invoke(app, [command, "--help"]).output
    assert all(option in help_text for option in {*SHARED, *own})


def completions(line: str) -> list[str]:
    """Return what a shell offers at the end of a line, from a process that may not import torch."""
    code = (
        "import sys\nsys.argv = ['nd']\nfrom launch.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)\n"
    )
    count = str(len(line.split(" ")) - 1)
    variables = {"_ND_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": count}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    return result.stdout.split()


def test_a_shell_completes_commands_recipes_and_keys() -> None:
    assert completions("nd ev") == ["evaluate"]
    assert completions("nd train de") == ["demo", "demo_full"]
    assert completions("nd phantom x --recipe pa") == ["paper"]
    assert completions("nd train demo sampler.ka") == ["sampler.kappa="]
    assert completions("nd config show demo training.learn") == ["training.learning_rate="]
    assert completions("nd submit tr") == ["train"]
    assert completions("nd config sh") == ["show"]
    assert completions("nd status ru") == [], "the shell offers files"


@pytest.mark.parametrize("command", LAUNCHING)
def test_a_dry_run_prints_what_is_not_a_default_the_exact_command_and_the_verdict_and_writes_nothing(
    command: str, tmp_path: Path
) -> None:
    words = [f"run_dir={tmp_path / 'run'}", f"nsd_root={tmp_path}", f"shards_dir={tmp_path / 'none'}"]
    result = nd(command, "demo", *words, "--ranks", "2", "--dry-run")
    assert f"launch.ranks.{command}" in result.stdout
    assert "hosts: localhost slots=2" in result.stdout
    assert "  kappa: 300.0\n" in result.stdout
    assert "slurm:" not in result.stdout, "all of its settings have their defaults"
    assert result.stdout.splitlines()[-1].startswith("# would be refused: ")
    assert result.returncode == 3
    assert "where: " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_grid_ends_with_the_verdict_too(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path / 'run'}", f"shards_dir={tmp_path / 'none'}", "decoder.heads=single"]
    result = nd("train", "demo", *words, "--all-targets", "--dry-run")
    assert "  heads: single\n" in result.stdout
    assert "# 16 trainings on " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("# would be refused: ")
    assert result.returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_value_is_exit_code_2_without_a_traceback() -> None:
    result = nd_process("train", "demo", "sampler.eta=1.5")
    assert result.returncode == 2
    assert "sampler.eta" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train", "evaluate", "sweep"])
def test_missing_shards_are_exit_code_3_and_leave_no_run_folder(command: str, tmp_path: Path) -> None:
    result = nd(command, "demo", f"shards_dir={tmp_path / 'none'}", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 3, result.stderr
    assert "nd pack" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_nsd_is_exit_code_3_and_leaves_nothing(tmp_path: Path) -> None:
    words = [f"nsd_root={tmp_path / 'none'}", f"shards_dir={tmp_path / 's'}", f"run_dir={tmp_path / 'run'}"]
    result = nd("pack", "demo", *words)
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_what_is_there() -> None:
    result = nd("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("deepspeed", "free space", "/dev/shm"):
        assert word in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch reaches a GPU here")
def test_doctor_says_which_torch_a_gpu_s_driver_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "Driver Version: 550.54   CUDA Version: 12.4"
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ $# = 0 ] && echo "{header}" || echo 24576\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    result = nd("doctor")
    assert result.returncode == 3
    assert "whl/cu124" in result.stdout


def test_doctor_says_all_that_a_run_would_miss_and_the_command_that_mends_it(tmp_path: Path) -> None:
    words = [f"nsd_root={tmp_path / 'nsd'}", f"shards_dir={tmp_path / 'shards'}", "model=a/b", "guidance_model=c/d"]
    result = nd("doctor", "paper", *words, f"evaluation.judges_dir={tmp_path / 'judges'}")
    assert result.returncode == 3, result.stdout
    text = " ".join(result.stdout.replace("│", " ").split())
    for word in ("nd fetch nsd", "a/b", "c/d", "nd fetch models", "nd fetch judges", "nd pack"):
        assert word in text
    assert text.count("These shards have no index") == 1


def test_doctor_finds_a_torchvision_that_was_built_for_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "torchvision-9.dist-info").mkdir()
    (tmp_path / "torchvision-9.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = nd_process("doctor")
    assert result.returncode == 3, result.stdout
    text = " ".join(result.stdout.replace("│", " ").split())
    assert "9 cannot be imported: RuntimeError: operator torchvision::nms does not exist" in text
    assert "pip uninstall torchvision" in text


def test_doctor_names_what_downloads_laion_fmri(tmp_path: Path) -> None:
    result = nd("doctor", "laion_fmri", f"nsd_root={tmp_path}", f"shards_dir={tmp_path / 'shards'}")
    assert result.returncode == 3, result.stdout
    assert "nd fetch laion-fmri" in " ".join(result.stdout.replace("│", " ").split())


def test_a_dry_submission_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    shards = write_index(tmp_path / "shards")
    words = [f"run_dir={tmp_path / 'run'}", f"shards_dir={shards}", "slurm.nodes=2"]
    result = nd("submit", "train", "demo", *words, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "#SBATCH --nodes=2" in result.stdout
    assert f"train {tmp_path / 'run' / 'config.yaml'} --launcher srun" in result.stdout
    assert list(tmp_path.iterdir()) == [shards]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "demo"], "expected: pack, train, evaluate, sweep"),
        (["trian", "demo"], "did you mean train?"),
        (["train", "demo", "--array"], "Only a sweep is an array"),
    ],
)
def test_what_cannot_be_submitted_is_refused(words: list[str], message: str) -> None:
    result = nd("submit", *words, "--dry-run")
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("grid", [[], ["--all-targets"]])
def test_stages_that_are_no_numbers_are_said_once_as_they_were_typed(grid: list[str]) -> None:
    result = nd("train", "demo", "--stages", "a", "--dry-run", *grid)
    assert result.returncode == 2
    assert "where: --stages" in result.stderr
    assert "found: a" in result.stderr


def test_an_unknown_tracker_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    result = nd("report", str(tmp_path), "--track", "notebook")
    assert result.returncode == 2
    assert "tensorboard or wandb" in result.stderr


def test_an_axis_that_a_sweep_cannot_vary_is_refused_before_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nd merge"):
        check_axes(load_recipe("demo", ["sweep.axes={training.learning_rate: [0.1]}", f"run_dir={tmp_path}"]))
