"""What is checked and said before ranks are started, on an index of shards with NSD's sizes (and nothing else)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.training_memory import SHAPES, VOXELS
from launch.recipe import load_recipe
from launch.supervise.checks import checks_of
from launch.supervise.decoder import check_split, decoder_dir
from launch.supervise.memory import memory_note, needed_bytes, stage_counts
from launch.supervise.preflight import advice, require
from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from nd_dist.training.records import stage_dir, training_fingerprint, write_best, write_done
from tests.support.command_line import nd
from tests.support.shard_index import write_index

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("shards"))


def paper(shards: Path, *words: str) -> Config:
    return load_recipe("paper", [*words, f"shards_dir={shards}"], "train")


def documented() -> list[list[str]]:
    """The words of every command that trains and stands in README or docs."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    lines = [
        line for text in texts for line in text.splitlines() if re.match(r" {4}nd +(submit +)?train +paper", line)
    ]
    assert len(lines) >= 6
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
@pytest.mark.parametrize("ranks", [1, 4, 8, 16, 32, 64])
def test_every_documented_training_passes_on_any_number_of_ranks(words: list[str], ranks: int, shards: Path) -> None:
    is_axis = "--grid" in words
    overrides = [re.sub(r"=\[([^,\]]+),.*", r"=\1", word) if is_axis else word for word in words if "=" in word]
    own = [word for word in overrides if not word.startswith("shards_dir=")]
    checks = checks_of("train", paper(shards, *own), ranks)
    del checks["room"]  # this machine's
    require(checks)


def test_the_published_recipe_starts_on_eight_ranks_and_its_dry_run_says_what_a_gpu_needs(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _folder: SimpleNamespace(free=10**15)
    )  # whatever disk tests are on
    words = [f"shards_dir={shards}", "run_dir=runs/a", "training.targets=[c]"]
    told = nd("train", "paper", *words, "--ranks", "8", "--dry-run").stdout
    assert re.search(r"# room: stage 1 needs \d\.\d GB on each GPU, stage 2 needs \d\.\d GB on each GPU, ", told)


def test_ranks_that_share_few_rows_and_networks_that_share_a_gpu_are_pointed_at_the_grid(shards: Path) -> None:
    (told,) = advice("train", paper(shards, "training.targets=[c]"), 16)
    assert told.startswith("16 ranks share the 42 rows of a step")
    assert advice("train", paper(shards, "training.targets=[c]"), 8) == []
    assert advice("train", paper(shards, "training.targets=[c]", "training.rows_per_rank=7"), 64) == []
    (told,) = advice("train", paper(shards), 8)
    assert told == "8 networks are trained as one; --all-targets trains each separately"


def test_a_training_that_no_gpu_holds_is_refused_with_what_would_help(shards: Path) -> None:
    config = paper(shards, "training.targets=[c]")
    counts = stage_counts(config, VOXELS, [TargetSpec("c", role_of("c"), SHAPES["c"])], 1)
    needed = needed_bytes(counts, config.training, 1)
    assert 9e9 < needed[2] < needed[1] < 20e9
    assert memory_note(needed, 24 * 2**30, config, 1).startswith("stage 1 needs")
    several = paper(shards, "training.targets=[c,z]", "training.dtype=float32")
    with pytest.raises(ConfigError, match="more memory than a GPU has") as caught:
        memory_note(needed, 8 * 2**30, several, 2)
    for way in ("--all-targets", "more ranks than 2", "training.dtype=bfloat16", "training.zero_stage=2"):
        assert way in caught.value.todo


def test_a_ridge_regression_says_its_cost_counts_no_network_and_needs_no_other_subject(shards: Path) -> None:
    words = ["decoder.kind=ridge", "data.subjects=[1]", "training.heldout_fraction=0.1"]
    require(checks_of("train", paper(shards, *words)))
    (told,) = advice("train", paper(shards, *words), 64)
    assert told.startswith("ridge regression: 8100 images, 15724 voxels")
    (told,) = advice("train", paper(shards, *words, "training.sessions=[1]"), 1)
    assert told.startswith("ridge regression: 202 images")  # one of 40 sessions
    told = nd("train", "paper", f"shards_dir={shards}", "run_dir=runs/a", *words, "--dry-run").stdout
    assert re.search(r"# note: ridge regression: .* on disk\n# would start", told)


def test_a_ridge_regression_that_no_gpu_holds_is_pointed_at_the_cpu(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.supervise.memory.gpu_bytes", lambda: 24 * 10**9)
    assert advice("train", paper(shards, "decoder.kind=ridge"), 1)
    monkeypatch.setattr("launch.supervise.memory.gpu_bytes", lambda: 2 * 10**9)
    with pytest.raises(ConfigError, match="more memory than a GPU has") as caught:
        advice("train", paper(shards, "decoder.kind=ridge"), 1)
    assert "CUDA_VISIBLE_DEVICES=" in caught.value.todo


def test_the_last_or_the_best_decoder_is_evaluated_and_a_missing_one_is_named(tmp_path: Path, shards: Path) -> None:
    last = paper(shards, f"run_dir={tmp_path}")
    best = paper(shards, f"run_dir={tmp_path}", "evaluation.checkpoint=best")
    stage = stage_dir(tmp_path, 2)
    with pytest.raises(CheckpointError, match="no best decoder of stage 2"):
        checks_of("evaluate", best)["decoder"]()
    small = last.decoder.model_copy(update={"hidden_size": 8, "prior_depth": 0})
    for name in ("model", "best-0000004"):
        Decoder(small, {1: 5}, [TargetSpec("c", "semantic", (2, 3))]).save(stage / name)
    write_best(stage, "best-0000004", 4, {"loss": 1.0})
    assert decoder_dir(last) == stage / "model"
    assert decoder_dir(best) == stage / "best-0000004"


@pytest.mark.parametrize("place", ["checkpoints", "c/checkpoints"])
def test_a_decoder_of_another_split_is_not_evaluated(place: str, tmp_path: Path, shards: Path) -> None:
    own = paper(shards, f"run_dir={tmp_path}")
    small = own.decoder.model_copy(update={"hidden_size": 8, "prior_depth": 0})
    Decoder(small, {1: 5}, [TargetSpec("c", "semantic", (2, 3))]).save(stage_dir(tmp_path, 2) / "model")
    for trained, other in (("own", "tau"), ("tau", "own")):
        config = paper(shards, f"data.split={trained}")
        write_done(tmp_path / place / "stage2", training_fingerprint(config, {}, 2), 1, 0.0, "")
        check_split(paper(shards, f"run_dir={tmp_path}", f"data.split={trained}"))
        with pytest.raises(CheckpointError, match=f"(?s)expected: data.split={other}.*found: data.split={trained}"):
            check_split(paper(shards, f"run_dir={tmp_path}", f"data.split={other}"))
