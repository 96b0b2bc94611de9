"""What other packages add: metrics and judges that entry points name, guidance that a recipe names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nd_dist.errors import ConfigError
from nd_dist.metrics.protocols import protocol_named
from nd_dist.plugins import named_object, registered
from tests.support.waiting import HANG_S

LAB = """
def brightness(recon, seen):
    return float(recon.pixels_CHW.mean() - seen.pixels_CHW.mean())

def metric():
    from nd_dist.metrics.table import Metric
    return Metric("brightness", "Brightness", "low-level", True, False, None, "Brighter by.", function=brightness)

def protocol():
    import dataclasses
    from nd_dist.metrics.protocols import protocol_named
    return dataclasses.replace(protocol_named("mindeye2"), name="corner", num_test_images=12)

class Judge:
    name, score, identity = "corner", "distance", "corner"
    def __init__(self, device):
        pass
    def features(self, pixels_BCHW):
        return pixels_BCHW[:, :, :4, :4].flatten(1)

class Towards:
    version = 2
"""

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from nd_dist.comm import Comm
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.report.report import write_report
from tests.nd_dist.evaluation.toy_world import toy_job, write_models
torch.set_num_threads(1)
folder = Path(sys.argv[1])
if not (folder / "models").exists():
    write_models(folder)
job = toy_job(folder, num_images=2)
metrics = evaluate(job, Comm(), EventLog(job.config.run_dir, 0, "evaluate"))
write_report(job.config.run_dir)
print(json.dumps(sorted(metrics["points"][0]["metrics"])))
"""


def evaluate(folder: Path, *lab: Path) -> set[str]:
    """Return the names of the metrics of an evaluation in a process that sees another package, or none."""
    path = os.pathsep.join([*map(str, lab), os.getcwd()])
    words = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with an installed package of somebody else's."""
    place = tmp_path / "lab"
    (place / "corner_lab-1.dist-info").mkdir(parents=True)
    (place / "corner_lab-1.dist-info" / "METADATA").write_text("Name: corner-lab\nVersion: 1\n")
    (place / "corner_lab.py").write_text(LAB)
    points = "[nd_dist.metrics]\nbrightness = corner_lab:metric\n[nd_dist.judges]\ncorner = corner_lab:Judge\n"
    points += "[nd_dist.protocols]\ncorner = corner_lab:protocol\n"
    (place / "corner_lab-1.dist-info" / "entry_points.txt").write_text(points)
    return place


@pytest.mark.launch
def test_a_metric_and_a_judge_of_another_package_are_computed_for_pictures_that_are_there(
    tmp_path: Path, lab: Path
) -> None:
    before = evaluate(tmp_path)
    pictures = sorted((tmp_path / "run" / "reconstructions").rglob("*.png"))
    made = [path.stat().st_mtime_ns for path in pictures]
    assert evaluate(tmp_path, lab) == before | {"brightness", "corner"}
    assert [path.stat().st_mtime_ns for path in pictures] == made
    assert "Brightness" in (tmp_path / "run" / "report.html").read_text()


def test_a_class_that_a_recipe_names_is_found_and_a_missing_one_is_named(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(lab))
    assert named_object("sampler.guidance", "corner_lab:Towards").version == 2
    assert registered("judges", "cpu")["corner"].name == "corner"
    assert registered("metrics")["brightness"].label == "Brightness"
    assert protocol_named("corner").num_test_images == 12
    with pytest.raises(ConfigError, match="evaluation.protocol=corner"):
        protocol_named("corners")
    for name in ("corner_lab:Nothing", "nothing_here:Class", "clipp"):
        with pytest.raises(ConfigError, match=name):
            named_object("sampler.guidance", name)
