"""The page: complete, self-contained, readable; and the tables beside it."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nd_dist.comm import Comm
from nd_dist.errors import DataError
from nd_dist.evaluation.points.units import Point, control_points
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.metrics.table import metric_of
from nd_dist.report import figures
from nd_dist.report.figures import write_figures
from nd_dist.report.findings import Findings
from nd_dist.report.pictures import data_uri
from nd_dist.report.report import render, write_report
from nd_dist.report.svg import Cell, curve, heat_map
from nd_dist.report.table_files import latex_text
from nd_dist.report.tables import probability, verdict
from tests.nd_dist.evaluation.toy_world import TEST_IMAGES, toy_job, write_models
from tests.support.chromium import CHROMIUM, Chromium


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three guided points, controls and a training log, reported."""
    import dataclasses

    folder = tmp_path_factory.mktemp("report")
    write_models(folder)
    job = toy_job(folder, num_images=3, controls=True)
    points = (Point(0.0, 0.0), Point(10.0, 0.5), Point(10.0, 1.0), *control_points(job.config))
    events = EventLog(job.config.run_dir, 0, "train")
    for stage in (1, 2):
        for step in range(300):
            events.write("train_step", stage=stage, step=step, loss=10.0 / (step + 1))
    events.write("train_step", stage=2, step=299, loss=float("nan"))
    groups = {"birds & bees": (0, 2), "one alone": (1,), "never shown": (70, 71)}
    evaluate(dataclasses.replace(job, points=points, image_groups=groups), Comm(), events)
    write_report(job.config.run_dir)
    return job.config.run_dir


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


def test_the_page_refers_to_nothing_outside_itself(run_dir: Path) -> None:
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            is_beside = (tag, name, value) == ("a", "href", "images.html")
            assert value is None or value.startswith("data:image/") or is_beside, (tag, name)
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_the_page_shows_every_picture_of_the_gallery(run_dir: Path) -> None:
    images = list(Page((run_dir / "report.html").read_text()).of("img"))
    gallery = 3 * (1 + 2 + 2)  # 3 images: original, 2 repeats without and 2 with guidance
    grids = 2 * (1 + 1 + 2)  # 2 images: original, without guidance, one kappa at two etas
    assert len(images) == gallery + grids
    assert all(image["alt"] for image in images)


def test_the_page_says_that_data_are_simulated_and_names_protocol_and_provenance(run_dir: Path) -> None:
    text = (run_dir / "report.html").read_text()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for needed in ("phantom NSD, not human brains", "Protocol: nd", metrics["provenance"]["config_hash"], "PixCorr"):
        assert needed in text
    for name in ("PixCorr over η", "PixCorr of each image, subject 1", "Stage 1 (all other subjects): loss"):
        assert f'aria-label="{name}' in text
    assert text.count('class="tile"') == 7, "PixCorr, SSIM and the judges; agreement of repeats is no headline"
    assert 'class="scale"' in text
    for needed in ("It stands where the field has AlexNet(2)", "device-hours", "a picture made and judged"):
        assert needed in text


def test_published_numbers_on_nsd_are_not_set_beside_those_of_another_data_set(run_dir: Path) -> None:
    metrics = {**json.loads((run_dir / "metrics.json").read_text()), "simulated": False}
    config = metrics["provenance"]["config"]
    told = "pictures and brains are another data"
    assert told not in render(Findings(run_dir, metrics))
    elsewhere = {**config, "data": {**config["data"], "reader": "laion_fmri"}}
    other = {**metrics, "provenance": {**metrics["provenance"], "config": elsewhere}}
    assert told in render(Findings(run_dir, other))


def test_the_page_is_the_same_whenever_it_is_written(run_dir: Path) -> None:
    before = (run_dir / "report.html").read_bytes()
    write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def test_the_csv_has_the_numbers_of_the_metrics_file_in_full(run_dir: Path) -> None:
    lines = [line for line in csv.DictReader((run_dir / "metrics.csv").open()) if line["images"] == "all"]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert len(lines) == sum(len(point["metrics"]) for point in (*metrics["points"], *metrics["controls"]))
    first = next(line for line in lines if line["metric"] == "ssim" and line["eta"] == "1.0")
    assert {line["control"] for line in lines} == {"", "shuffled", "nearest", "ceiling"}
    point = next(entry for entry in metrics["points"] if entry["eta"] == 1.0)
    assert float(first["value"]) == point["metrics"]["ssim"]["value"]


