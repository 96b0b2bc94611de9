"""A study as jobs of Slurm: an array over the subjects for every training and evaluation, each after what it needs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence

from launch.commands.submit import require_sbatch, submit
from launch.console import make_console
from launch.grid.plan import GridRequest, file_name, plan_grid
from launch.grid.state import grid_checks
from launch.plans.choose import new_launch_id
from launch.plans.sbatch import Submission, sbatch_text, unasked_memory
from launch.recipe import config_yaml
from launch.study.plan import Stage, plan_study
from launch.study.queue import queued_jobs, record_jobs
from launch.study.run import is_done
from launch.study.study import Study
from launch.supervise.checks import Checks, checks_of
from launch.supervise.lock import RunFolder
from launch.supervise.preflight import require
from nd_dist.files import write_text
from nd_dist.versions import CODE_DIR


def submit_study(study: Study, is_dry_run: bool) -> None:
    """Submit what is neither done nor queued of a study, and last the report; or print the scripts.

    Raises:
        ConfigError: there is no sbatch.
        NdDistError: a stage could not run; see ``checks_of``.
        WorldError: another command runs or submits this study.
        RankFailure: sbatch refused a script.
    """
    study = study.model_copy(update={"study_dir": study.study_dir.resolve()})
    plan = plan_study(study)
    if is_dry_run:
        _submit(study, plan, True)
        return
    require_sbatch()
    folder = RunFolder(study.study_dir, new_launch_id("study"))
    try:
        write_text(study.study_dir / "study.yaml", config_yaml(study))
        _submit(study, plan, False)
    finally:
        folder.release()


def _submit(study: Study, plan: Sequence[Stage], is_dry_run: bool) -> None:
    """Submit, or print, the jobs of a plan."""
    console, jobs, new = make_console(), queued_jobs(study), list[str]()
    checks = _checks(study, [stage for stage in plan if stage.name not in jobs and not is_done(study, stage)])
    if not is_dry_run:
        require(checks)
    if jobs:
        console.print(f"  note: {len(jobs)} stage(s) are in the queue already")
    for stages in _series(plan):
        left = [n for n, stage in enumerate(stages) if stage.name not in jobs and not is_done(study, stage)]
        if not left:
            continue
        job = _job(study, stages, left)
        waits = _waits([name for n in left for name in stages[n].needs], jobs, left)
        if is_dry_run:
            number = f"JOB{len(new) + 1}"
            console.print(f"# {number}: {job.name} {waits}\n{sbatch_text(job)}", end="")
        else:
            number = submit(job, waits, new)
            console.print(f"  submitted job {number} ({job.name}) -> {job.script_path}")
        own = {stages[n].name: f"{number}_{n}" if job.tasks else number for n in left}
        jobs |= own
        new.append(number)
        if not is_dry_run:
            record_jobs(study, own)
    if new and not is_dry_run:
        every = sorted({job.partition("_")[0] for job in jobs.values()})
        number = submit(_report(study, plan), f"afterany:{':'.join(every)}", new)
        console.print(f"  submitted job {number} (report)")
    if note := unasked_memory(plan[0].config.slurm):
        console.print(f"  note: {note}")
    if is_dry_run:
        require(checks)


def _checks(study: Study, left: Sequence[Stage]) -> Checks:
    """Return what can stop stages, as for `nd submit`; of made-up data nothing is there before the first of them."""
    checks: Checks = {}
    for stage in left:
        if not study.sources[stage.source].phantom_data:
            ranks = stage.config.slurm.nodes * stage.config.slurm.ranks_per_node
            coming = sorted({other.kind for other in left})
            if stage.trains_grid:
                grid = plan_grid(stage.config, GridRequest((stage.config.training.target_subject,)))
                own = grid_checks(stage.config, grid, ranks, coming)
            else:
                own = checks_of(stage.kind, stage.config, ranks, coming)
            checks |= {f"{stage.name}, {name}": check for name, check in own.items()}
    return checks


def _series(plan: Sequence[Stage]) -> Iterable[list[Stage]]:
    """Return stages that differ in the subject alone together, in the order of the plan."""
    found: dict[str, list[Stage]] = {}
    for stage in plan:
        found.setdefault(stage.series, []).append(stage)
    return found.values()


def _waits(needs: Sequence[str], jobs: Mapping[str, str], tasks: Collection[int]) -> str:
    """Return what the tasks of a job wait for, as sbatch is told: each for the one of its number, where it can."""
    by_job: dict[str, set[str]] = {}
    for name in needs:
        if name in jobs:  # else it is done
            by_job.setdefault(jobs[name].partition("_")[0], set()).add(jobs[name])
    after = [
        f"aftercorr:{job}" if own == {f"{job}_{n}" for n in tasks} else f"afterok:{':'.join(sorted(own))}"
        for job, own in by_job.items()
    ]
    return ",".join(after)


def _job(study: Study, stages: Sequence[Stage], left: Sequence[int]) -> Submission:
    """Return the job of the same stage of several subjects, of which some are left to do."""
    first = stages[0]
    path, slurm = study.study_dir / "study.yaml", first.config.slurm
    words = [("--stage", stage.name) for stage in stages]
    name = file_name(first.series)
    if first.subject is None:
        return Submission(name, "study run", path, sys.executable, CODE_DIR, slurm, words[0])
    return Submission(name, "study run", path, sys.executable, CODE_DIR, slurm, (), tuple(words), tuple(left))


def _report(study: Study, plan: Sequence[Stage]) -> Submission:
    """Return the job that makes the tables, on one node and without ranks."""
    slurm = plan[-1].config.slurm.model_copy(update={"nodes": 1, "ranks_per_node": 1, "gpus_per_node": ""})
    path = study.study_dir / "study.yaml"
    return Submission("report", "study report", path, sys.executable, CODE_DIR, slurm, ())
