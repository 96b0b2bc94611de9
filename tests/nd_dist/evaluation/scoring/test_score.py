"""Scores from judged images on disk: repeat rules, streaming blocks, order of the images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from nd_dist.checkpoint import write_tensors
from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import FEATURES
from nd_dist.evaluation.reconstruction.decode import ImageTargets
from nd_dist.evaluation.scoring import score
from nd_dist.evaluation.scoring.retrieved import correlation_metrics, retrieval_metrics
from nd_dist.evaluation.scoring.score import JudgedImages, JudgedSheets, score_images
from nd_dist.fanout.results import publish
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.identification import correlation_matrix, two_way
from nd_dist.metrics.protocols import Protocol, protocol_named
from nd_dist.metrics.statistics.scores import Scores, Statistics, compare, kept_arrays, scored_arrays

NUM, REPEATS, WIDTH = 9, 3, 6
JUDGES: dict[str, score.Score] = {"clip": "two_way", "swav": "distance"}


def judged_images(folder: Path, sheet: int = 4) -> tuple[JudgedImages, np.ndarray, np.ndarray]:
    """Write features and metrics of made-up images; return them with the features (N, D) and (N, R, D)."""
    rng = np.random.default_rng(0)
    reals = rng.standard_normal((NUM, WIDTH)).astype(np.float32)
    recons = (reals[:, None] + rng.standard_normal((NUM, REPEATS, WIDTH))).astype(np.float32)
    pixcorr = rng.uniform(size=(NUM, REPEATS))
    sides = {}
    for side, features in (("originals", reals[:, None]), ("recons", recons)):
        places = []
        for start in range(0, NUM, sheet):
            rows = slice(start, start + sheet)
            tensors = {name: torch.from_numpy(features[rows].transpose(1, 0, 2).copy()) for name in JUDGES}
            metrics = {"pixcorr": pixcorr[rows].tolist(), "repeat_pixcorr": pixcorr[rows, 0].tolist()}
            facts = {"image_ids": list(range(NUM))[rows], "metrics": metrics}
            places.append(folder / side / str(start))
            publish(places[-1], "f", facts, lambda path, t=tensors: write_tensors(path / FEATURES, t))  # type: ignore[misc]
        sides[side] = JudgedSheets(places)
    return JudgedImages(sides["recons"], sides["originals"], range(NUM), REPEATS), reals, recons


def value(judged: JudgedImages, protocol: Protocol, name: str, summed: int) -> float:
    arrays = dict(score_images(judged, JUDGES, protocol))
    return scored_arrays(arrays, summed, protocol.distractors, Statistics(100))[name].value


def test_all_repeats_count_in_the_default_protocol(tmp_path: Path) -> None:
    judged, reals, recons = judged_images(tmp_path)
    each = [two_way(correlation_matrix(reals, recons[:, repeat])) for repeat in range(REPEATS)]
    assert value(judged, protocol_named("nd"), "clip", REPEATS) == pytest.approx(np.mean(each))
    distances = [correlation_distance(reals, recons[:, repeat]).mean() for repeat in range(REPEATS)]
    assert value(judged, protocol_named("nd"), "swav", REPEATS) == pytest.approx(np.mean(distances))


def test_only_the_first_repeat_counts_where_the_protocol_has_one_sample(tmp_path: Path) -> None:
    judged, reals, recons = judged_images(tmp_path)
    assert value(judged, protocol_named("mindeye2"), "clip", 1) == two_way(correlation_matrix(reals, recons[:, 0]))


def test_correlations_are_averaged_before_comparing_where_the_protocol_says_so(tmp_path: Path) -> None:
    judged, reals, recons = judged_images(tmp_path)
    mean = np.mean([correlation_matrix(reals, recons[:, repeat]) for repeat in range(REPEATS)], axis=0)
    assert value(judged, protocol_named("takagi"), "clip", 1) == two_way(mean, "reconstruction")


def test_sheets_and_the_order_of_images_do_not_change_a_value(tmp_path: Path) -> None:
    judged, _, _ = judged_images(tmp_path / "four")
    protocol = protocol_named("nd")
    names = ("pixcorr", "repeat_pixcorr", "clip", "swav")
    before = [value(judged, protocol, name, REPEATS) for name in names]
    order = np.random.default_rng(1).permutation(NUM).tolist()
    shuffled = dataclasses.replace(judged, image_ids=order)
    assert [value(shuffled, protocol, name, REPEATS) for name in names] == before
    other, _, _ = judged_images(tmp_path / "nine", sheet=NUM)
    assert [value(other, protocol, name, REPEATS) for name in names] == before


def test_the_direction_stands_beside_every_value(tmp_path: Path) -> None:
    judged, _, _ = judged_images(tmp_path)
    arrays = dict(score_images(judged, JUDGES, protocol_named("nd")))
    metrics = scored_arrays(arrays, REPEATS, "real", Statistics(100))
    assert {name: item.higher_is_better for name, item in metrics.items()} == {
        "pixcorr": True, "repeat_pixcorr": True, "clip": True, "swav": False,
    }  # fmt: skip


def test_a_point_compared_with_itself_differs_by_nothing(tmp_path: Path) -> None:
    judged, _, _ = judged_images(tmp_path)
    arrays = dict(score_images(judged, JUDGES, protocol_named("nd")))
    scored = scored_arrays(arrays, REPEATS, "real", Statistics(100))
    kept = {key: array.numpy() for key, array in kept_arrays(scored).items()}
    scores = Scores({name: item.as_json() for name, item in scored.items()}, tuple(range(NUM)), kept)
    assert set(compare(scores, scores)) == {"pixcorr", "repeat_pixcorr", "clip", "swav"}
    for found in compare(scores, scores).values():
        assert (found.value, found.n) == (0.0, NUM)


class Targets(ImageTargets):
    def __init__(self, noise: float) -> None:
        rng = np.random.default_rng(0)
        self._rows = rng.standard_normal((400, 2, 4)) + noise * np.random.default_rng(1).standard_normal((400, 2, 4))

    def rows(self, name: str, image_ids: list[int]) -> np.ndarray:  # type: ignore[override]
        return self._rows[image_ids] ** (3 if name == "g02" else 1)  # g02 is another target than the rest


def test_retrieval_is_three_hundred_way_with_enough_images_and_all_way_with_few() -> None:
    exact, drawn = retrieval_metrics(Targets(0.0), Targets(0.0), "g12", list(range(310)), Statistics(100))
    assert {key: len(array) for key, array in drawn.items()} == {
        "draws.image_retrieval": 30,
        "draws.brain_retrieval": 30,
    }
    assert {item["value"] for item in exact.values()} == {1.0}
    assert {(item["candidates"], item["draws"]) for item in exact.values()} == {(300, 30)}
    few, _ = retrieval_metrics(Targets(1.0), Targets(0.0), "g12", list(range(20)), Statistics(100))
    assert {(item["candidates"], item["draws"], item["n"], item["chance"]) for item in few.values()} == {
        (20, 1, 20, 0.05)
    }
    for item in few.values():
        assert item["ci_low"] <= item["value"] <= item["ci_high"]


def test_correlations_of_decoded_targets_leave_out_what_all_pictures_have_in_common() -> None:
    noisy, true, ids = Targets(1.0), Targets(0.0), list(range(20))
    found, arrays = correlation_metrics(noisy, true, ["c", "g02", "g12"], ids, Statistics(100))

    def by_hand(name: str) -> np.ndarray:
        rows = [targets.rows(name, ids).reshape(20, -1) for targets in (noisy, true)]
        first, second = (each - each.mean(axis=0) for each in rows)
        return np.array([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(first, second, strict=True)])

    assert set(found) == {"decoded_c", "decoded_g"}
    assert arrays["added.decoded_c"].numpy() == pytest.approx(by_hand("c"))
    assert arrays["added.decoded_g"].numpy() == pytest.approx((by_hand("g02") + by_hand("g12")) / 2)
    assert found["decoded_g"]["value"] != pytest.approx(found["decoded_c"]["value"])
    noisy._rows += 7.0
    again, _ = correlation_metrics(noisy, true, ["c"], ids, Statistics(100))
    assert again["decoded_c"]["value"] == pytest.approx(found["decoded_c"]["value"])
    assert correlation_metrics(noisy, true, ["c"], [3], Statistics(100)) == ({}, {})
    noisy._rows[:] = 7.0
    assert correlation_metrics(noisy, true, ["c"], ids, Statistics(100))[0]["decoded_c"]["value"] == 0.0
    noisy._rows[3, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        correlation_metrics(noisy, true, ["c"], ids, Statistics(100))
