from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.packing.estimate import PackEstimate, estimate_pack
from tests.shards.support import PooledExtractor, make_config


def test_a_sample_is_packed_elsewhere_and_scaled_up(phantom_dir: Path, tmp_path: Path) -> None:
    config = make_config(phantom_dir, tmp_path / "shards")
    extractor = PooledExtractor()
    estimate = estimate_pack(config, extractor)
    assert estimate.trials_s > 0
    assert estimate.images_s > 0
    assert sum(len(batch) for batch in extractor.batches) == 5, "one picture to warm up, four to measure"
    assert list(tmp_path.iterdir()) == [], "nothing is left, least of all in the recipe's folders"


@pytest.mark.parametrize("normalization", ["session-train", "brain-diffuser"])
def test_without_networks_only_trials_are_timed_and_it_says_so(
    phantom_dir: Path, tmp_path: Path, normalization: str
) -> None:
    estimate = estimate_pack(make_config(phantom_dir, tmp_path / "shards", normalization=normalization), None)
    assert np.isnan(estimate.images_s)
    assert "targets not counted" in estimate.describe(2)


def test_the_minutes_are_shared_among_the_ranks() -> None:
    text = PackEstimate(trials_s=1200, images_s=3600).describe(4)
    assert "about 20.0 minutes on 4 rank(s)" in text
    assert "trials 20.0, targets and pictures 60.0 minutes of one rank" in text


def test_damaged_betas_are_found_before_hours_of_work(phantom_copy: Path, tmp_path: Path) -> None:
    (phantom_copy / "nsddata/experiments/nsd/nsd_expdesign.mat").unlink()
    with pytest.raises(DataError, match="design is missing"):
        estimate_pack(make_config(phantom_copy, tmp_path / "shards"), None)
