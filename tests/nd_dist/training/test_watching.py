"""What is seen of a training: validation and the best model, early stop, curves, profiler trace."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from nd_dist.config import Config
from nd_dist.metrics.kind import fit_probe, labels_of
from nd_dist.models.decoder import Decoder
from nd_dist.training.objective.losses import soft_clip
from tests.nd_dist.training.one_rank import Events, losses, run
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import NUM_IMAGES, NUM_TEST, SyntheticSource


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Events]:
    config = small_recipe(
        tmp_path_factory.mktemp("watched"),
        stages=(2,), steps=(1, 9), validate_every=2, monitors=("csv", "tensorboard"), profile=True, learning_rate=1e-2,
    )  # fmt: skip
    return config, run(config)


def validations(events: Events) -> dict[int, dict[str, float]]:
    return {event["step"]: event["values"] for event in events if event["event"] == "validation"}


def test_validation_comes_at_its_steps_and_at_the_end(watched: tuple[Config, Events]) -> None:
    assert list(validations(watched[1])) == [2, 4, 6, 8, 9]


def test_validation_numbers_are_those_of_outputs_averaged_over_three_repeats(watched: tuple[Config, Events]) -> None:
    config, events = watched
    decoder = Decoder.load(config.run_dir / "checkpoints" / "stage2" / "model")
    source = SyntheticSource()
    voxels_BRV, targets = source.validation_trials(1, source.validation_images(1)[1], ("c", "z", "g02"))
    with torch.no_grad():
        runs = [decoder({1: voxels_BRV[:, repeat]}) for repeat in range(3)]
    found = validations(events)[9]
    latent = torch.stack([out["z"].latent_BCHW for out in runs]).mean(0)
    assert found["z/l1"] == pytest.approx(float((latent - targets["z"]).abs().mean()) / 0.18215, rel=1e-4)
    for name in ("c", "g02"):
        predicted = torch.stack([out[name].contrastive_BLD for out in runs]).mean(0)
        predicted, target = (F.normalize(rows.flatten(1), dim=-1) for rows in (predicted, targets[name]))
        assert found[f"{name}/contrastive"] == pytest.approx(float(soft_clip(predicted, target, 0.006)), rel=1e-4)
        best_image = (predicted @ target.T).argmax(dim=1)
        share = float((best_image == torch.arange(NUM_TEST)).float().mean())
        assert found[f"{name}/top1_image_given_voxels"] == pytest.approx(share)
    total = found["z/l1"] + sum(30 * found[f"{n}/prior"] + found[f"{n}/contrastive"] for n in ("c", "g02"))
    assert found["loss"] == pytest.approx(total, rel=1e-6)


class SourceOfTwoKinds(SyntheticSource):
    """Knows of every image whether its c is above zero on the whole."""

    def image_classes(self) -> dict[str, list[int]]:
        ids = range(NUM_IMAGES + NUM_TEST)
        is_high = (self.target("c", np.array(ids)).flatten(1).mean(dim=1) > 0).tolist()
        return {name: [i for i in ids if is_high[i] == wanted] for name, wanted in (("high", True), ("low", False))}


def test_validation_reads_the_kind_from_decoded_captions_where_classes_are_known(tmp_path: Path) -> None:
    source, config = SourceOfTwoKinds(), small_recipe(tmp_path, stages=(2,), steps=(1, 3), validate_every=3)
    config = config.replaced({"decoder.prior_depth": 0})
    found = validations(run(config, source))[3]
    decoder = Decoder.load(config.run_dir / "checkpoints" / "stage2" / "model")
    _, test_ids = source.validation_images(1)
    voxels_BRV, _ = source.validation_trials(1, test_ids, ("c",))
    with torch.no_grad():
        backbone = torch.stack([decoder({1: voxels_BRV[:, r]})["c"].backbone_BLD for r in range(3)]).mean(dim=0)
    classes, ids = source.image_classes(), source.fit_images(1, None)
    probe = fit_probe(source.image_targets("c", ids), labels_of(classes, ids))
    is_high = (probe.scores(backbone.numpy()).argmax(axis=1) == 0).tolist()
    hits = [(image_id in classes["high"]) == high for image_id, high in zip(test_ids, is_high, strict=True)]
    assert found["c/kind"] == pytest.approx(np.mean(hits))
    assert "g02/kind" not in found


def test_the_best_model_is_the_one_with_the_lowest_validation_loss(watched: tuple[Config, Events]) -> None:
    config, events = watched
    folder = config.run_dir / "checkpoints" / "stage2"
    record = json.loads((folder / "best.json").read_text())
    found = {step: values["loss"] for step, values in validations(events).items()}
    assert record["step"] == min(found, key=lambda step: found[step])
    assert record["validation"]["loss"] == min(found.values())
    assert [path.name for path in folder.glob("best-*")] == [record["name"]]
    assert Decoder.load(folder / record["name"]).num_voxels == {1: 40}


def test_early_stop_ends_a_stage_that_does_not_get_better_and_is_off_by_default(tmp_path: Path) -> None:
    # a rate so small that nothing changes in float32: the second validation is not better
    config = small_recipe(
        tmp_path, stages=(2,), steps=(1, 30), validate_every=2, early_stop=2, learning_rate=1e-30, weight_decay=0.0
    )
    steps = [step for _, step in losses(run(config))]
    assert steps == list(range(6))
    record = json.loads((config.run_dir / "checkpoints" / "stage2" / "done.json").read_text())
    assert record["step"] == 6
    (config.run_dir / "checkpoints" / "stage2" / "done.json").unlink()
    assert losses(run(config)) == {}  # it ended at step 6, also when its record is lost
    assert small_recipe(tmp_path).training.early_stop == 0


def test_the_monitor_gets_every_step_and_validation(watched: tuple[Config, Events]) -> None:
    config, events = watched
    folder = config.run_dir / "monitor" / "stage2"
    with open(folder / "train_loss.csv") as stream:
        rows = list(csv.reader(stream))[1:]
    assert [(int(step), pytest.approx(float(value))) for step, value in rows] == [
        (step + 1, loss) for (_, step), loss in losses(events).items()
    ]
    assert (folder / "test_c_top1_image_given_voxels.csv").exists()
    board = EventAccumulator(str(folder)).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in board.Scalars("train/loss")] == [
        (step + 1, loss) for (_, step), loss in losses(events).items()
    ]


def test_the_profiler_writes_one_trace_of_some_steps(watched: tuple[Config, Events]) -> None:
    trace = json.loads((watched[0].run_dir / "profile" / "stage2-rank-0000.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any(name.startswith("ProfilerStep") for name in names)
    assert any("addmm" in name for name in names)
