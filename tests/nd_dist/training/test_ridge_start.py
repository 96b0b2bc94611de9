"""A network that starts at the ridge regression: its first predictions, its space, and what cannot start so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from nd_dist.config import Config
from nd_dist.errors import Requeue
from nd_dist.models.decoder import Decoder
from nd_dist.models.ridge import RidgeDecoder
from nd_dist.models.voxels import RidgeEncoder
from nd_dist.training.parameters import parameter_groups
from nd_dist.training.ridge_start import start_at_ridge
from nd_dist.training.source import stage_request, stage_specs
from tests.nd_dist.training.one_rank import names, run
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import NUM_IMAGES, NUM_TEST, SyntheticSource

WIDE = {"decoder.hidden_size": 64, "decoder.prior_depth": 0}
"""A space wider than any subject has voxels: the network can express the regression."""
TEST_IDS = np.arange(NUM_IMAGES, NUM_IMAGES + NUM_TEST)


def recipe(folder: Path, **settings: Any) -> Config:
    return small_recipe(folder).replaced({**WIDE, **settings})


def at_random(config: Config, stage: int) -> Decoder:
    """A decoder of a stage with random weights."""
    source, request = SyntheticSource(), stage_request(config, stage, 1)
    torch.manual_seed(3)
    return Decoder(config.decoder, {s: source.num_voxels[s] for s in request.subjects}, stage_specs(config, source))


def start(decoder: Decoder, config: Config, stage: int, has_space: bool = False) -> list[str]:
    """Start a decoder of a stage at the ridge regression; returns the targets' names."""
    return start_at_ridge(
        decoder, SyntheticSource(), stage_request(config, stage, 1), torch.device("cpu"), has_space=has_space
    )


def started(config: Config, stage: int, model: Decoder | None = None) -> Decoder:
    """A decoder of a stage before its first step; with a model of stage 1 its heads are kept."""
    decoder = at_random(config, stage)
    if model is not None:
        decoder.heads.load_state_dict(model.heads.state_dict())
    start(decoder, config, stage, has_space=model is not None)
    return decoder.eval()


def predicted(decoder: Decoder | RidgeDecoder, subject: int, name: str) -> torch.Tensor:
    voxels = torch.from_numpy(SyntheticSource().clean_voxels(subject, TEST_IDS))
    return decoder.predict(voxels, subject, range(NUM_TEST), only={name})[name].flatten(1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean(dim=0)).norm())


def regression(folder: Path, subject: int) -> RidgeDecoder:
    config = recipe(folder, **{"decoder.kind": "ridge", "training.target_subject": subject, "training.stages": [2]})
    run(config)
    return RidgeDecoder.load(config.run_dir / "checkpoints" / "stage2" / "model")


@pytest.mark.parametrize("heads", ["joint", "single"])
def test_the_first_predictions_are_those_of_the_ridge_regression(tmp_path: Path, heads: str) -> None:
    decoder = started(recipe(tmp_path, **{"decoder.heads": heads, "training.stages": [2]}), 2)
    expected = regression(tmp_path / "ridge", 1)
    for name in ("c", "g02"):
        assert relative(predicted(decoder, 1, name), predicted(expected, 1, name)) < 1e-3


def test_a_narrow_space_keeps_the_directions_in_which_predictions_vary_most(tmp_path: Path) -> None:
    expected, errors = predicted(regression(tmp_path / "ridge", 1), 1, "c"), []
    for width in (2, 6, 12):
        config = recipe(tmp_path, **{"decoder.hidden_size": width, "training.stages": [2], "training.targets": ["c"]})
        errors.append(relative(predicted(started(config, 2), 1, "c"), expected))
    assert 1 > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_two_subjects_share_the_space(tmp_path: Path) -> None:
    decoder = started(recipe(tmp_path), 1)
    encoder = decoder.voxels["shared"]
    assert isinstance(encoder, RidgeEncoder)
    places = []
    for subject in (2, 5):
        expected = regression(tmp_path / f"ridge{subject}", subject)
        for name in ("c", "g02"):
            assert relative(predicted(decoder, subject, name), predicted(expected, subject, name)) < 0.01
        voxels = torch.from_numpy(SyntheticSource().clean_voxels(subject, TEST_IDS))
        with torch.no_grad():
            places.append(encoder({subject: voxels})[:, :4].T)
    for one, two in zip(*places, strict=True):  # the same pictures lie at the same places
        assert float(torch.corrcoef(torch.stack([one, two]))[0, 1]) > 0.9