def test_the_markdown_table_has_a_line_per_point_and_labels_simulated_data(run_dir: Path) -> None:
    text = (run_dir / "metrics.md").read_text()
    assert text.startswith("Simulated data")
    lines = [line for line in text.partition("\nOnly ")[0].splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 + 3, "heading, points, controls"
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_of_all_images_shows_every_image_of_the_run_from_its_folder(run_dir: Path) -> None:
    sources = [str(image["src"]) for image in Page((run_dir / "images.html").read_text()).of("img")]
    assert len(sources) == 3 * 3, "seen, without and with guidance"
    assert all((run_dir / source).is_file() for source in sources)


def test_two_runs_stand_beside_each_other(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "other")
    page = write_report(tmp_path / "other", beside=run_dir).read_text()
    assert f"other beside {run_dir.name}" in page
    assert f"{run_dir.name}, without guidance" in page
    path = tmp_path / "other" / "metrics.json"
    path.write_text(path.read_text().replace('"protocol": "nd"', '"protocol": "paper"'))
    assert "not comparable: protocols nd, paper" in render(Findings(run_dir), Findings(tmp_path / "other"))


def test_a_run_without_guidance_alone_can_be_reported(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, "points": metrics["points"][:1], "controls": [], "comparisons": []}))
    text = write_report(tmp_path / "run").read_text()
    assert "without guidance" in text
    assert 'class="heat"' not in text


def test_a_run_that_was_not_evaluated_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nd evaluate"):
        write_report(tmp_path)


def test_a_missing_picture_is_named(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "reconstructions" / "original" / "image-00001")
    with pytest.raises(DataError, match="image-00001"):
        write_report(tmp_path / "run")


def test_losses_count_a_repeated_step_once_and_leave_out_what_is_not_finite(run_dir: Path) -> None:
    losses = Findings(run_dir).losses()
    assert [len(steps) for steps, _ in losses.values()] == [300, 300]
    assert losses[2][1][-1] == pytest.approx(10 / 300)


def test_per_image_values_come_from_the_scores(run_dir: Path) -> None:
    findings = Findings(run_dir)
    row = findings.guided(1)
    assert row is not None
    values = findings.values(row, "pixcorr")
    assert len(values) == min(3, TEST_IMAGES)
    assert np.mean(list(values.values())) == pytest.approx(row.metrics["pixcorr"]["value"])


def test_large_pictures_are_scaled_down_and_small_ones_stay_as_they_are(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:64, :64]).save(tmp_path / "small.png")
    assert data_uri(tmp_path / "large.png").startswith("data:image/webp;base64,")
    assert len(data_uri(tmp_path / "large.png")) < 60_000
    assert data_uri(tmp_path / "small.png").startswith("data:image/png;base64,")


def test_a_heat_map_darkens_with_the_value_and_leaves_missing_cells_empty() -> None:
    cells = {(0, 0): Cell(0.1, ".1"), (0, 1): Cell(0.9, ".9", is_best=True), (1, 0): Cell(0.5, ".5 <b>")}
    svg = heat_map("a & b", ["1", "2"], ["x", "y"], cells)
    fills = re.findall(r'fill="(#\w+)"', svg)
    assert len(fills) == 3
    assert fills[0] == "#cde2fb"
    assert fills[1] == "#0d366b"
    assert svg.count("stroke-width") == 1
    assert "&lt;b&gt;" in svg
    assert "a &amp; b" in svg


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [100.0, 1.0, 0.1], [-1.0, 0.0, 1.0], [3e-9, 1e-9, 2e-9]])
def test_a_curve_is_drawn_for_any_finite_losses(values: list[float]) -> None:
    svg = curve("loss", [0, 10, 20], values)
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    numbers = [float(number) for pair in points[1].split() for number in pair.split(",")]
    assert len(numbers) == 6
    assert all(0 <= number <= 460 for number in numbers)


def test_a_difference_is_only_called_better_when_it_is_significant() -> None:
    clear, unclear = {"value": 0.1, "p": 0.05}, {"value": 0.1, "p": 0.051}
    assert verdict(metric_of("pixcorr"), clear) == "better"
    assert verdict(metric_of("swav"), clear) == "worse"
    assert verdict(metric_of("pixcorr"), unclear) == "unclear"
    assert (probability(0.0004), probability(0.02)) == ("< .001", "= .020")


def test_controls_stand_in_the_table_and_absent_metrics_say_why(run_dir: Path) -> None:
    text = (run_dir / "report.html").read_text()
    for label in ("chance: shuffled inputs", "nearest training image", "ceiling: true embeddings"):
        assert label in text
    assert "LPIPS: no folder of metric networks was given" in text
    assert "AlexNet(2): no folder of metric networks was given" in text
    assert "compare only rows of one protocol" in text
    assert "its notebook final_evaluations" in text


