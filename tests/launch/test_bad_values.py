"""Values that ranks would stumble over are refused before any is started, by launch, dry run and submission alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from launch.ranks.networks import load_extractor
from launch.recipe import load_recipe
from launch.supervise.images import check_trained_images
from nd_dist.comm import Comm
from nd_dist.compute.device import rank_device
from nd_dist.config import Config, PhantomConfig
from nd_dist.errors import DataError
from nd_dist.events import EventLog
from nd_dist.models.decoder import Decoder
from nd_dist.schema import INITIAL
from nd_dist.training.records import SCRATCH, stage_dir, training_fingerprint, write_done
from nd_dist.training.source import stage_request
from nd_dist.world import World
from shards.format.index import Index
from shards.packing.pack import pack
from shards.phantom.write import write_phantom
from tests.nd_dist.frozen.toy_folders import write_clip, write_stable_diffusion
from tests.support.command_line import nd

PHANTOM = PhantomConfig(num_subjects=3, num_sessions=2, trials_per_session=24, num_shared=6, num_voxels=60)
PACKED = "data.targets=[c,z,g02,g04,g06,g08,g10]"  # g12 is missing
TRAINED = "training.targets=[c,z,g02,g04,g06,g08,g10]"


def words_of(folder: Path) -> list[str]:
    sections = {"nsd_root": "nsd", "shards_dir": "shards", "run_dir": "run", "model": "sd", "guidance_model": "clip"}
    places = [f"{key}={folder / name}" for key, name in sections.items()]
    return [
        *places,
        "data.subjects=[1,2,3]",
        PACKED,
        TRAINED,
        "decoder.kind=neuraldiffuser",
        "decoder.hidden_size=8",
        "decoder.prior_depth=0",
    ]


def recipe(folder: Path, *words: str) -> Config:
    return load_recipe("demo", [*words_of(folder), *words])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom, networks, shards, a trained decoder, and what is wrong with each of them beside it."""
    folder = tmp_path_factory.mktemp("world")
    write_phantom(folder / "nsd", PHANTOM, 11)
    write_stable_diffusion(folder / "sd")
    write_clip(folder / "clip")
    config = recipe(folder)
    extractor = load_extractor(config, rank_device(World()))
    index = pack(config, Comm(), EventLog(config.run_dir, 0, "pack"), extractor)
    decoder = Decoder(config.decoder, {1: index.num_voxels[1]}, index.target_specs)
    decoder.save(stage_dir(config.run_dir, 2) / "model")
    _write_wrong(folder, config, index)
    return folder


