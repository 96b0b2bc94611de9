"""The metrics as torchmetrics classes: the functions' numbers, in any batches and over ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import Metric

from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.identification import correlation_matrix, two_way
from nd_dist.metrics.modules import (
    CorrelationDistance,
    PixCorr,
    RepeatAgreement,
    Retrieval,
    Ssim,
    TwoWayIdentification,
)
from nd_dist.metrics.pixel import pixel_correlation, structural_similarity
from nd_dist.metrics.retrieval import brain_hits, cosine_matrix, image_hits

NUM = 7


def features(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(NUM, 3, 4, generator=generator)
    return first, first + 2 * torch.randn(NUM, 3, 4, generator=generator)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(NUM, 3, 16, 16, generator=generator), torch.rand(NUM, 3, 16, 16, generator=generator)


def in_batches(metric: Metric, *sides: torch.Tensor) -> float:
    for rows in (slice(0, 3), slice(3, 4), slice(4, None)):
        metric.update(*(side[rows] for side in sides))
    return float(metric.compute())


def test_pixel_metrics_are_the_means_of_the_functions() -> None:
    recons, originals = pictures()
    expected = float(pixel_correlation(recons, originals).mean())
    assert in_batches(PixCorr(), recons, originals) == pytest.approx(expected, abs=1e-15)
    for kind in ("2d", "columns"):
        expected = float(structural_similarity(recons, originals, kind).mean())
        assert in_batches(Ssim(kind), recons, originals) == pytest.approx(expected, abs=1e-15)


def test_feature_metrics_are_those_of_the_functions() -> None:
    originals, recons = features(0)
    flat = [side.flatten(1).double().numpy() for side in (originals, recons)]
    for distractors in ("real", "reconstruction"):
        expected = two_way(correlation_matrix(*flat), distractors)
        assert in_batches(TwoWayIdentification(distractors), recons, originals) == expected
    expected = correlation_distance(*flat).mean()
    assert in_batches(CorrelationDistance(), recons, originals) == pytest.approx(expected, abs=1e-15)
    cosines = cosine_matrix(flat[1], flat[0])
    assert in_batches(Retrieval("image"), recons, originals) == image_hits(cosines).mean()
    assert in_batches(Retrieval("brain"), recons, originals) == brain_hits(cosines).mean()
    assert (
        in_batches(Retrieval("image", num_candidates=2, num_draws=50), recons, originals) > image_hits(cosines).mean()
    )


def test_equal_repeats_agree_wholly_and_a_reset_metric_starts_anew() -> None:
    recons, others = pictures()
    metric = RepeatAgreement("ssim")
    metric.update(torch.stack([recons, others], dim=1))
    assert float(metric.compute()) == pytest.approx(float(structural_similarity(recons, others).mean()))
    metric.reset()
    metric.update(torch.stack([recons, recons], dim=1))
    assert float(metric.compute()) == pytest.approx(1.0)


def score_part(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    originals, recons = features(0)
    rows = slice(0, 5) if rank == 0 else slice(5, None)
    metrics: list[Metric] = [TwoWayIdentification(), CorrelationDistance(), Retrieval()]
    found = []
    for metric in metrics:
        metric.update(recons[rows], originals[rows])
        found.append(float(metric.compute()))
    np.save(f"{out}.{rank}.npy", found)
    dist.destroy_process_group()


@pytest.mark.launch
def test_two_ranks_with_different_pictures_agree_on_the_numbers_of_one(tmp_path: object) -> None:
    mp.spawn(score_part, (f"{tmp_path}/store", f"{tmp_path}/out"), nprocs=2)
    originals, recons = features(0)
    alone = [
        in_batches(metric, recons, originals)
        for metric in (TwoWayIdentification(), CorrelationDistance(), Retrieval())
    ]
    for rank in (0, 1):
        assert np.load(f"{tmp_path}/out.{rank}.npy").tolist() == alone
