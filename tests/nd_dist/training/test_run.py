"""Whole trainings in a world of one, through DeepSpeed, in this process."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError

from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError, DataError, RankFailure, Requeue
from nd_dist.events import events_path, read_events
from nd_dist.models.decoder import Decoder
from nd_dist.training.parameters import deepspeed_config
from nd_dist.training.ranks import NonFiniteError
from nd_dist.training.source import StageRequest
from tests.nd_dist.training.one_rank import Events, losses, names, run
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import SyntheticSource, SyntheticStream


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Events]:
    torch.set_num_threads(1)
    config = small_recipe(tmp_path_factory.mktemp("whole"))
    return config, run(config)


@pytest.fixture
def copied(finished: tuple[Config, Events], tmp_path: Path) -> Config:
    """A copy of the finished run folder."""
    shutil.copytree(finished[0].run_dir, tmp_path / "run")
    return finished[0].model_copy(update={"run_dir": tmp_path / "run"})


def test_both_stages_leave_a_model_a_record_and_a_window_of_checkpoints(finished: tuple[Config, Events]) -> None:
    config, events = finished
    for stage, steps in ((1, 8), (2, 6)):
        folder = config.run_dir / "checkpoints" / f"stage{stage}"
        record = json.loads((folder / "done.json").read_text())
        assert record["step"] == steps
        assert record["loss"] == losses(events)[stage, steps - 1]
        assert len(list(folder.glob("step-*"))) == 2
        assert json.loads((folder / "latest.json").read_text())["name"] == f"step-{steps:07d}"
    assert Decoder.load(config.run_dir / "checkpoints" / "stage1" / "model").num_voxels == {2: 36, 5: 44}
    assert Decoder.load(config.run_dir / "checkpoints" / "stage2" / "model").num_voxels == {1: 40}


def test_events_tell_terms_rates_shapes_parameters_and_progress(finished: tuple[Config, Events]) -> None:
    _, events = finished
    step = next(event for event in events if event["event"] == "train_step")
    assert {"c/prior", "c/contrastive", "z/l1", "g02/top1_image_given_voxels"} <= step["terms"].keys()
    assert step["learning_rate"] > 0
    assert step["grad_norm"] > 0
    assert step["samples_per_s"] > 0
    assert 0 <= step["data_wait_share"] <= 1
    assert step["memory_bytes"] > 0
    model = next(event for event in events if event["event"] == "model")
    assert model["parameters"]["voxels.shared.subjects"] == 32 * (36 + 1) + 32 * (44 + 1)
    first = next(event for event in events if event["event"] == "first_batch")
    assert first["voxels"] == {"2": [4, 36], "5": [4, 44]}
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["task"], last["done"], last["total"]) == ("stage 2", 6, 6)
    off = next(event for event in events if event["event"] == "term_off")
    assert off["term"] == "z/contrastive"


def test_stage_two_starts_from_the_heads_of_stage_one(finished: tuple[Config, Events]) -> None:
    _, events = finished
    start = [event["start"] for event in events if event["event"] == "stage_start"]
    assert start[0] == "scratch"
    assert len(start[1]) == 64


def test_a_finished_run_is_not_trained_again(copied: Config) -> None:
    assert names(run(copied)) == ["stage_skipped", "stage_skipped"]


def test_another_recipe_in_the_same_folder_is_refused_by_key(copied: Config) -> None:
    training = copied.training.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(CheckpointError, match=r"training\.learning_rate=0\.5"):
        run(copied.model_copy(update={"training": training}))
    with pytest.raises(CheckpointError, match=r"data\.content=other"):
        run(copied, SyntheticSource(content="other"))


def test_a_stop_saves_and_the_same_command_continues_bit_for_bit(
    finished: tuple[Config, Events], tmp_path: Path
) -> None:
    config = small_recipe(tmp_path)
    asked = iter(range(100))
    with pytest.raises(Requeue, match="step 4 of 8"):
        run(config, should_stop=lambda: next(asked) == 3)
    events = run(config)
    loaded = next(event for event in events if event["event"] == "checkpoint_loaded")
    assert loaded["step"] == 4
    whole, resumed = losses(finished[1]), losses(events)
    assert {key: whole[key] for key in resumed} == resumed
    assert (1, 4) in resumed
    assert (1, 3) not in resumed


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "no manifest"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    finished: tuple[Config, Events], copied: Config, damage: str
) -> None:
    folder = copied.run_dir / "checkpoints" / "stage2"
    (folder / "done.json").unlink()
    newest = max(folder.glob("step-*"))
    state = next(path for path in newest.rglob("*optim_states.pt"))
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        content = state.read_bytes()
        state.write_bytes(content[:-10] if damage == "shorter" else content[:-10] + b"0123456789")
    events = run(copied)
    assert next(event for event in events if event["event"] == "checkpoint_invalid")["tag"] == "step-0000006"
    assert next(event for event in events if event["event"] == "checkpoint_loaded")["step"] == 4
    whole = losses(finished[1])
    assert losses(events) == {(2, 4): whole[2, 4], (2, 5): whole[2, 5]}


def test_a_crash_between_the_last_step_and_its_record_is_made_good(
    finished: tuple[Config, Events], copied: Config
) -> None:
    folder = copied.run_dir / "checkpoints" / "stage2"
    before = json.loads((folder / "done.json").read_text())
    (folder / "done.json").unlink()
    (folder / "model" / "model.safetensors").unlink()
    assert losses(run(copied)) == {}
    assert json.loads((folder / "done.json").read_text()) == before
    assert (folder / "model" / "model.safetensors").exists()


def test_a_stage_whose_checkpoints_are_all_damaged_does_not_start_anew_in_silence(copied: Config) -> None:
    folder = copied.run_dir / "checkpoints" / "stage2"
    (folder / "done.json").unlink()
    for path in folder.glob("step-*/manifest.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="No checkpoint of this stage is valid"):
        run(copied)


def test_a_checkpoint_without_the_pointers_word_does_not_count(copied: Config) -> None:
    folder = copied.run_dir / "checkpoints" / "stage2"
    (folder / "done.json").unlink()
    (folder / "latest.json").write_text(json.dumps({"format": 1, "name": "step-0000004"}))
    events = run(copied)
    assert next(event for event in events if event["event"] == "checkpoint_loaded")["step"] == 4


def test_a_checkpoint_of_another_layout_is_refused_with_the_way_out(copied: Config) -> None:
    (copied.run_dir / "checkpoints" / "stage2" / "done.json").unlink()
    changes: list[tuple[dict[str, object], str]]
    changes = [({"zero_stage": 3}, "zero_stage=1"), ({"shard_layers": False}, "shard_layers=True")]
    for change, way_out in changes:
        training = copied.training.model_copy(update=change)
        with pytest.raises(CheckpointError, match=way_out):
            run(copied.model_copy(update={"training": training}))


def test_a_batch_that_is_not_finite_stops_before_the_step_and_names_its_sample(tmp_path: Path) -> None:
    config = small_recipe(tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        run(config, SyntheticSource(bad_step=5))
    assert "step 5" in caught.value.what
    assert "rank 0: subjects [2], images [" in caught.value.where
    assert "their voxels or targets are not finite" in caught.value.where
    steps = losses(list(read_events(events_path(config.run_dir, 0))))
    assert max(steps) == (1, 4)
    pointer = config.run_dir / "checkpoints" / "stage1" / "latest.json"
    assert json.loads(pointer.read_text())["name"] == "step-0000004"


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_gradient_that_is_not_finite_stops_before_the_step_though_the_loss_is(
    zero_stage: int, tmp_path: Path
) -> None:
    config = small_recipe(tmp_path, stages=(2,), steps=(1, 3), zero_stage=zero_stage, prior_weight=1e30)
    with pytest.raises(NonFiniteError, match="The gradient is not finite at step 0") as caught:
        run(config)
    assert "rank 0: subjects [1], images [" in caught.value.where
    assert "inputs are finite" in caught.value.where
    assert losses(list(read_events(events_path(config.run_dir, 0)))) == {}


class WithoutTestImages(SyntheticSource):
    def validation_images(self, subject: int) -> tuple[str, list[int]]:
        return "test", []


@pytest.mark.parametrize("source", [WithoutTestImages(), SyntheticSource()])
def test_a_full_disk_leaves_the_checkpoint_before_valid(
    source: SyntheticSource, finished: tuple[Config, Events], copied: Config
) -> None:
    folder = copied.run_dir / "checkpoints" / "stage2"
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "step-0000006")
    (folder / "latest.json").write_text(json.dumps({"format": 1, "name": "step-0000004"}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # no file may grow beyond: writes fail as on a full disk
    try:
        # without test images the checkpoint is what does not fit, with them the best model that is written before it
        with pytest.raises(
            (CheckpointError, DataError), match="one before is still valid|nothing was left half-written"
        ):
            run(copied, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    events = run(copied)
    assert next(event for event in events if event["event"] == "checkpoint_loaded")["step"] == 4
    assert losses(events)[2, 5] == losses(finished[1])[2, 5]


def test_checkpoints_are_due_by_the_clock_too_and_one_that_outlasts_a_stop_is_said(tmp_path: Path) -> None:
    config = small_recipe(tmp_path, stages=(1,), checkpoint_every=1000, checkpoint_every_s=1, keep_checkpoints=99)
    hasty = config.model_copy(update={"launch": config.launch.model_copy(update={"stop_grace_s": 0})})

    def wait() -> bool:
        time.sleep(0.6)
        return False

    events = run(hasty, should_stop=wait)
    saved = [event["step"] for event in events if event["event"] == "checkpoint_saved"]
    assert len(saved) >= 3
    assert saved[-1] == 8
    notices = [event["message"] for event in events if event["event"] == "notice"]
    assert len(notices) == len(saved)
    assert "set launch.stop_grace_s higher" in notices[0]


@pytest.mark.slow
def test_compiled_heads_train_the_same_and_keep_the_names_of_their_weights(
    finished: tuple[Config, Events], tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch compiles with g++ on the CPU")
    config = small_recipe(tmp_path, stages=(1,), compile=True)
    found, expected = losses(run(config)), losses(finished[1])
    assert found == pytest.approx({key: loss for key, loss in expected.items() if key[0] == 1}, rel=1e-4)
    models = [Decoder.load(c.run_dir / "checkpoints" / "stage1" / "model") for c in (config, finished[0])]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_stage_two_alone_trains_from_scratch_but_not_beside_an_unfinished_stage_one(
    copied: Config, tmp_path: Path
) -> None:
    config = small_recipe(tmp_path / "alone", stages=(2,), steps=(8, 2))
    assert next(event for event in run(config) if event["event"] == "stage_start")["start"] == "scratch"
    (copied.run_dir / "checkpoints" / "stage1" / "done.json").unlink()
    second = copied.training.model_copy(update={"stages": (2,)})
    with pytest.raises(CheckpointError, match="stage 1 of this run folder is not finished"):
        run(copied.model_copy(update={"training": second}))


def test_training_learns_the_hidden_factors(tmp_path: Path) -> None:
    config = small_recipe(
        tmp_path, stages=(2,), steps=(1, 60), samples_per_subject=(4, 16), learning_rate=5e-3, checkpoint_every=1000
    )
    plain = {"prior_depth": 0, "backbone_dropout": 0.0, "initial_voxel_dropout": 0.0, "initial_dropout": 0.0}
    config = config.model_copy(update={"decoder": config.decoder.model_copy(update=plain)})
    steps = [event["terms"] for event in run(config) if event["event"] == "train_step"]

    def mean(term: str, part: list[dict[str, float]]) -> float:
        return sum(terms[term] for terms in part) / len(part)

    for term in ("z/l1", "c/prior", "g02/prior"):
        assert mean(term, steps[-5:]) < 0.9 * mean(term, steps[:5])
    assert mean("c/top1_image_given_voxels", steps[-5:]) > 0.5  # chance 1/16


def test_precisions_that_would_train_wrongly_here_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="zero_stage 0 trains in float32 only"):
        small_recipe(tmp_path / "a", dtype="bfloat16", zero_stage=0)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)  # some CPUs can
    with pytest.raises(ConfigError, match="refuses the recipe on this device"):
        run(small_recipe(tmp_path / "b", dtype="float16"))


class FullDevice(SyntheticSource):
    """Its stream meets the error that a full GPU raises."""

    def open_stream(self, request: StageRequest) -> SyntheticStream:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Of the allocated memory ...")


def test_a_full_gpu_ends_training_with_what_would_need_less(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="too little memory for this training") as caught:
        run(small_recipe(tmp_path), FullDevice())
    assert caught.value.found == "CUDA out of memory. Tried to allocate 2 GiB"
    assert "training.zero_stage=2" in caught.value.todo


def test_deepspeeds_configuration_follows_the_recipe_and_takes_further_settings() -> None:
    more = {"zero_optimization": {"overlap_comm": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    recipe = small_recipe(
        Path("x"), dtype="bfloat16", zero_stage=2, gradient_accumulation=3, gradient_clip=0.5, deepspeed=more
    )
    config = deepspeed_config(recipe.training, rows_per_rank=4, world_size=2)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["overlap_comm"]
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["gradient_clipping"] == 0.0, "DeepSpeed's default is 1, and the engine clips by the whole norm"
    assert config["bf16"]["enabled"]
    assert "fp16" not in config


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"train_batch_size": 4}, "follows from training.samples_per_subject"),
        ({"gradient_clipping": 1.0}, "follows from training.gradient_clip"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage follows from training.zero_stage"),
        ({"bf16": {"enabled": True}}, "follows from training.dtype"),
        ({"optimiser": {}}, "optimiser is not passed on"),
    ],
)
def test_settings_of_deepspeed_that_follow_from_the_recipe_are_refused_with_the_one_to_set(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        small_recipe(Path("x"), deepspeed=settings)


def test_a_setting_that_deepspeed_does_not_know_is_said_to_be_deepspeeds_refusal(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overlap_com"):
        run(small_recipe(tmp_path, deepspeed={"zero_optimization": {"overlap_com": True}}))


def lengths(config: Config) -> dict[str, float]:
    """Parameter -> how far one step moved it, a training of one step with plain weights."""
    decoder = Decoder.load(config.run_dir / "checkpoints" / "stage2" / "model")
    return {name: float(value.norm()) for name, value in decoder.state_dict().items()}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_clipping_bounds_the_norm_of_all_gradients_divided_layers_included(zero_stage: int, tmp_path: Path) -> None:
    """AdamW forgets the gradient's length but for eps: at a length of eps the steps show what it was given."""
    recipe: dict[str, Any] = {"stages": (2,), "steps": (1, 1), "zero_stage": zero_stage, "gradient_clip": 1e-8}
    found = {}
    for shard_layers in (True, False):
        config = small_recipe(tmp_path / str(shard_layers), shard_layers=shard_layers, **recipe)
        events = run(config)
        assert next(event for event in events if event["event"] == "train_step")["grad_norm"] > 1
        assert bool(next(event for event in events if event["event"] == "sharded_layers")["layers"]) == shard_layers
        found[shard_layers] = lengths(config)
    free = small_recipe(tmp_path / "free", **{**recipe, "gradient_clip": 0.0})
    run(free)
    assert found[True] == pytest.approx(found[False], rel=1e-6)
    assert max(abs(found[True][name] / length - 1) for name, length in lengths(free).items() if length) > 1e-5
