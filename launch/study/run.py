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
from launch.plans.choose import LaunchOptions
from launch.study.plan import Stage, plan_study
from launch.study.study import Study
from launch.supervise.heartbeat import running_launch
from nd_dist.errors import ConfigError, NdDistError, RankFailure, Requeue
from nd_dist.files import read_json, write_json
from nd_dist.training.records import stage_dir

DONE, FAILED, BLOCKED, WAITING, RUNNING = "done", "failed", "blocked", "waiting", "running"


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
    for stage in plan:
        folder, command = stage.config.run_dir, "grid" if stage.trains_grid else stage.kind
        if is_done(study, stage):
            states[stage.name] = DONE
        elif running_launch(folder, time.time()).get("launch", "").startswith(command):
            states[stage.name] = f"{RUNNING} {status_of(folder).progress}".strip()
        elif any(states[name].startswith((FAILED, BLOCKED)) for name in stage.needs):
            states[stage.name] = BLOCKED
        else:
            states[stage.name] = FAILED if read_stage(study, stage).get("error") else WAITING
    return states


def run_study(study: Study, options: LaunchOptions, stage_name: str = "") -> None:
    """Do every stage that is not done, or the one that is named.

    Raises:
        Requeue: stopped on request, with everything saved.
        RankFailure: some stages failed; the others are done.
        NdDistError: whatever the one named stage met.
    """
    console, plan = make_console(), plan_study(study)
    if stage_name:
        _run_stage(study, stage_named(plan, stage_name), options, console)
        return
    states = states_of(study, plan)
    for number, stage in enumerate(plan, start=1):
        if states[stage.name] == DONE:
            continue
        console.print(f"[{number}/{len(plan)}] {stage.name}")
        if any(states[name] != DONE for name in stage.needs):
            states[stage.name] = BLOCKED
            console.print(f"  {BLOCKED}: it needs {', '.join(name for name in stage.needs if states[name] != DONE)}")
            continue
        try:
            _run_stage(study, stage, options, console)
            states[stage.name] = DONE
        except Requeue:
            raise
        except NdDistError as error:  # it is on record; what does not need this stage goes on
            states[stage.name] = FAILED
            console.print(f"  {FAILED}: {error}")
    left = [name for name, state in states.items() if state != DONE]
    if left:
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
    for stage in plan:
        if stage.name == name:
            return stage
    names = [stage.name for stage in plan]
    raise ConfigError("The study has no such stage.", found=name, todo=nearest(name, names))


def _run_stage(study: Study, stage: Stage, options: LaunchOptions, console: Console) -> None:
    """Do one stage and record how it ended.

    Raises:
        NdDistError: see ``launch_command`` and ``grid_command``.
    """
    started = time.time()
    record = {"identity": stage.identity, "name": stage.name, "error": ""}
    try:
        if not is_done(study, stage):
            _do(study, stage, options, console)
    except NdDistError as error:
        if not isinstance(error, Requeue):
            write_json(record_path(study, stage), {**record, "error": str(error)})
        raise
    write_json(record_path(study, stage), {**record, "seconds": round(time.time() - started, 1)})


def _do(study: Study, stage: Stage, options: LaunchOptions, console: Console) -> None:
    """Run the command of a stage."""
    if stage.kind == "pack" and study.phantom_data:
        from shards.phantom.write import write_phantom

        summary = write_phantom(stage.config.nsd_root, stage.config.phantom, stage.config.seed)
        console.print(f"  phantom: {summary.describe()} -> {stage.config.nsd_root}")
    if stage.stage1_of is not None:
        _link_stage1(stage.stage1_of, stage.config.run_dir)
    if stage.trains_grid:
        grid_command(stage.config, GridRequest((stage.subject,)), options)
    else:
        launch_command(stage.kind, stage.config, options, console)


def _link_stage1(source: Path, target: Path) -> None:
    """Give a run the first stage of another one: of its network, or of each network of its grid."""
    first = stage_dir(Path(), 1)
    for folder in (*source.glob(str(first)), *source.glob(f"*/*/{first}")):
        link = target / folder.relative_to(source)
        if not link.is_symlink() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def study_table(study: Study, plan: Sequence[Stage], states: Mapping[str, str]) -> Table:
    """Return one table of all stages: a row for each command and seed, a column for each subject."""
    table = Table("stage", "seed", *(f"subject {subject}" for subject in study.subjects))
    for group, seed in dict.fromkeys((stage.group, stage.seed) for stage in plan):
        row = {stage.subject: states[stage.name] for stage in plan if (stage.group, stage.seed) == (group, seed)}
        cells = [row.get(subject, row.get(0, "")) for subject in study.subjects]
        table.add_row(group, "" if 0 in row else str(seed), *cells)
    return table


def study_status(study: Study) -> None:
    """Print how every stage stands, and what those that failed say."""
    console, plan = make_console(), plan_study(study)
    states = states_of(study, plan)
    console.print(study_table(study, plan, states), soft_wrap=False)
    for stage in plan:
        if states[stage.name] == FAILED:
            first = read_stage(study, stage)["error"].splitlines()[0]
            console.print(f"  {stage.name}: {first} (logs: {stage.config.run_dir / 'logs'})")
