"""Tracking: the numbers of a run, as TensorBoard and Weights & Biases hold them."""

import importlib.util
import json
from pathlib import Path

import pytest

from nd_dist.comm import Comm
from nd_dist.errors import ConfigError
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.report.findings import Findings
from nd_dist.report.tracking import log_run, scalars
from tests.nd_dist.evaluation.toy_world import toy_job, write_models

HAS = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "wandb")}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracking")
    write_models(folder)
    job = toy_job(folder, num_images=2, baseline=False)
    events = EventLog(job.config.run_dir, 0, "train")
    for step in range(3):
        events.write("train_step", stage=1, step=step, loss=3.0 - step)
    evaluate(job, Comm(), events)
    return job.config.run_dir


def test_every_metric_of_every_point_is_a_scalar_with_a_name_of_its_own(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())
    found = dict(scalars(Findings(run_dir)))
    assert len(found) == sum(len(point["metrics"]) for point in metrics["points"])
    name = "test/subj01/kappa-10_eta-0.5/pixcorr"
    assert found[name] == metrics["points"][0]["metrics"]["pixcorr"]["value"]


@pytest.mark.parametrize("tracker", [name for name, has in HAS.items() if not has])
def test_a_tracker_that_is_not_installed_is_named_with_how_to_install_it(run_dir: Path, tracker: str) -> None:
    with pytest.raises(ConfigError, match=r"nd-dist\[track\]"):
        log_run(run_dir, tracker)


@pytest.mark.skipif(not HAS["tensorboard"], reason="tensorboard is not installed (extra track)")
def test_tensorboard_reads_the_numbers_back_and_a_second_log_replaces_the_first(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_run(run_dir, "tensorboard")
    folder = log_run(run_dir, "tensorboard")
    assert len(list(folder.glob("events.out.*"))) == 1
    log = EventAccumulator(str(folder)).Reload()
    for name, value in scalars(Findings(run_dir)):
        assert log.Scalars(name)[0].value == pytest.approx(value, rel=1e-6)
    assert [point.value for point in log.Scalars("train/stage1/loss")] == [3.0, 2.0, 1.0]


@pytest.mark.skipif(not HAS["wandb"], reason="wandb is not installed (extra track)")
def test_wandb_writes_an_offline_run(run_dir: Path) -> None:
    folder = log_run(run_dir, "wandb")
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
