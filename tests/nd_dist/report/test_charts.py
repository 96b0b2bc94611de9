"""What the page shows of a sweep: every axis, seeds averaged, subjects together."""

from pathlib import Path
from typing import Any

from nd_dist.evaluation.points.units import Point
from nd_dist.report.charts import sweep_charts
from nd_dist.report.findings import Findings
from nd_dist.report.table_files import csv_table, latex_table, markdown_table
from nd_dist.report.tables import headline_tiles, metric_tables


def entry(point: Point, value: float, subject: int = 1) -> dict[str, Any]:
    metric = {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 20, "higher_is_better": True}
    names = ("pixcorr", "ssim", "clip", "repeat_pixcorr")
    return {**point.describe(), "subject": subject, "folder": "", "metrics": dict.fromkeys(names, metric)}


def findings(*entries: dict[str, Any], **more: Any) -> Findings:
    config = {"sampler": {"kappa": 10.0, "eta": 0.5, "cfg_scale": 7.5}, "seed": 0}
    facts = {"protocol": "nd", "images": {"1": [0], "2": [0]}, "provenance": {"config": config}}
    return Findings(Path("nowhere"), {**facts, "points": list(entries), **more})


GRID = [entry(Point(kappa, eta), kappa / 100 + eta / 10) for kappa in (10.0, 20.0) for eta in (0.5, 1.0)]


def test_kappa_and_eta_together_are_a_heat_map_and_alone_an_axis() -> None:
    names = [chart.name for chart in sweep_charts(findings(*GRID))]
    assert names == ["PixCorr ↑", "SSIM ↑", "CLIP ↑"], "agreement of repeats is no headline"
    assert all('class="heat"' in chart.svg for chart in sweep_charts(findings(*GRID)))
    alone = sweep_charts(findings(*GRID[:2]))
    assert alone[0].name == "PixCorr over η ↑"
    assert alone[0].svg.count('class="dot"') == 2


def test_any_other_axis_is_followed_from_the_main_point() -> None:
    others = [entry(Point(10.0, 0.5, (("sampler.cfg_scale", scale),)), 0.3) for scale in (3.0, 5.0)]
    elsewhere = entry(Point(20.0, 0.5, (("sampler.cfg_scale", 3.0),)), 0.9)
    charts = {chart.name: chart.svg for chart in sweep_charts(findings(*GRID, *others, elsewhere))}
    svg = charts["PixCorr over sampler.cfg_scale ↑"]
    assert svg.count('class="dot"') == 3, "two values beside the recipe's own; another kappa is not on this line"
    assert svg.index(">3<") < svg.index(">5<") < svg.index(">7.5<")


def test_seeds_are_shown_by_their_mean() -> None:
    point = Point(10.0, 0.5)
    seeds = [entry(point.with_seed(seed) if seed else point, 0.1 * seed) for seed in (0, 1)]
    means = [entry(point.with_seed("mean of 2"), 0.05), entry(Point(20.0, 0.5).with_seed("mean of 2"), 0.4)]
    found = findings(*seeds, averages=means)
    row = found.guided(1)
    assert row is not None
    assert row.label.endswith("seed mean of 2")
    assert row.shown in (point, point.with_seed(1)), "pictures of one seed stand for it"
    assert sweep_charts(found)[0].svg.count('class="dot"') == 2


def test_all_subjects_stand_above_each_in_every_table() -> None:
    point = Point(10.0, 0.5)
    found = findings(entry(point, 0.2), entry(point, 0.4, subject=2), averages=[entry(point, 0.3, subject=0)])
    assert [table.title for table in metric_tables(found)] == ["Mean of subjects 1, 2", "Subject 1", "Subject 2"]
    assert headline_tiles(found)[0].value == ".300"
    assert [line.split(" | ")[0] for line in markdown_table(found).splitlines()[4:]] == ["| mean", "| 1", "| 2"]
    assert csv_table(found).splitlines()[1].startswith("mean,")
    assert latex_table(found).index("Mean of subjects 1, 2") < latex_table(found).index("{Subject 1}")


def test_tiles_are_the_fields_metrics_on_a_scale_from_chance_to_ceiling() -> None:
    point = Point(10.0, 0.5)
    controls = [
        {**entry(Point(10.0, 0.5, control="shuffled"), 0.1), "control": "shuffled"},
        {**entry(Point(10.0, 0.5, control="ceiling"), 0.5), "control": "ceiling"},
    ]
    found = findings(entry(Point(0.0, 0.0), 0.2), entry(point, 0.3), controls=controls)
    tiles = headline_tiles(found)
    assert [tile.metric.name for tile in tiles] == ["pixcorr", "ssim", "clip"]
    assert tiles[0].ends == "chance .100, ceiling .500"
    assert 'cx="100.0"' in tiles[0].scale, "halfway"
    assert 'class="ring"' in tiles[0].scale
