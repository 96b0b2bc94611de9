"""The diffusers pipeline: the pictures of an evaluation, from folders of every kind that it opens."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from launch.recipe import config_yaml, load_recipe
from nd_dist import ClipGuidance, Decoder, GuidedSampler, NeuralDiffuserPipeline, SampleOptions, evaluation_card
from nd_dist.comm import Comm
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.errors import CheckpointError, ConfigError, DataError
from nd_dist.evaluation.reconstruction.decode import prediction_seeds
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.metrics.table import metric_of
from tests.nd_dist.evaluation.toy_world import NUM_VOXELS, TEST_IMAGES, ToySource, toy_job, toy_picture, write_models
from tests.support.documents import DOCS, programs
from tests.support.hub import Hub
from tests.support.waiting import HANG_S


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks, and a run of them that is evaluated in ``run``."""
    folder = tmp_path_factory.mktemp("world")
    write_models(folder, prior_depth=1)
    job = toy_job(folder, calibrated=("initial", "guidance"))
    model = job.config.run_dir / "checkpoints" / "stage2" / "model"
    shutil.copytree(folder / "decoder", model)
    evaluate(dataclasses.replace(job, decoder_dir=model), Comm(), EventLog(job.config.run_dir, 0, "evaluate"))
    (job.config.run_dir / "config.yaml").write_text(config_yaml(job.config))
    return folder


@pytest.fixture(scope="module")
def pipe(world: Path) -> NeuralDiffuserPipeline:
    pipe = NeuralDiffuserPipeline.from_pretrained(world / "run")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(num)]


def test_the_pictures_are_those_of_an_evaluation_bit_by_bit(pipe: NeuralDiffuserPipeline, world: Path) -> None:
    ids, images = list(range(TEST_IMAGES)), [0, 1]  # all are decoded together, and two fill a batch of the sampler
    decoded = pipe.decode_voxels(ToySource().voxels(1, ids), 1, prediction_seeds(3, 1, ids))
    rows = [image for image in images for _ in range(2)]
    folder = world / "run" / "reconstructions" / "kappa-10_eta-0.5" / "subj01"
    records = [json.loads((folder / f"image-{image:05d}" / "record.json").read_text()) for image in images]
    noise = [torch.Generator().manual_seed(seed) for record in records for seed in record["noise_seeds"]]
    guidance = {name: values[rows] for name, values in decoded["guidance"].items()}
    made = pipe(c=decoded["c"][rows], z=decoded["z"][rows], guidance=guidance, generator=noise).images
    evaluated = sorted(folder.glob("image-0000[01]/repeat-[01].png"))
    assert len(made) == len(evaluated) == 4
    for path, picture in zip(evaluated, made, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(path)), str(path))


def test_a_saved_pipeline_makes_the_same_pictures_of_voxels(pipe: NeuralDiffuserPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = NeuralDiffuserPipeline.from_pretrained(tmp_path / "saved")
    voxels = ToySource().voxels(2, [0, 1])
    first, second = (
        each(voxels, subject=2, generator=generators(2), output_type="pt").images for each in (pipe, again)
    )
    assert torch.equal(first, second)
    assert again.sampler == pipe.sampler
    alone = again(voxels[1], subject=2, generator=generators(2)[1], output_type="pt").images
    torch.testing.assert_close(alone, second[1:], atol=1e-4, rtol=0)


def test_a_pushed_pipeline_brings_its_decoder_and_statistics(
    pipe: NeuralDiffuserPipeline, hub: type[Hub], tmp_path: Path
) -> None:
    pipe.push_to_hub("lab/pipeline", token="hf_secret")
    assert {"model_index.json", "decoder/model.safetensors", "unet/config.json"} <= hub.files.keys()
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    again, voxels = NeuralDiffuserPipeline.from_pretrained(tmp_path), ToySource().voxels(2, [0])
    first, second = (
        each(voxels, subject=2, generator=generators(1), output_type="pt").images for each in (pipe, again)
    )
    assert torch.equal(first, second)


def test_a_plain_stable_diffusion_folder_reconstructs_own_pictures(world: Path) -> None:
    models = world / "models"
    plain = NeuralDiffuserPipeline.from_pretrained(models / "stable-diffusion", guidance_model=models / "clip-vision")
    plain.sampler = plain.sampler.model_copy(update={"num_steps": 4, "sag_scale": 0.0})
    wide = Image.fromarray(np.concatenate([toy_picture(1)] * 3, axis=1))
    targets = plain.embed([wide, toy_picture(1)], ["a disc"] * 2)
    for values in (targets["c"], targets["z"], targets["guidance"]["g12"]):
        assert torch.equal(values[0], values[1]), "the square in the middle is what is embedded"
    [unguided] = plain(c=targets["c"], z=targets["z"], generator=generators(2), output_type="pt", return_dict=False)
    guided = plain(**targets, generator=generators(2), kappa=50.0, eta=1.0, output_type="pt").images
    sd, clip = stable_diffusion.load(models / "stable-diffusion"), clip_vision.load(models / "clip-vision")
    sampler = GuidedSampler(sd, ClipGuidance(clip, plain.sampler.layer_scale), plain.sampler)
    noise = torch.cat([torch.randn((1, 4, 8, 8), generator=each) for each in generators(2)])
    requests = [NoiseRequest(0, 0, 0)] * 2
    expected = sampler.sample(targets["c"], targets["z"], {}, requests, 0.0, options=SampleOptions(noise))
    assert torch.equal(unguided, expected.images_BCHW)
    assert not torch.equal(unguided, guided)


def test_every_output_type_holds_the_same_pictures(pipe: NeuralDiffuserPipeline) -> None:
    targets = pipe.embed([toy_picture(0)])
    pil, array, tensor = (
        pipe(**targets, generator=generators(1), output_type=kind).images for kind in ("pil", "np", "pt")
    )
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))


