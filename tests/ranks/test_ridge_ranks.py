"""Ridge regression on two real ranks, killed and run again: the same model, file by file."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nd_dist.checkpoint import read_tensors
from nd_dist.config import Config
from tests.ranks.launching import events_of, run_ranks, write_job
from tests.ranks.recipe import small_recipe

pytestmark = pytest.mark.launch


def recipe(folder: Path) -> Config:
    return small_recipe(folder).replaced({"decoder.kind": "ridge"})


def model_dir(config: Config) -> Path:
    return config.run_dir / "checkpoints" / "stage2" / "model"


def description(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model_dir(config) / "config.json").read_text())
    return found


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = recipe(tmp_path_factory.mktemp("two"))
    assert run_ranks(2, write_job(config.run_dir.parent / "job.json", config)) == [0, 0]
    return config


def test_the_model_is_the_same_on_one_and_two_ranks(on_two: Config, tmp_path: Path) -> None:
    one = recipe(tmp_path)
    assert run_ranks(1, write_job(tmp_path / "job.json", one)) == [0]
    assert description(one)["penalties"] == description(on_two)["penalties"]
    files = sorted(path.name for path in model_dir(one).glob("*.safetensors"))
    assert files == sorted(path.name for path in model_dir(on_two).glob("*.safetensors"))
    for name in files:
        for key, values in read_tensors(model_dir(one) / name).items():
            np.testing.assert_allclose(values, read_tensors(model_dir(on_two) / name)[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fit_whose_rank_was_killed_gives_the_same_bits_when_it_is_run_again(
    on_two: Config, tmp_path: Path, rank: int
) -> None:
    config = recipe(tmp_path)
    killed = write_job(tmp_path / "killed.json", config, kill_at=1, kill_rank=rank)
    assert run_ranks(2, killed)[rank] == -signal.SIGKILL
    assert not (model_dir(config) / "config.json").exists()
    assert run_ranks(2, write_job(tmp_path / "job.json", config)) == [0, 0]
    assert description(config) == description(on_two), "hashes of all files included"
    assert [e["event"] for e in events_of(config)].count("ridge_target") > 0
