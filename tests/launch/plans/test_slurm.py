import shlex
import subprocess
from pathlib import Path

import pytest

from launch.commands.submit import submission_of
from launch.plans.slurm import Submission, sbatch_text
from launch.recipe import load_recipe
from nd_dist.config import SlurmConfig
from nd_dist.errors import ConfigError
from tests.support.waiting import wait_until

TRAIN = Submission(
    "train", Path("/runs/a/config.yaml"), "/env/bin/python", Path("/code"), Path("/runs/a/slurm/train-%j.out")
)
GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=nd-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --time=720
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=/runs/a/slurm/train-%j.out
#SBATCH --requeue
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --partition=gpu
#SBATCH --account=brain
#SBATCH --constraint=a100
module load cuda/12.4
export PYTHONPATH=/code${PYTHONPATH:+:$PYTHONPATH}
/env/bin/python -m launch.cli train /runs/a/config.yaml --launcher srun &
nd=$! warned=no
trap 'warned=yes; kill -TERM $nd' TERM USR1
while :; do
  wait $nd; code=$?
  kill -0 $nd 2>/dev/null || break
done
again=no
[ $code = 5 ] && again="$warned"
[ $code = 4 ] && ! NODES_ANSWER && echo "a node of this job does not answer" && again=yes
[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] || again=no
[ $again = yes ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
""".replace(
    "NODES_ANSWER",
    "timeout 60 srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --mpi=none --cpu-bind=none --overlap true",
)


def test_the_script_of_a_training_is_the_documented_one() -> None:
    slurm = SlurmConfig(
        nodes=4, ranks_per_node=8, gpus_per_node=8, cpus_per_rank=12, time_min=720, signal_s=300, partition="gpu",
        account="brain", options=("--constraint=a100",), setup=("module load cuda/12.4",),
    )  # fmt: skip
    assert sbatch_text(TRAIN, slurm) == GOLDEN


@pytest.mark.parametrize("by_slurm", [True, False])
def test_a_job_goes_back_into_the_queue_when_slurm_stopped_it_and_not_when_somebody_else_did(
    by_slurm: bool, tmp_path: Path
) -> None:
    programs = {
        "nd-python": f"trap 'exit 5' TERM\ntouch {tmp_path}/runs\n"
        f"until [ -e {tmp_path}/stopped ]; do sleep 0.05; done\nexit 5",
        "squeue": "echo RUNNING",
        "scontrol": f"touch {tmp_path}/requeued",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    submission = Submission("train", tmp_path, str(tmp_path / "nd-python"), tmp_path, tmp_path / "out")
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", "-c", sbatch_text(submission, SlurmConfig())], env=environ) as job:
        wait_until((tmp_path / "runs").exists)
        job.terminate() if by_slurm else (tmp_path / "stopped").touch()
    assert job.returncode == 5
    assert (tmp_path / "requeued").exists() == by_slurm


def test_without_requeue_the_job_does_not_put_itself_back() -> None:
    text = sbatch_text(TRAIN, SlurmConfig(requeue=False))
    assert "#SBATCH --no-requeue" in text
    assert "scontrol" not in text


@pytest.mark.parametrize("command", ["pack", "train", "evaluate", "sweep"])
@pytest.mark.parametrize("name", ["plain", "two words", "it's $HOME #1 `x`"])
def test_every_script_is_valid_shell_and_passes_the_config_path_on_unchanged(
    command: str, name: str, tmp_path: Path
) -> None:
    config_path = tmp_path / name / "config.yaml"
    words = (command, config_path, "/env/bin/python", Path("/code"), Path("/runs/out-%j"))
    text = sbatch_text(Submission(*words), SlurmConfig())
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    line = next(line for line in text.splitlines() if line.endswith(" &"))
    assert shlex.split(line)[4] == str(config_path)


def test_an_output_path_that_sbatch_cannot_be_given_is_refused() -> None:
    odd = Submission("train", Path("/c"), "python", Path("/code"), Path("/it's/out-%j"))
    with pytest.raises(ConfigError, match="run_dir"):
        sbatch_text(odd, SlurmConfig())


def test_each_task_of_a_sweep_array_takes_its_own_point_and_folder(tmp_path: Path) -> None:
    config = load_recipe("demo", [f"run_dir={tmp_path / 'my run'}", "sweep.kappa=[1,1e5]", "sweep.eta=[0.1,1]"])
    text = sbatch_text(submission_of("sweep", config, is_array=True), config.slurm)
    assert "#SBATCH --array=0-3" in text
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("kappas="))
    end = next(n for n, line in enumerate(lines) if line.endswith(" &"))
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    seen = []
    for task in range(4):
        shown = lines[end].removesuffix(" &").replace(lines[end].split(" ")[0], "printf '%s\\n'", 1)
        script = "\n".join([*lines[start:end], shown])
        environ = {"SLURM_ARRAY_TASK_ID": str(task), "PATH": "/usr/bin:/bin"}
        answer = subprocess.run(["bash", "-uc", script], env=environ, capture_output=True, text=True, check=True)
        words = answer.stdout.splitlines()
        seen.append(tuple(words[-2:]))
        part = Path(words[-3].removeprefix("run_dir="))
        assert part.parent == tmp_path / "my run" / "sweep"
        assert (part / "checkpoints").resolve() == tmp_path / "my run" / "checkpoints"
    assert seen == [
        ("sweep.kappa=[1]", "sweep.eta=[0.10000000000000001]"),
        ("sweep.kappa=[1]", "sweep.eta=[1]"),
        ("sweep.kappa=[100000]", "sweep.eta=[0.10000000000000001]"),
        ("sweep.kappa=[100000]", "sweep.eta=[1]"),
    ]