def _write_wrong(folder: Path, config: Config, index: Index) -> None:
    (folder / "empty").mkdir()
    shutil.copytree(folder / "clip", folder / "other-clip")
    weights = folder / "other-clip" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    shutil.copytree(folder / "sd", folder / "torn-sd")
    (folder / "torn-sd" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(folder / "nsd", folder / "torn-nsd")
    for path in (folder / "torn-nsd").rglob("betas_session01.*"):
        path.unlink()
    few = recipe(folder, f"shards_dir={folder / 'test-pictures'}", "data.pictures=test", "data.targets=[z]")
    pack(few, Comm(), EventLog(folder / "log", 0, "pack"), load_extractor(few, rank_device(World())))
    data = index.identity(stage_request(config, 1, 1).subjects, config.training.targets, None)
    facts = training_fingerprint(config.model_copy(update={"seed": 1}), data, 1, SCRATCH)
    write_done(stage_dir(folder / "other-run", 1), facts, 1, 0.0, "0" * 64)
    without_z = [spec for spec in index.target_specs if spec.name != INITIAL]
    Decoder(config.decoder, {1: index.num_voxels[1]}, without_z).save(stage_dir(folder / "few-run", 2) / "model")
    Decoder(config.decoder, {1: 7}, index.target_specs).save(stage_dir(folder / "small-run", 2) / "model")


BAD = [
    ("pack", "nsd_root={0}/nothing", "nothing"),
    ("pack", "nsd_root={0}/torn-nsd", "betas_session01"),
    ("pack", "data.captions={0}/nothing", "captions"),
    ("pack", "data.roi=nothing", "nothing"),
    ("pack", "data.subjects=[1,8]", "ubject"),
    ("pack", "model={0}/nothing", "neither a folder nor in the local"),
    ("pack", "model={0}/torn-sd", "diffusion_pytorch_model.safetensors"),
    ("pack", "guidance_model={0}/empty", "config.json"),
    ("train", "shards_dir={0}/nothing", "nothing"),
    ("train", "data.subjects=[1,2,4]", "Subjects [4] are not in the shards"),
    ("train", "training.target_subject=4", "data.subjects"),
    ("train", "data.subjects=[1]", "Stage 1 has no subject"),
    ("train", "training.targets=[c,g12]", "Target stores ['g12']"),
    ("train", "training.int8_targets=true", "Target stores"),
    ("train", "training.sessions=[99]", "Sessions [99] of subject 1"),
    ("train", "training.teacher={0}/nothing", "neither a folder nor in the local"),
    ("train", "training.teacher={0}/clip", "not a ConvNeXt"),
    ("train", "training.heldout_fraction=0.999", "no image of subject"),
    ("train", "training.monitors=[wandb]", "wandb"),
    ("train", "run_dir={0}/other-run", "made with another recipe"),
    ("evaluate", "shards_dir={0}/nothing", "nothing"),
    ("evaluate", "model={0}/nothing", "neither a folder nor in the local"),
    ("evaluate", "model={0}/torn-sd", "diffusion_pytorch_model.safetensors"),
    ("evaluate", "guidance_model={0}/other-clip", "made with another guidance_model_sha256"),
    ("evaluate", "frozen.normalize=clip", "made with another normalize"),
    ("evaluate", "evaluation.subjects=[2]", "not trained on what is evaluated"),
    ("evaluate", "evaluation.subjects=[4]", "subjects [4] are not in data.subjects"),
    ("evaluate", "run_dir={0}/nothing", "no last decoder of stage 2"),
    ("evaluate", "run_dir={0}/few-run", "does not predict z"),
    ("evaluate", "run_dir={0}/small-run", "subject 1 with 7 voxels"),
    ("evaluate", "evaluation.checkpoint=best", "no best decoder"),
    ("evaluate", "evaluation.judges_dir={0}/nothing", "nd fetch judges"),
    ("evaluate", "evaluation.judges_dir={0}/empty", "etric network"),
    ("evaluate", "evaluation.protocol=takagy", "takagy"),
    ("evaluate", "evaluation.image_groups={0}/nothing.json", "nothing.json"),
    ("evaluate", "evaluation.image_classes={0}/empty", "instances_train2017.json"),
    ("evaluate", "evaluation.image_ids=[70000]", "no test images of subject 1"),
    ("evaluate", "sampler.guidance={{nothing.there:Term: 1}}", "nothing.there"),
    ("sweep", "shards_dir={0}/test-pictures", "lack pictures of subject 1's training images"),
    ("sweep", "sweep.select=pixcor", "did you mean pixcorr?"),
    ("sweep", "sweep.axes={{decoder.hidden_size: [1, 2]}}", "cannot vary this key"),
]


LAYERS = "sampler.layer_scale=[1,1,1,1,1]"  # g12 is not wanted
STARTS = ("{} demo", "{} demo --dry-run", "submit {} demo --dry-run")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("command", "word", "said"), BAD)
def test_a_value_that_cannot_work_is_refused_before_ranks_start(
    world: Path, start: str, command: str, word: str, said: str
) -> None:
    more = f"shards_dir={world / 'new'}" if command == "pack" else LAYERS
    result = nd(*start.format(command).split(), *words_of(world), more, word.format(world))
    assert result.returncode in (2, 3), result.stdout + result.stderr
    assert said in result.stderr
    assert "Rank 0" not in result.stderr


@pytest.mark.parametrize(("command", "run"), [("pack", "new"), ("train", "new"), ("evaluate", "run")])
@pytest.mark.parametrize("start", STARTS[1:])
def test_values_that_can_work_are_not_refused(world: Path, start: str, command: str, run: str) -> None:
    result = nd(*start.format(command).split(), *words_of(world), LAYERS, f"run_dir={world / run}")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_packing_that_lacks_data_and_networks_is_told_of_both(world: Path) -> None:
    result = nd("pack", "demo", *words_of(world), f"nsd_root={world / 'nothing'}", "model=no/such", "--dry-run")
    assert result.stdout.count("# would be refused: ") == 2
    assert "nd fetch nsd" in result.stderr
    assert "nd fetch models" in result.stderr


def test_everything_that_is_wrong_is_said_at_once(world: Path) -> None:
    words = [f"model={world / 'nothing'}", "evaluation.subjects=[2]", "evaluation.protocol=takagy"]
    result = nd("evaluate", "demo", *words_of(world), LAYERS, *words)
    assert result.returncode in (2, 3)
    for said in ("3 things are wrong", "neither a folder", "not trained on", "takagy"):
        assert said in result.stderr


def test_a_teacher_is_refused_where_training_pictures_were_not_packed(world: Path) -> None:
    index = Index.read(world / "test-pictures")
    check_trained_images(recipe(world), index)
    with pytest.raises(DataError, match="training images; the teacher looks at them"):
        check_trained_images(recipe(world, "training.teacher=anything"), index)
