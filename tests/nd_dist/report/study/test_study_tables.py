"""Tables of a study over real evaluations of a very small world, one of which is missing."""

import csv
import dataclasses
from pathlib import Path

import pytest

from nd_dist.comm import Comm
from nd_dist.errors import DataError
from nd_dist.evaluation.points.units import Point, config_points
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.files import read_json, write_json
from nd_dist.metrics.statistics.scores import Scores, Statistics
from nd_dist.report.study.page import write_study_report
from nd_dist.report.study.tables import (
    Evaluated,
    Place,
    RowSource,
    Runs,
    StudyTable,
    TableSource,
    Whose,
    finished_runs,
    study_table,
)
from tests.nd_dist.evaluation.toy_world import ToySource, toy_job, write_models

GUIDED, UNGUIDED = Point(10.0, 0.5), Point(0.0, 0.0)
LAYERS = (("sampler.layer_scale", (0.0, 1.2, 1.0, 1.0, 1.0, 1.0)),)
POINTS = (
    {},
    {"sampler.kappa": 0},
    {"sampler.eta": 1.0},
    {"sampler.kappa": 20},
    {"sampler.kappa": 20, "sampler.eta": 1.0},
)
SEEN = 12
STATISTICS = Statistics(100)
MEAN = Whose("toy", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects' runs, of which the second one's was evaluated with another seed as well."""
    made = tmp_path_factory.mktemp("study")
    write_models(made)
    for subject, seed in ((1, 3), (2, 3), (2, 4)):
        layers = {"sampler.layer_scale": LAYERS[0][1]}
        job = toy_job(
            made,
            f"run-{subject}-{seed}",
            num_repeats=1,
            batch_size=SEEN,
            subjects=(subject,),
            points=(*POINTS, layers),
        )
        config = job.config.replaced({"seed": seed, "training.target_subject": subject})
        networks = dataclasses.replace(job.networks, config=config)
        job = dataclasses.replace(
            job, config=config, points=config_points(config), networks=networks, source=ToySource(SEEN)
        )
        evaluate(job, Comm(), EventLog(config.run_dir, 0, "evaluate"))
    return made


def rows(folder: Path, **points: Point) -> tuple[RowSource, ...]:
    places = [Place("toy", *numbers) for numbers in ((1, 3), (1, 4), (2, 3), (2, 4))]
    runs = {place: folder / f"run-{place.subject}-{place.seed}" for place in places}
    return tuple(
        RowSource(label, {place: Evaluated(run, point) for place, run in runs.items()})
        for label, point in points.items()
    )


def source(folder: Path) -> TableSource:
    layers = dataclasses.replace(GUIDED, settings=LAYERS)
    own = rows(folder, without=UNGUIDED, guided=GUIDED, five_layers=layers, never=Point(77.0, 1.0))
    return TableSource("Guidance & layers", own, "without", ("MindEye2",), "A note.")


@pytest.fixture(scope="module")
def table(folder: Path) -> StudyTable:
    return study_table(source(folder), Runs(), STATISTICS)


def test_a_mean_is_one_over_subjects_of_means_over_seeds(folder: Path, table: StudyTable) -> None:
    def value(run: str) -> float:
        points = read_json(folder / run / "metrics.json")["points"]
        return float(next(p for p in points if Point.of(p) == GUIDED)["metrics"]["pixcorr"]["value"])

    guided = table.rows[1]
    means = [value("run-1-3"), (value("run-2-3") + value("run-2-4")) / 2]
    assert [guided.scores[Whose("toy", s)].metrics["pixcorr"]["value"] for s in (1, 2)] == pytest.approx(means)
    item = guided.scores[MEAN].metrics["pixcorr"]
    assert item["value"] == pytest.approx(sum(means) / 2)
    assert item["ci_low"] < item["value"] < item["ci_high"]
    two, one = (guided.scores[Whose("toy", s)].metrics["pixcorr"] for s in (2, 1))
    assert two["seeds"] == (min(value("run-2-3"), value("run-2-4")), max(value("run-2-3"), value("run-2-4")))
    assert "seeds" not in one, "a single seed has no range"
    assert guided.labelled("toy") == "guided (subject 1 seed 4 not run)"


class Shifted(Runs):
    """Every subject has two seeds; the second one's values are greater by .1."""

    def scores(self, row: RowSource, place: Place) -> Scores | None:
        found = super().scores(row, place._replace(seed=3))
        assert found is not None
        shift = 0.1 * (place.seed - 3)
        return dataclasses.replace(
            found, metrics={name: {**item, "value": item["value"] + shift} for name, item in found.metrics.items()}
        )


def test_the_mean_over_subjects_has_the_range_of_its_own_means_over_seeds(folder: Path) -> None:
    table = study_table(TableSource("One", rows(folder, guided=GUIDED)), Shifted(), STATISTICS)
    item = table.rows[0].scores[MEAN].metrics["pixcorr"]
    assert item["seeds"] == pytest.approx((item["value"] - 0.05, item["value"] + 0.05))
    low, high = (table.rows[0].scores[Whose("toy", s)].metrics["pixcorr"]["seeds"] for s in (1, 2))
    assert item["seeds"] == pytest.approx([(one + two) / 2 for one, two in zip(low, high, strict=True)])


def test_rows_are_tested_against_one_and_their_p_values_corrected_together(table: StudyTable) -> None:
    reference, guided, layers, never = table.rows
    assert reference.differences["toy"] == never.differences["toy"] == {}
    item = guided.differences["toy"]["pixcorr"]
    expected = [row.scores[MEAN].metrics["pixcorr"]["value"] for row in (guided, reference)]
    assert item["value"] == pytest.approx(expected[0] - expected[1])
    assert 0 < item["p"] <= 1
    alone = study_table(dataclasses.replace(table.source, rows=table.source.rows[:2]), Runs(), STATISTICS)
    assert alone.rows[1].differences["toy"]["pixcorr"]["p"] <= item["p"], "one comparison fewer"
    assert layers.differences["toy"]["pixcorr"]["value"] != item["value"]


def test_what_was_not_run_says_so_in_every_file(folder: Path, tmp_path: Path) -> None:
    grid = rows(folder, a=GUIDED, b=Point(10.0, 1.0), c=Point(20.0, 0.5), d=Point(20.0, 1.0))
    tables = [source(folder), TableSource("Strength and duration", grid)]
    paths = write_study_report(
        tmp_path, "A study", tables, ["One departure."], ["train x: failed"], {"train y": [60.0, 100.0]}
    )
    texts = {path.name: path.read_text() for path in paths}
    lines = list(csv.DictReader((tmp_path / "tables.csv").open()))
    never = [line for line in lines if line["row"] == "never"]
    assert {(line["subject"], line["value"]) for line in never} == {(who, "not run") for who in ("mean", "1", "2")}
    tested = [
        line for line in lines if (line["row"], line["subject"], line["metric"]) == ("guided", "mean", "pixcorr")
    ]
    assert len(tested) == 1
    assert float(tested[0]["p"]) <= 1
    assert any(line["source"].startswith("quoted in Brain-IT's table; protocol mindeye2") for line in lines)
    markdown, latex, page = texts["tables.md"], texts["tables.tex"], texts["report.html"]
    assert "| never | toy mean | not run |" in markdown
    blocks = [[line.count("|") for line in block.splitlines()[2:] if line] for block in markdown.split("## ")[1:]]
    assert all(len(set(block) - {0}) == 1 for block in blocks), "every line of a table has as many cells"
    assert r"never & not run" in latex
    assert r"Guidance \& layers" in latex
    assert page.count("not run") >= 3 + 1
    for needed in (
        "simulated: made up, not human brains",
        "Judges",
        "One departure.",
        "train x: failed",
        "<th>train y</th><td>2</td><td>80 s</td>",
        "not comparable",
        "κ 20",
    ):
        assert needed in page
    assert page.count('src="data:image/') == 4 * (1 + 3) + 2 * (2 + 4), (
        "strips of three rows, two grids of four points"
    )
    assert "http" not in page, "the page refers to nothing outside itself"


def test_runs_of_different_protocols_do_not_stand_in_one_study(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Nothing of the study is evaluated yet"):
        finished_runs([source(tmp_path)], Runs())
    for seed, protocol in ((3, "nd"), (4, "paper")):
        metrics = read_json(folder / "run-2-3" / "metrics.json")
        write_json(tmp_path / f"run-1-{seed}" / "metrics.json", {**metrics, "protocol": protocol})
    with pytest.raises(DataError, match="differ in what must be equal: protocol"):
        finished_runs([source(tmp_path)], Runs())
