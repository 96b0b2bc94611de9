"""What is checked and said before ranks are started, on an index of shards with NSD's sizes (and nothing else)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training_memory import SHAPES, VOXELS
from launch.recipe import load_recipe
from launch.supervise.memory import memory_note, needed_bytes
from launch.supervise.preflight import _check_decoder, advice, decoder_dir, preflight
from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from nd_dist.training.records import stage_dir, training_fingerprint, write_best, write_done
from shards.format.index import FORMAT, VERSION, index_id
from tests.support.command_line import nd

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    subject = {"sessions": 40, "trials": 27_000, "test_trials": 3000, "images": 10_000, "test_images": 1000,
               "normalization": "session-train", "normalization_text": "", "source": {}}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {**SHAPES, "img": (425, 425, 3)}
    feature = {"dtype": "<f2", "header": 128, "rows": 73_000, "source": {}}
    content: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "num_images": 73_000, "tables": {}, "shards": [], "source": {},
        "voxels": {"member": "voxels.npy", "dtype": "<f2", "header": 128},
        "subjects": {str(number): {**subject, "voxels": voxels} for number, voxels in VOXELS.items()},
        "features": {name: {**feature, "shape": list(shape)} for name, shape in shapes.items()},
        "accepted": [],
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({**content, "id": index_id(content)}))
    return folder


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
    preflight("train", paper(shards, *own), ranks)


def test_the_published_recipe_starts_on_eight_ranks_and_its_dry_run_says_what_a_gpu_needs(shards: Path) -> None:
    words = [f"shards_dir={shards}", "run_dir=runs/a", "training.targets=[c]"]
    told = nd("train", "paper", *words, "--ranks", "8", "--dry-run").stdout
    assert re.search(
        r"# stage 1 needs \d\.\d GB on each GPU, stage 2 needs \d\.\d GB on each GPU\n# would start", told
    )


def test_ranks_that_share_few_rows_and_networks_that_share_a_gpu_are_pointed_at_the_grid(shards: Path) -> None:
    (told,) = advice("train", paper(shards, "training.targets=[c]"), 16)
    assert told.startswith("16 ranks share the 42 rows of a step")
    assert advice("train", paper(shards, "training.targets=[c]"), 8) == []
    assert advice("train", paper(shards, "training.targets=[c]", "training.rows_per_rank=7"), 64) == []
    (told,) = advice("train", paper(shards), 8)
    assert told == "8 networks are trained as one; --all-targets trains each by itself"


def test_a_training_that_no_gpu_holds_is_refused_with_what_would_help(shards: Path) -> None:
    config = paper(shards, "training.targets=[c]")
    needed = needed_bytes(config, VOXELS, [TargetSpec("c", role_of("c"), SHAPES["c"])], 1)
    assert 9e9 < needed[2] < needed[1] < 20e9
    assert memory_note(needed, 24 * 2**30, config, 1).startswith("stage 1 needs")
    several = paper(shards, "training.targets=[c,z]", "training.dtype=float32")
    with pytest.raises(ConfigError, match="more memory than a GPU has") as caught:
        memory_note(needed, 8 * 2**30, several, 2)
    for way in ("--all-targets", "more ranks than 2", "training.dtype=bfloat16", "training.zero_stage=2"):
        assert way in caught.value.todo


def test_the_last_or_the_best_decoder_is_evaluated_and_a_missing_one_is_named(tmp_path: Path, shards: Path) -> None:
    last = paper(shards, f"run_dir={tmp_path}")
    best = paper(shards, f"run_dir={tmp_path}", "evaluation.checkpoint=best")
    stage = stage_dir(tmp_path, 2)
    with pytest.raises(CheckpointError, match="no best decoder of stage 2"):
        _check_decoder(best)
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
        _check_decoder(paper(shards, f"run_dir={tmp_path}", f"data.split={trained}"))
        with pytest.raises(CheckpointError, match=f"(?s)expected: data.split={other}.*found: data.split={trained}"):
            _check_decoder(paper(shards, f"run_dir={tmp_path}", f"data.split={other}"))
