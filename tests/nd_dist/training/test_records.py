from __future__ import annotations

from pathlib import Path

import pytest

from nd_dist.config import Config, DataConfig
from nd_dist.errors import CheckpointError
from nd_dist.training.records import check_fingerprint, read_done, training_fingerprint, write_done

CONFIG = Config(data=DataConfig(subjects=(1, 2)))
DATA = {"data.content": "i"}


def changed(section: str, **values: object) -> Config:
    return CONFIG.model_copy(update={section: getattr(CONFIG, section).model_copy(update=values)})


@pytest.mark.parametrize(
    "config",
    [
        changed("training", checkpoint_every=7, keep_checkpoints=9, validate_every=3, reader_threads=1, zero_stage=3),
        changed("training", stages=(1,)),
        changed("sampler", kappa=1.0),
        changed("launch", ranks=4),
        changed("training", steps=(107_100, 5)),
        changed("training", sessions=(1,)),
        CONFIG.model_copy(update={"run_dir": Path("elsewhere")}),
    ],
)
def test_what_does_not_change_the_result_of_stage_one_is_not_in_its_fingerprint(config: Config) -> None:
    assert training_fingerprint(config, DATA, 1) == training_fingerprint(CONFIG, DATA, 1)


@pytest.mark.parametrize(
    "config",
    [
        changed("training", learning_rate=1e-3),
        changed("training", steps=(5, 107_100)),
        changed("training", dtype="bfloat16"),
        changed("training", quirks="official"),
        changed("decoder", hidden_size=8),
        changed("data", subjects=(1, 2, 3)),
        CONFIG.model_copy(update={"seed": 1}),
    ],
)
def test_what_changes_the_result_is_in_the_fingerprint(config: Config) -> None:
    assert training_fingerprint(config, DATA, 1) != training_fingerprint(CONFIG, DATA, 1)


def test_the_data_the_stage_and_the_start_model_are_in_the_fingerprint() -> None:
    base = training_fingerprint(CONFIG, DATA, 2)
    assert training_fingerprint(CONFIG, {"data.content": "other"}, 2) != base
    assert training_fingerprint(CONFIG, DATA, 1) != base
    assert training_fingerprint(CONFIG, DATA, 2, start="0" * 64) != base
    assert training_fingerprint(changed("training", sessions=(1,)), DATA, 2) != base


def test_a_record_of_before_contents_were_hashed_counts_while_the_packed_data_are_the_same(tmp_path: Path) -> None:
    former = training_fingerprint(CONFIG, {"data.index": "all"}, 1)
    check_fingerprint(training_fingerprint(CONFIG, {**DATA, "data.index": "all"}, 1), former, tmp_path)
    grown = training_fingerprint(CONFIG, {**DATA, "data.index": "more"}, 1)
    with pytest.raises(CheckpointError, match="data.index=more"):
        check_fingerprint(grown, former, tmp_path)
    check_fingerprint(grown, training_fingerprint(CONFIG, {**DATA, "data.index": "all"}, 1), tmp_path)


def test_a_difference_is_refused_and_named(tmp_path: Path) -> None:
    wanted = training_fingerprint(changed("training", learning_rate=1e-3, weight_decay=0.5), DATA, 1)
    with pytest.raises(CheckpointError) as caught:
        check_fingerprint(wanted, training_fingerprint(CONFIG, DATA, 1), tmp_path)
    assert caught.value.expected == "training.learning_rate=0.001, training.weight_decay=0.5"
    assert caught.value.found == "training.learning_rate=0.0003, training.weight_decay=0.01"


def test_the_completion_record_holds_what_was_trained(tmp_path: Path) -> None:
    assert read_done(tmp_path) == {}
    facts = training_fingerprint(CONFIG, DATA, 1)
    write_done(tmp_path, facts, 10, 1.5, "ab")
    record = read_done(tmp_path)
    assert (record["step"], record["loss"], record["model_sha256"]) == (10, 1.5, "ab")
    check_fingerprint(facts, record["fingerprint"], tmp_path)  # also after JSON
