"""A study as jobs of Slurm: an array over the subjects for every training and evaluation, each after what it needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.commands.submit import require_sbatch, submit
from launch.console import make_console
from launch.grid.plan import file_name
from launch.plans.sbatch import Submission, sbatch_text, unasked_memory
from launch.recipe import config_yaml
from launch.study.plan import Stage, plan_study
from launch.study.run import is_done
from launch.study.study import Study
from nd_dist.files import write_text
from nd_dist.versions import CODE_DIR


def submit_study(study: Study, is_dry_run: bool) -> None:
    """Submit what is not done of a study, and last the report; or print the scripts.

    Raises:
        ConfigError: there is no sbatch.
        RankFailure: sbatch refused a script.
    """
    study = study.model_copy(update={"study_dir": study.study_dir.resolve()})
    console, plan = make_console(), plan_study(study)
    if not is_dry_run:
        require_sbatch()
        write_text(study.study_dir / "study.yaml", config_yaml(study))
    numbers: dict[str, str] = {}  # name of a stage -> number of the job that does it
    for stages in _groups(plan):
        if all(is_done(study, stage) for stage in stages):
            continue
        job = _job(study, stages)
        waits = dict.fromkeys(_wait(name, numbers[name]) for name in stages[0].needs if name in numbers)
        if is_dry_run:
            number = f"JOB-{job.name}"
            console.print(f"# {job.name} {' '.join(waits)}\n{sbatch_text(job)}", end="")
        else:
            number = submit(job, ",".join(waits), list(numbers.values()))
            console.print(f"  submitted job {number} ({job.name}) -> {job.script_path}")
        numbers |= {stage.name: number for stage in stages}
    if numbers and not is_dry_run:
        every = ":".join(dict.fromkeys(numbers.values()))
        number = submit(_report(study, plan), f"afterany:{every}", list(numbers.values()))
        console.print(f"  submitted job {number} (report)")
    if note := unasked_memory(plan[0].config.slurm):
        console.print(f"  note: {note}")


def _groups(plan: Sequence[Stage]) -> list[list[Stage]]:
    """Return stages that differ in the subject alone together, in the order of the plan."""
    groups: dict[tuple[str, int], list[Stage]] = {}
    for stage in plan:
        groups.setdefault((stage.group, stage.seed), []).append(stage)
    return list(groups.values())


def _wait(name: str, number: str) -> str:
    """Return what a stage waits for: shards, or the task of an array that has the same subject."""
    return f"{'afterok' if name.startswith('pack') else 'aftercorr'}:{number}"


def _job(study: Study, stages: Sequence[Stage]) -> Submission:
    """Return the job of the same stage of all subjects."""
    first, path = stages[0], study.study_dir / "study.yaml"
    name = file_name(first.group if first.kind == "pack" else f"{first.group} seed {first.seed}")
    tasks = tuple(("--stage", stage.name) for stage in stages)
    return Submission(name, "study run", path, sys.executable, CODE_DIR, first.config.slurm, (), tasks)


def _report(study: Study, plan: Sequence[Stage]) -> Submission:
    """Return the job that makes the tables, on one node and without ranks."""
    slurm = plan[-1].config.slurm.model_copy(update={"nodes": 1, "ranks_per_node": 1, "gpus_per_node": ""})
    path = study.study_dir / "study.yaml"
    return Submission("report", "study report", path, sys.executable, CODE_DIR, slurm, ())
