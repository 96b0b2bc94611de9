"""Other vision towers as guidance networks: taps by name, targets, guidance that pulls towards them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model

from nd_dist.config import FrozenConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.guidance import ImageEstimate
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.frozen import clip_vision
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.frozen.stable_diffusion import StableDiffusion
from nd_dist.frozen.vision_tower import VisionTower, load_tower

LAYERS = {
    "dinov2": ("encoder.layer.0.mlp.fc2", "encoder.layer.1"),
    "convnext": ("encoder.stages.0", "encoder.stages.1.layers.0"),
}
SHAPES = {"dinov2": {"g02": (17, 16), "g04": (17, 16)}, "convnext": {"g02": (64, 8), "g04": (16, 12)}}


@pytest.fixture(scope="module", params=["dinov2", "convnext"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    stages = {"num_stages": 3, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "image_size": 32}
    tower = (
        Dinov2Model(Dinov2Config(**sizes)) if request.param == "dinov2" else ConvNextModel(ConvNextConfig(**stages))
    )
    place = tmp_path_factory.mktemp("towers") / str(request.param)
    tower.save_pretrained(place)
    return place


@pytest.fixture
def tower(folder: Path) -> VisionTower:
    return load_tower(folder, LAYERS[folder.name], torch.float32)


def test_named_modules_give_targets_as_tokens(folder: Path, tower: VisionTower, sd: StableDiffusion) -> None:
    assert tower.feature_shapes == SHAPES[folder.name]
    config = FrozenConfig(guidance_layers=LAYERS[folder.name])
    extractor = FrozenExtractor(sd, tower, config, seed=0)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    made = extractor.extract(pictures, [[], []], [0, 1], wanted=("g02", "g04"))
    assert {name: values.shape[1:] for name, values in made.items()} == SHAPES[folder.name]
    assert extractor.fingerprint["guidance_layers"] == list(LAYERS[folder.name])


def test_guidance_pulls_towards_features_of_the_tower(tower: VisionTower) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = dict(zip(tower.layer_names, tower.features(pixels), strict=True))
    guidance = ClipGuidance(tower, (1.0, 1.0))
    prepared = guidance.prepare(targets)
    start = (0.5 * pixels).requires_grad_()
    loss = guidance.loss(ImageEstimate(start, lambda values: 2 * values - 1), prepared)
    assert (loss > 1e-8).all()
    (gradient,) = torch.autograd.grad(loss.sum(), start)
    moved = start.detach() - 0.02 * gradient / gradient.abs().max()
    assert (guidance.loss(ImageEstimate(moved, lambda values: 2 * values - 1), prepared) < loss).all()


def test_a_module_that_is_not_there_is_named_with_those_that_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)encoder.*no such"):
        load_tower(folder, ["no such"], torch.float32)


def test_a_tower_that_is_no_clip_is_refused_with_the_setting_that_takes_it(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)no CLIP.*guidance_layers"):
        clip_vision.load(folder)
