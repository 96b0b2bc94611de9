import subprocess
import sys
from pathlib import Path

import pytest

from launch.recipe import load_recipe
from nd_dist.errors import ConfigError
from nd_dist.evaluation.points.axes import check_axes
from tests.support.command_line import nd, nd_process

LAUNCHING = ("pack", "train", "evaluate", "sweep")


def test_help_lists_every_command_and_imports_no_heavy_package() -> None:
    code = (
        "import sys\nsys.argv = ['nd', '--help']\nfrom launch.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'deepspeed', 'diffusers', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in [
        "doctor",
        "phantom",
        "pack",
        "verify",
        "export",
        "train",
        "evaluate",
        "sweep",
        "merge",
        "report",
        "demo",
        "conformance",
        "submit",
        "status",
    ]:
        assert command in result.stdout


@pytest.mark.parametrize("command", LAUNCHING)
def test_a_dry_run_prints_config_hosts_and_the_exact_command_and_writes_nothing(command: str, tmp_path: Path) -> None:
    result = nd(command, "demo", f"run_dir={tmp_path / 'run'}", f"nsd_root={tmp_path}", "--ranks", "2", "--dry-run")
    assert f"launch.ranks.{command}" in result.stdout
    assert "hosts: localhost slots=2" in result.stdout
    assert "kappa:" in result.stdout
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
    assert "deepspeed" in result.stdout


def test_a_dry_submission_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    result = nd("submit", "train", "demo", f"run_dir={tmp_path / 'run'}", "slurm.nodes=2", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "#SBATCH --nodes=2" in result.stdout
    assert f"train {tmp_path / 'run' / 'config.yaml'} --launcher srun" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["demo", "demo"], ["train", "demo", "--array"]])
def test_what_cannot_be_submitted_is_refused(words: list[str]) -> None:
    assert nd("submit", *words, "--dry-run").returncode == 2


def test_an_unknown_tracker_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    result = nd("report", str(tmp_path), "--track", "notebook")
    assert result.returncode == 2
    assert "tensorboard or wandb" in result.stderr


def test_an_axis_that_a_sweep_cannot_vary_is_refused_before_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nd merge"):
        check_axes(load_recipe("demo", ["sweep.axes={training.learning_rate: [0.1]}", f"run_dir={tmp_path}"]))
