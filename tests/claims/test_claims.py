"""What NeuralDiffuser claims, measured on the phantom through the product's own commands (``make claims``).

Every number is read from ``metrics.json``, with its bootstrap interval over test images. A claim that does not hold
fails here with both intervals in the message.
"""

import numpy as np
import pytest

from nd_dist.metrics.statistics.bootstrap import Difference, difference, mean_of, mean_resampled, resample_counts
from nd_dist.metrics.statistics.scores import compare
from nd_dist.schema import TARGETS
from tests.claims.conftest import copy_stage_1
from tests.claims.line import World, interval

pytestmark = pytest.mark.claims

LOW_LEVEL = ("pixcorr", "ssim")
AGREEMENT = ("repeat_pixcorr", "repeat_ssim")
RETRIEVAL = ("image_retrieval", "brain_retrieval")
IDENTIFICATION = ("plain_early", "plain_late", "residual", "mixer")
FEW_SESSIONS = "training.sessions=[1]"


@pytest.mark.parametrize("metric", [*LOW_LEVEL, *AGREEMENT])
def test_guidance_raises_likeness_and_agreement_of_repeats_on_the_same_pictures(world: World, metric: str) -> None:
    gain = world.metrics("run").gain(metric)
    assert gain["ci_low"] > 0, f"{metric}: {interval(gain)}"


@pytest.mark.parametrize("metric", [*LOW_LEVEL, *AGREEMENT])
def test_intervals_with_and_without_guidance_lie_apart(world: World, metric: str) -> None:
    metrics = world.metrics("run")
    without, guided = metrics.point(0, 0)[metric], metrics.chosen()[metric]
    assert guided["ci_low"] > without["ci_high"], f"{metric}: without {interval(without)}, with {interval(guided)}"


def test_the_guidance_point_was_chosen_on_training_pictures_that_training_left_out(world: World) -> None:
    selection = world.metrics("run").content["selection"]
    assert selection["heldout"]
    test_images = set(world.metrics("run").content["images"]["1"])
    assert not test_images & set(selection["images"]["1"])


def test_too_little_guidance_does_little_and_too_much_destroys(world: World) -> None:
    metrics = world.metrics("run")
    grid = [(e["kappa"], e["eta"]) for e in metrics.content["points"] if e["kappa"] > 0]
    least, most = min(grid), max(grid)
    best = metrics.chosen()["pixcorr"]
    weak, strong = metrics.point(*least)["pixcorr"], metrics.point(*most)["pixcorr"]
    assert weak["value"] < best["ci_low"], f"kappa, eta {least}: {interval(weak)}, chosen: {interval(best)}"
    assert strong["ci_high"] < best["ci_low"], f"kappa, eta {most}: {interval(strong)}, chosen: {interval(best)}"


def test_shuffled_voxels_are_at_chance_in_every_identification_metric(world: World) -> None:
    shuffled = world.metrics("run").control("shuffled")
    two_way = {name: item for name, item in shuffled.items() if name in IDENTIFICATION}
    assert len(two_way) == len(IDENTIFICATION)
    off = {name: interval(item) for name, item in two_way.items() if not item["ci_low"] <= 0.5 <= item["ci_high"]}
    assert not off


def test_true_embeddings_bound_what_decoding_reaches(world: World) -> None:
    metrics = world.metrics("run")
    ceiling, decoded = metrics.control("ceiling"), metrics.recipe()
    shared = [name for name in decoded if name in ceiling]
    assert {*LOW_LEVEL, *IDENTIFICATION} <= set(shared)
    sign = {name: 1 if decoded[name]["higher_is_better"] else -1 for name in shared}
    above = [name for name in shared if sign[name] * (decoded[name]["value"] - ceiling[name]["value"]) > 0]
    assert not above


def test_pretraining_on_others_helps_a_subject_with_one_session(world: World) -> None:
    few = ["training.steps=[200,200]", FEW_SESSIONS, "evaluation.controls=false", "evaluation.num_repeats=1"]
    copy_stage_1(world, "run", "pretrained")
    for run, stages in (("pretrained", "[1,2]"), ("alone", "[2]")):
        for command in ("train", "evaluate"):
            world.nd(command, run, *few, f"training.stages={stages}")
    assert {
        name: gain for name, gain in decoding_gains(world, "pretrained", "alone").items() if gain.ci_low <= 0
    } == {}
    pretrained, alone = (world.metrics(run).recipe() for run in ("pretrained", "alone"))
    for name in RETRIEVAL:
        assert pretrained[name]["value"] > alone[name]["value"], (
            f"{interval(alone[name])}, {interval(pretrained[name])}"
        )


def test_the_pictures_of_a_subject_with_one_session_are_more_alike_after_pretraining(world: World) -> None:
    gain = compare(world.scores("pretrained"), world.scores("alone"))["pixcorr"]  # on the same pictures and noise
    assert gain.ci_low > 0, str(gain)


def decoding_gains(world: World, first: str, second: str) -> dict[str, Difference]:
    """Return target -> paired difference of two runs in how well it is decoded: centred correlation per picture."""
    subject, image_ids = world.test_images(first)
    counts_BN = resample_counts(len(image_ids), 1000, 0)
    gains = {}
    for name in TARGETS:
        true = centred(world.reader.targets(name, image_ids))
        sides = []
        for run in (first, second):
            values_N = (centred(world.decoded(run, subject).rows(name, image_ids)) * true).sum(axis=1)
            sides.append((mean_of(values_N), mean_resampled(values_N, counts_BN)))
        gains[name] = difference(sides[0], sides[1], len(image_ids))
    return gains


def centred(rows: np.ndarray) -> np.ndarray:
    """Return rows less their mean row, each of length 1, (N, D)."""
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    flat -= flat.mean(axis=0)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)