def test_what_does_not_fit_is_named(pipe: NeuralDiffuserPipeline, world: Path, tmp_path: Path) -> None:
    targets = pipe.embed([toy_picture(0)])
    with pytest.raises(ConfigError, match="needs voxels, or c and z"):
        pipe(c=targets["c"])
    with pytest.raises(ConfigError, match="knows several subjects"):
        pipe(np.zeros((1, 30), dtype=np.float32))
    with pytest.raises(ConfigError, match=r"expected: \(seeds, voxels\) = \(1, 30\)"):
        pipe(np.zeros(29, dtype=np.float32), subject=1)
    with pytest.raises(ConfigError, match="Generators and rows differ"):
        pipe(**targets, generator=generators(2))
    with pytest.raises(DataError, match="g04"):
        pipe(c=targets["c"], z=targets["z"], guidance={"Linear-2": targets["guidance"]["g02"]})
    models = world / "models"
    plain = NeuralDiffuserPipeline.from_pretrained(models / "stable-diffusion", guidance_model=models / "clip-vision")
    with pytest.raises(ConfigError, match="need a trained decoder"):
        plain(np.zeros((1, 30), dtype=np.float32))
    whole = Decoder.from_pretrained(world / "decoder")
    plain.decoder = Decoder(whole.config, whole.num_voxels, [spec for spec in whole.targets if spec.name != "z"])
    with pytest.raises(ConfigError, match="does not predict z"):
        plain(np.zeros((1, 30), dtype=np.float32), subject=1)
    shutil.copytree(world / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    shutil.copy(world / "run" / "config.yaml", tmp_path / "run")
    with pytest.raises(CheckpointError, match="run `nd evaluate"):
        NeuralDiffuserPipeline.from_pretrained(tmp_path / "run")


def test_names_in_the_hub_cache_are_opened_as_folders_are(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("stable-diffusion", "clip-vision"):
        shutil.copytree(world / "models" / name, tmp_path / f"models--lab--{name}" / "snapshots" / "1a2b")
    with pytest.raises(CheckpointError, match="openai/clip-vit-base-patch32"):  # the guidance CLIP if none is named
        NeuralDiffuserPipeline.from_pretrained("lab/stable-diffusion")
    pipe = NeuralDiffuserPipeline.from_pretrained("lab/stable-diffusion", guidance_model="lab/clip-vision")
    assert pipe.sampler.kappa == 300_000, "the published settings"


def test_the_shipped_phantom_brings_the_settings_of_its_recipe() -> None:
    pipe = NeuralDiffuserPipeline.from_pretrained("phantom/stable-diffusion")
    recipe = load_recipe("demo_full")
    assert (pipe.sampler, pipe.frozen) == (recipe.sampler, recipe.frozen)
    assert pipe.image_encoder.config.num_hidden_layers == len(recipe.sampler.layer_scale)


def test_a_saved_decoder_states_data_protocol_and_metrics_of_its_run(world: Path, tmp_path: Path) -> None:
    decoder = Decoder.from_pretrained(world / "decoder")
    decoder.save_pretrained(tmp_path, evaluation_card(world / "run"))
    again = Decoder.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in decoder.state_dict().items())
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: nd_dist\n")
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        "## Data", "## Protocol", "## Metrics", "## Provenance",
    ]  # fmt: skip
    pixcorr = json.loads((world / "run" / "metrics.json").read_text())["points"][0]["metrics"]["pixcorr"]["value"]
    for stated in (
        "Simulated data",
        "subject 1: 4.",
        f"| 2 | {NUM_VOXELS[2]} |",
        "PixCorr",
        metric_of("pixcorr").text(pixcorr),
    ):
        assert stated in card
    decoder.save_pretrained(tmp_path)
    assert "No evaluation is recorded" in (tmp_path / "README.md").read_text()


@pytest.mark.launch
def test_the_documented_quickstart_reconstructs_the_picture(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "images", tmp_path / "docs" / "images")
    program = programs("../README.md")["quickstart.py"]
    assert program == programs("python.md")["quickstart.py"]
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=HANG_S)
    made = np.asarray(Image.open(tmp_path / "reconstruction.png"))
    seen = np.asarray(Image.open(DOCS / "images" / "strip.png").convert("RGB").crop((0, 84, 64, 148)))
    assert np.corrcoef(made.ravel(), seen.ravel())[0, 1] > 0.8
