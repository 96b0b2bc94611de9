"""`nd study report`: hands the tables of a study file, with the run folders of their rows, to ``nd_dist.report``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.console import make_console
from launch.study.plan import Stage, plan_study
from launch.study.run import DONE, read_stage, states_of
from launch.study.study import Study, Table
from nd_dist.report.findings import point_label
from nd_dist.report.study.page import write_study_report
from nd_dist.report.study.tables import Evaluated, Place, RowSource, TableSource


def report_study(study: Study) -> None:
    """Write the tables and the page of a study from what is evaluated by now, and say where they are.

    Raises:
        DataError: nothing is evaluated yet, or runs do not belong together.
    """
    plan = plan_study(study)
    states = states_of(study, plan)
    lacking = [f"{name}: {state}" for name, state in states.items() if state != DONE]
    tables = [
        TableSource(table.title, tuple(_rows(table, study, plan)), table.against, table.published, table.note)
        for table in study.tables
    ]
    console = make_console()
    title = f"Study {study.study_dir.name}: reconstructions of seen pictures from fMRI"
    took: dict[str, list[float]] = {}
    for stage in plan:
        if (seconds := read_stage(study, stage).get("seconds")) is not None and states[stage.name] == DONE:
            took.setdefault(stage.group, []).append(seconds)
    for path in write_study_report(study.study_dir, title, tables, study.departures, lacking, took):
        console.print(f"  report: {path}")
    if lacking:
        console.print(f"  note: {len(lacking)} stage(s) are not done; their rows say so")


def _rows(table: Table, study: Study, plan: Sequence[Stage]) -> Iterator[RowSource]:
    """Yield a table's rows: one for each run, several for a run that is a grid."""
    for label, name in table.rows.items():
        decoder, run = study.decoder_of(name), study.runs[name]
        sources = study.sources_of(decoder, name)
        found: list[dict[Place, Evaluated]] = []
        for stage in plan:
            if (stage.kind, stage.decoder) == ("evaluate", decoder) and stage.source in sources:
                for number, point in enumerate(run.points(stage.config)):
                    found += [{}] if number == len(found) else []
                    found[number][_place(stage)] = Evaluated(stage.config.run_dir, point)
        for places in found:
            own = label if len(found) == 1 else f"{label}, {point_label(next(iter(places.values())).point)}"
            yield RowSource(own, places)


def _place(stage: Stage) -> Place:
    """Return whose brain and which seed an evaluation is of."""
    assert stage.subject is not None
    assert stage.seed is not None
    return Place(stage.source, stage.subject, stage.seed)