def test_named_groups_of_images_have_tables_of_their_own(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    assert "<h4>birds &amp; bees (2 images)</h4>" in page
    assert "<h4>one alone (1 image)</h4>" in page
    text = (run_dir / "metrics.md").read_text()
    assert "Only birds & bees (2 images):" in text
    assert "never shown" not in page + text
    lines = [line for line in csv.DictReader((run_dir / "metrics.csv").open()) if line["images"] == "birds & bees"]
    guided = next(line for line in lines if line["eta"] == "1.0" and line["metric"] == "pixcorr")
    findings = Findings(run_dir)
    row = next(row for row in findings.rows if row.point.eta == 1.0)
    values = findings.values(row, "pixcorr")
    assert float(guided["value"]) == pytest.approx((values[0] + values[2]) / 2)
    assert (guided["n"], {line["control"] for line in lines}) == ("2", {"", "shuffled", "nearest", "ceiling"})
    assert not [line for line in lines if line["control"] == "nearest" and line["metric"].startswith("repeat_")]


def test_figures_show_the_first_images_and_every_point_of_the_grid(run_dir: Path, tmp_path: Path) -> None:
    written = write_figures(run_dir, tmp_path / "figures")
    assert [path.name for path in written] == ["strip.png", "grid.png", "table.md"]
    findings, tile, step = Findings(run_dir), figures.SIDE, figures.SIDE + figures.EDGE
    strip = np.asarray(Image.open(written[0]).convert("RGB")).astype(int)
    assert strip.shape == (figures.LINE + 3 * step - figures.EDGE, 5 * step + 2 * figures.GAP - figures.EDGE, 3)
    left = 3 * step + 2 * figures.GAP  # first repeat with guidance, of the second image
    row = findings.guided(1)
    assert row is not None
    shown = np.asarray(Image.open(findings.repeats(row, 1)[0]).resize((tile, tile), Image.Resampling.LANCZOS))
    errors = {  # a palette of 256 colours changes every picture a little
        number: np.abs(strip[top : top + tile, left : left + tile] - shown).mean()
        for number, top in enumerate(range(figures.LINE, strip.shape[0], step))
    }
    assert min(errors, key=lambda number: errors[number]) == 1, errors
    assert errors[1] < 12, errors
    assert Image.open(written[1]).size == (
        5 * step + figures.GAP - figures.EDGE,
        2 * (figures.LINE + step) - figures.EDGE,
    )
    table = written[2].read_text()
    assert "η 1 |" not in table, "points of a sweep stay out"
    assert "ceiling: true embeddings" in table


def test_the_latex_table_escapes_text_and_prints_the_best_point_bold(run_dir: Path) -> None:
    text = (run_dir / "metrics.tex").read_text()
    lines = text.splitlines()
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    rows = [line for line in lines if line.endswith(r"\\") and " & " in line]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1, "every row has the same columns"
    assert len(rows) == 1 + 2 + 3, "heading, without and with guidance, controls"
    assert r"\textbf{" in rows[1] + rows[2]
    assert r"\textbf{" not in "".join(rows[3:]), "a control is never the best method"
    assert latex_text("a_b & 50 % κ") == r"a\_b \& 50 \% $\kappa$"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk_without_a_complaint(run_dir: Path, tmp_path: Path) -> None:
    page = run_dir / "report.html"
    with Chromium(tmp_path / "profile") as browser:
        for width in (390, 1280):
            browser.open(page, width)
            browser.ask("document.querySelectorAll('details').forEach(item => item.open = true)")
            assert browser.complaints == []
            assert browser.ask("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
            assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            assert browser.ask("document.images.length") > 20
            size = "parseFloat(getComputedStyle(document.querySelector('p')).fontSize)"
            assert browser.ask(size) >= 14, "text is readable without zooming"
            sticky = "getComputedStyle(document.querySelector('.metrics tbody th')).position"
            assert browser.ask(sticky) == "sticky", "a row keeps its name when its table is scrolled"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt-get install chromium)")
def test_the_browser_would_notice_a_broken_picture_an_error_and_a_wide_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><div style='width:2000px'>wide</div>"
        "<img src='data:image/png;base64,AAAA'><script>console.error('no')</script>"
    )
    with Chromium(tmp_path / "profile") as browser:
        browser.open(page, 390)
        assert any("no" in line for line in browser.complaints)
        assert browser.ask("document.documentElement.scrollWidth") >= 2000
        assert not browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
