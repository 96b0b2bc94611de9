import shlex
import subprocess
from pathlib import Path

import pytest

from launch.plans.sbatch import Submission, sbatch_text, unasked_memory
from nd_dist.config import SlurmConfig
from nd_dist.errors import ConfigError
from tests.support.waiting import wait_until

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=nd-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=/runs/a/slurm/train-%j.out
#SBATCH --requeue
#SBATCH --gpus-per-node=a100:8
#SBATCH --cpus-per-task=12
#SBATCH --partition=gpu
#SBATCH --account=brain
#SBATCH --mem=0
#SBATCH --exclusive
module load cuda/12.4
export PYTHONPATH=/code${PYTHONPATH:+:$PYTHONPATH}
warned=no
trap 'warned=yes; kill -TERM $!' TERM USR1
/env/bin/python -m launch.cli train /runs/a/config.yaml --launcher srun &
while :; do
  wait $!; code=$?
  kill -0 $! 2>/dev/null || break
done
again=no
[ $code = 5 ] && again="$warned"
[ $code = 4 ] && ! NODES_ANSWER && echo "a node of this job does not answer" && again=yes
[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] || again=no
[ $again = yes ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
""".replace(
    "NODES_ANSWER",
    "timeout 60 srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --mpi=none --cpu-bind=none --overlap "
    "--container-image=/nd.sqsh true",
)


def submission(slurm: SlurmConfig | None = None, **more: object) -> Submission:
    given = {"name": "train", "command": "train", "config_path": Path("/runs/a/config.yaml"), **more}
    given = {"python": "/env/bin/python", "root": Path("/code"), **given}
    return Submission(slurm=slurm or SlurmConfig(), **given)  # type: ignore[arg-type]


def test_the_script_of_a_training_is_the_documented_one() -> None:
    slurm = SlurmConfig(
        nodes=4, ranks_per_node=8, gpus_per_node="a100:8", cpus_per_rank=12, time="12:00:00", signal_s=300,
        sbatch={"partition": "gpu", "account": "brain", "mem": 0, "exclusive": True, "qos": None},  # type: ignore[dict-item]
        setup=("module load cuda/12.4",), srun_options=("--container-image=/nd.sqsh",),
    )  # fmt: skip
    assert sbatch_text(submission(slurm)) == GOLDEN


def test_keys_of_older_recipes_are_read() -> None:
    options = ["--constraint=a100", "-C x"]
    older = {"time_min": 720, "gpus_per_node": 8, "partition": "gpu", "account": "", "options": options}
    slurm = SlurmConfig.model_validate(older)
    sbatch = {"partition": "gpu", "constraint": "a100", "-C x": ""}
    assert slurm == SlurmConfig(time="720", gpus_per_node="8", sbatch=sbatch)
    text = sbatch_text(submission(slurm))
    for line in ("--time=720", "--gpus-per-node=8", "--partition=gpu", "--constraint=a100", "-C x"):
        assert f"\n#SBATCH {line}\n" in text
    both = SlurmConfig.model_validate({**slurm.model_dump(), "options": ("--constraint=h100",)})
    assert both.sbatch == sbatch, "today's key has the last word"


@pytest.mark.parametrize("time", ["30", "30:00", "24:00:00", "2-12", "2-12:30", "2-12:30:00", "UNLIMITED"])
def test_time_limits_are_taken_as_slurm_writes_them(time: str) -> None:
    assert f"#SBATCH --time={time}\n" in sbatch_text(submission(SlurmConfig(time=time)))


@pytest.mark.parametrize("time", ["one day", "1:2:3:4", "-5", "", "2d"])
def test_other_time_limits_are_refused(time: str) -> None:
    with pytest.raises(ValueError, match="time"):
        SlurmConfig(time=time)


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
    text = sbatch_text(submission(config_path=tmp_path / "config.yaml", python=str(tmp_path / "nd-python")))
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", "-c", text], env=environ) as job:
        wait_until((tmp_path / "runs").exists)
        job.terminate() if by_slurm else (tmp_path / "stopped").touch()
    assert job.returncode == 5
    assert (tmp_path / "requeued").exists() == by_slurm


def test_without_requeue_the_job_does_not_put_itself_back() -> None:
    text = sbatch_text(submission(SlurmConfig(requeue=False)))
    assert "#SBATCH --no-requeue" in text
    assert "scontrol" not in text


@pytest.mark.parametrize("command", ["pack", "train", "evaluate", "sweep"])
@pytest.mark.parametrize("name", ["plain", "two words", "$HOME #1 `x`"])
def test_every_script_is_valid_shell_and_passes_the_config_path_on_unchanged(
    command: str, name: str, tmp_path: Path
) -> None:
    config_path = tmp_path / name / "config.yaml"
    text = sbatch_text(submission(command=command, config_path=config_path))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    line = next(line for line in text.splitlines() if line.endswith(" &"))
    assert shlex.split(line)[4] == str(config_path)


def test_a_run_folder_that_sbatch_cannot_be_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="run_dir"):
        sbatch_text(submission(config_path=Path("/it's/config.yaml")))


def test_each_task_of_an_array_is_given_its_own_words() -> None:
    tasks = (("run_dir=/runs/two words", "sweep.kappa=[1]"), ("run_dir=/runs/it's", "sweep.kappa=[$2]"))
    text = sbatch_text(submission(tasks=tasks))
    assert "#SBATCH --array=0-1\n" in text
    assert "slurm/train-%A-%a.out" in text
    lines = text.splitlines()
    first, last = lines.index("case $SLURM_ARRAY_TASK_ID in"), lines.index("esac")
    script = "\n".join([*lines[first : last + 1], "printf '%s\\n' \"$@\""])
    for number, words in enumerate(tasks):
        environ = {"SLURM_ARRAY_TASK_ID": str(number), "PATH": "/usr/bin:/bin"}
        answer = subprocess.run(["bash", "-uc", script], env=environ, capture_output=True, text=True, check=True)
        assert answer.stdout.splitlines() == list(words)


def test_a_job_that_asks_for_no_memory_is_warned_about() -> None:
    assert "slurm.sbatch.mem=" in unasked_memory(SlurmConfig(sbatch={"qos": "high"}))
    for name, value in (("mem", "200G"), ("mem-per-gpu", "80G"), ("exclusive", "")):
        assert unasked_memory(SlurmConfig(sbatch={name: value})) == ""
