"""What Slurm still has of a study's jobs: their numbers are recorded when they are submitted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launch.study.study import Study
from nd_dist.errors import RankFailure
from nd_dist.files import read_json, write_json

SQUEUE_WITHIN_S = 60


def _record_path(study: Study) -> Path:
    return study.study_dir / "slurm" / "jobs.json"


def _submitted(study: Study) -> dict[str, str]:
    path = _record_path(study)
    jobs: dict[str, str] = read_json(path) if path.is_file() else {}
    return jobs


def record_jobs(study: Study, jobs: Mapping[str, str]) -> None:
    """Record name of a stage -> the job, or the task of an array, that was submitted for it."""
    write_json(_record_path(study), {**_submitted(study), **jobs})


def queued_jobs(study: Study) -> dict[str, str]:
    """Return name of a stage -> the job that Slurm has of it, waiting or running; empty where there is no Slurm.

    A job that ended, was cancelled or got lost is not among them.

    Raises:
        RankFailure: Slurm does not answer, so nobody knows.
    """
    submitted = _submitted(study)
    if not submitted or shutil.which("squeue") is None:
        return {}
    words = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=SQUEUE_WITHIN_S, check=False)
    if answer.returncode != 0:
        raise RankFailure("Slurm does not say which jobs it has.", where=" ".join(words), found=answer.stderr.strip())
    present = set(answer.stdout.split())
    return {name: job for name, job in submitted.items() if job in present}