def test_a_new_subject_is_fitted_onto_a_space_that_is_there(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    first = started(config, 1)
    decoder = started(config, 2, first)
    for name, weight in first.heads.state_dict().items():
        assert torch.equal(weight, decoder.heads.state_dict()[name]), name
    expected = regression(tmp_path / "ridge", 1)
    for name in ("c", "g02"):
        assert relative(predicted(decoder, 1, name), predicted(expected, 1, name)) < 0.03


def test_training_begins_far_below_the_random_start_and_goes_on_from_there(tmp_path: Path) -> None:
    found = {}
    for begin in ("random", "ridge"):
        settings = {"training.start": begin, "training.validate_every": 1, "training.targets": ["c", "g02"]}
        events = run(recipe(tmp_path / begin, **settings))
        found[begin] = {e["stage"]: e for e in reversed(events) if e["event"] == "validation"}  # after the first step
        assert ("ridge_start" in names(events)) == (begin == "ridge")
    for stage in (1, 2):
        for name in ("c/prior", "g02/prior"):
            one, two = (found[begin][stage]["values"][name] for begin in ("ridge", "random"))
            assert one < 0.25 * two, (stage, name)


def test_a_training_that_goes_on_is_not_started_anew(tmp_path: Path) -> None:
    whole, parts = (recipe(tmp_path / name, **{"training.start": "ridge"}) for name in ("whole", "parts"))
    run(whole)
    asked = iter([False, False, False, True])
    with pytest.raises(Requeue):
        run(parts, should_stop=lambda: next(asked))
    assert names(run(parts)).count("ridge_start") == 1  # stage 2's
    one, two = (Decoder.load(c.run_dir / "checkpoints" / "stage2" / "model").state_dict() for c in (whole, parts))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_z_alone_starts_at_random(tmp_path: Path) -> None:
    config = recipe(tmp_path, **{"training.targets": ["z"], "decoder.heads": "single", "training.start": "ridge"})
    decoder = at_random(config, 1)
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    assert start(decoder, config, 1) == []
    assert all(torch.equal(weight, before[name]) for name, weight in decoder.state_dict().items())


@pytest.mark.parametrize("heads", ["joint", "single"])
def test_what_starts_so_and_nothing_else_has_the_lower_rate(tmp_path: Path, heads: str) -> None:
    config = recipe(tmp_path, **{"decoder.heads": heads, "training.start": "ridge", "training.ridge_rate_share": 0.25})
    decoder = at_random(config, 1)
    before = {name: weight.clone() for name, weight in decoder.named_parameters()}
    start(decoder, config, 1)
    set_there = {name for name, weight in decoder.named_parameters() if not torch.equal(weight, before[name])}
    name_of = {id(parameter): name for name, parameter in decoder.named_parameters()}
    groups = parameter_groups(decoder.named_parameters(), config.training)
    slow = {name_of[id(parameter)] for group in groups if group["rate_share"] == 0.25 for parameter in group["params"]}
    assert slow == set_there != set()
    assert {group["rate_share"] for group in groups} == {0.25, 1.0}
    random = parameter_groups(decoder.named_parameters(), config.replaced({"training.start": "random"}).training)
    assert {group["rate_share"] for group in random} == {1.0}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("shard_layers", [False, True])
def test_the_lower_rate_is_the_one_that_trains(tmp_path: Path, zero_stage: int, shard_layers: bool) -> None:
    settings = {"start": "ridge", "ridge_rate_share": 1e-9, "zero_stage": zero_stage, "shard_layers": shard_layers}
    config = recipe(tmp_path, **{f"training.{key}": value for key, value in settings.items()})
    run(config.replaced({"training.stages": [1], "training.learning_rate": 0.01}))
    before = started(config, 1).state_dict()
    after = Decoder.load(config.run_dir / "checkpoints" / "stage1" / "model").state_dict()
    for name in ("heads.c.backbone.linear.weight", "voxels.shared.subjects.2.weight", "voxels.shared.subjects.5.bias"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-4)
    head = "heads.c.contrastive.2.weight"  # at random: another weight at the start, and the whole rate
    assert float((after[head] - before[head]).abs().max()) > 0.01


@pytest.mark.parametrize(("key", "value"), [("decoder.mixer", "single_residual"), ("decoder.kind", "tokens")])
def test_a_network_that_is_not_affine_cannot_start_so(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ValidationError, match=r"training\.start=ridge needs"):
        recipe(tmp_path, **{"training.start": "ridge", key: value})


def test_a_ridge_regression_without_stage_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="fitted in stage 2"):
        recipe(tmp_path, **{"decoder.kind": "ridge", "training.stages": [1]})
