"""Runs the stages of a study in order, each as the command that a user would type, and says how all of them stand.

A stage that is done is known by its record and its result, without starting a rank; whatever was interrupted is the
command's own affair, which goes on where it stopped. A stage that fails leaves alone what does not need it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.commands.launching import launch_command
from launch.commands.status import status_of
from launch.console import make_console
from launch.grid.plan import GridRequest, file_name
from launch.grid.run import grid_command
from launch.keys import nearest
from launch.plans.choose import LaunchOptions, new_launch_id
from launch.study.plan import Borrowed, Stage, plan_study
from launch.study.queue import queued_jobs
from launch.study.study import Study
from launch.supervise.heartbeat import running_launch
from launch.supervise.lock import RunFolder
from nd_dist.errors import ConfigError, NdDistError, RankFailure, Requeue
from nd_dist.files import read_json, write_json
from nd_dist.training.records import stage_dir

DONE, FAILED, BLOCKED, WAITING, RUNNING, QUEUED = "done", "failed", "blocked", "waiting", "running", "queued"


def record_path(study: Study, stage: Stage) -> Path:
    """Return where it stands how a stage ended."""
    return study.study_dir / "stages" / f"{file_name(stage.name)}.json"


def read_stage(study: Study, stage: Stage) -> dict[str, Any]:
    """Return how a stage ended, empty where it did not, or where it was another one."""
    path = record_path(study, stage)
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    return record if record.get("identity") == stage.identity else {}


def is_done(study: Study, stage: Stage) -> bool:
    """Return whether a stage's result is there; shards may have been packed by others."""
    if not stage.result.is_file():
        return False
    record = read_stage(study, stage)
    return (bool(record) and not record["error"]) or (stage.kind == "pack" and _holds_all(stage))


def _holds_all(stage: Stage) -> bool:
    """Return whether a folder of shards has the subjects and targets of a study."""
    from shards.format.index import Index

    index, data = Index.read(stage.config.shards_folder), stage.config.data
    return set(data.subjects) <= set(index.subjects) and set(data.targets) <= set(index.features)


def states_of(study: Study, plan: Sequence[Stage]) -> dict[str, str]:
    """Return how every stage stands, by name, as one word and what else is known."""
    states: dict[str, str] = {}
    jobs = queued_jobs(study)
    for stage in plan:
        folder, command = stage.config.run_dir, "grid" if stage.trains_grid else stage.kind
        if is_done(study, stage):
            states[stage.name] = DONE
        elif running_launch(folder, time.time()).get("launch", "").startswith(command):
            states[stage.name] = f"{RUNNING} {status_of(folder).progress}".strip()
        elif stage.name in jobs:
            states[stage.name] = f"{QUEUED} {jobs[stage.name]}"
        elif any(states[name].startswith((FAILED, BLOCKED)) for name in stage.needs):
            states[stage.name] = BLOCKED
        else:
            states[stage.name] = FAILED if read_stage(study, stage).get("error") else WAITING
    return states


def run_study(study: Study, options: LaunchOptions, stage_name: str = "") -> None:
    """Do every stage that is not done, or the one that is named.

    Raises:
        Requeue: stopped on request, with everything saved.
        WorldError: another command runs this study.
        RankFailure: some stages failed; the others are done.
        NdDistError: whatever the one named stage met.
    """
    console, plan = make_console(), plan_study(study)
    if stage_name:  # one of many jobs at once: its run folder has a lock of its own
        _run_stage(study, stage_named(plan, stage_name), options, console)
        return
    folder = RunFolder(study.study_dir, new_launch_id("study"))
    try:
        _run_stages(study, plan, options, folder, console)
    finally:
        folder.release()


