"""A checkpoint holds the state of the data stream, and a training that goes on gives it back to the stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from nd_dist.errors import CheckpointError, Requeue
from nd_dist.training.source import StageRequest
from tests.nd_dist.training.one_rank import losses, run
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import SyntheticSource, SyntheticStream


class ChosenStream(SyntheticStream):
    """A stream whose state says which trials it was asked for, as that of packed shards does."""

    trials = "one choice"

    def state_dict(self) -> dict[str, object]:
        return {"trials": self.trials, "step": self.step}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        if state.get("trials") != self.trials:
            raise CheckpointError("The data of this run is not the data of the checkpoint.")
        super().load_state_dict(state)


class OtherStream(ChosenStream):
    trials = "another choice"


class ChosenSource(SyntheticSource):
    stream: type[SyntheticStream] = ChosenStream

    def open_stream(self, request: StageRequest) -> SyntheticStream:
        return self.stream(self, request)


class OtherSource(ChosenSource):
    stream = OtherStream


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_goes_on_with_the_streams_own_state_and_not_with_another_choice_of_trials(
    tmp_path: Path, accumulation: int
) -> None:
    config = small_recipe(tmp_path)
    training = config.training.model_copy(update={"stages": (1,), "gradient_accumulation": accumulation})
    config = config.model_copy(update={"training": training})
    whole = losses(run(config.model_copy(update={"run_dir": tmp_path / "whole"}), ChosenSource()))
    asked = iter([False] * 3)
    with pytest.raises(Requeue):
        run(config, ChosenSource(), lambda: next(asked, True))
    [newest] = sorted((config.run_dir / "checkpoints/stage1").glob("step-*/manifest.json"))[-1:]
    facts = json.loads(newest.read_text())["facts"]
    step, saved = facts["step"], facts["progress"]["stream"]
    assert 0 < step < training.steps[0]
    assert saved == {"trials": "one choice", "step": step * accumulation}
    with pytest.raises(CheckpointError, match="not the data of the checkpoint"):
        run(config, OtherSource())
    rest = losses(run(config, ChosenSource()))
    assert rest == pytest.approx({key: loss for key, loss in whole.items() if key[1] >= step}, rel=1e-5)