def _run_stages(
    study: Study, plan: Sequence[Stage], options: LaunchOptions, folder: RunFolder, console: Console
) -> None:
    """Do every stage that is not done and whose needs are; see ``run_study``."""
    done: set[str] = set()
    for number, stage in enumerate(plan, start=1):
        if is_done(study, stage):
            done.add(stage.name)
            continue
        if folder.stop.name:
            raise Requeue("The study was stopped between two stages.", todo="run the command again")
        console.print(f"[{number}/{len(plan)}] {stage.name}")
        if lacking := [name for name in stage.needs if name not in done]:
            console.print(f"  {BLOCKED}: it needs {', '.join(lacking)}")
            continue
        try:
            _run_stage(study, stage, options, console)
            done.add(stage.name)
        except Requeue:
            raise
        except NdDistError as error:  # it is on record; what does not need this stage goes on
            console.print(f"  {FAILED}: {error}")
    if left := [stage.name for stage in plan if stage.name not in done]:
        raise RankFailure(
            f"{len(left)} of {len(plan)} stages of the study are not done: {', '.join(left)}.",
            where=str(study.study_dir),
            todo="`nd study status` says why; repair the cause, then run the same command again",
        )
    console.print(f"  study: all {len(plan)} stages are done; `nd study report` makes the tables")


def stage_named(plan: Sequence[Stage], name: str) -> Stage:
    """Return a stage by its name.

    Raises:
        ConfigError: there is none.
    """
    stages = {stage.name: stage for stage in plan}
    if name not in stages:
        raise ConfigError("The study has no such stage.", found=name, todo=nearest(name, stages))
    return stages[name]


def _run_stage(study: Study, stage: Stage, options: LaunchOptions, console: Console) -> None:
    """Do one stage and record how it ended.

    Raises:
        NdDistError: see ``launch_command`` and ``grid_command``.
    """
    done = is_done(study, stage)
    if done and read_stage(study, stage):
        return
    started = time.time()
    record = {"identity": stage.identity, "name": stage.name, "error": ""}
    try:
        if not done:
            _do(study, stage, options, console)
    except Requeue:
        raise
    except NdDistError as error:
        write_json(record_path(study, stage), {**record, "error": str(error)})
        raise
    write_json(record_path(study, stage), {**record, "seconds": round(time.time() - started, 1)})


def _do(study: Study, stage: Stage, options: LaunchOptions, console: Console) -> None:
    """Run the command of a stage."""
    if stage.kind == "pack" and study.sources[stage.source].phantom_data:
        from shards.phantom.write import write_phantom

        summary = write_phantom(stage.config.nsd_root, stage.config.phantom, stage.config.seed)
        console.print(f"  phantom: {summary.describe()} -> {stage.config.nsd_root}")
    if stage.borrowed is not None:
        _link_stage(stage.borrowed, stage.config.run_dir)
    if stage.trains_grid:
        grid_command(stage.config, GridRequest((stage.config.training.target_subject,)), options)
    else:
        launch_command(stage.kind, stage.config, options, console)


def _link_stage(borrowed: Borrowed, target: Path) -> None:
    """Give a run the stage of another one: of its network, or of each network of its grid."""
    stage = stage_dir(Path(), borrowed.number)
    for folder in (*borrowed.run_dir.glob(str(stage)), *borrowed.run_dir.glob(f"*/*/{stage}")):
        link = target / folder.relative_to(borrowed.run_dir)
        if not link.is_symlink() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def study_table(plan: Sequence[Stage], states: Mapping[str, str]) -> Table:
    """Return one table of all stages: a row for each command and seed, a column for each subject."""
    subjects = list(dict.fromkeys((stage.source, stage.subject) for stage in plan if stage.subject is not None))
    table = Table("stage", *(f"{source} {subject}" for source, subject in subjects))
    for series in dict.fromkeys(stage.series for stage in plan):
        row = {(stage.source, stage.subject): states[stage.name] for stage in plan if stage.series == series}
        table.add_row(series, *(row.get(place, row.get((place[0], None), "")) for place in subjects))
    return table


def study_status(study: Study) -> None:
    """Print how every stage stands, and what those that failed say."""
    console, plan = make_console(), plan_study(study)
    states = states_of(study, plan)
    console.print(study_table(plan, states), soft_wrap=False)
    for stage in plan:
        if states[stage.name] == FAILED:
            first = read_stage(study, stage)["error"].splitlines()[0]
            console.print(f"  {stage.name}: {first} (logs: {stage.config.run_dir / 'logs'})")
