"""Judges: taps, input settings, weights from local folders, and clear errors where torchvision is missing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.frozen import phantom_judges
from nd_dist.frozen.field_judges import CLIP_FOLDER, _clip_judge, _Inputs, load_field_judges
from nd_dist.frozen.judges import (
    Judge,
    NetworkJudge,
    Preparation,
    has_phantom_judges,
    load_phantom_judges,
    tap_layers,
)
from nd_dist.metrics.protocols import JudgeSettings
from nd_dist.pixels import Resize, pictures_to_pixels, to_uint8

CPU = torch.device("cpu")
SETTINGS = JudgeSettings(
    alexnet=64, inception=75, efficientnet=64, clip=32, swav=64, backend="tensor", antialias=True,
    efficientnet_weights="V1",
)  # fmt: skip
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def test_a_tap_gives_the_layers_output_even_if_the_next_layer_works_in_place() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True))
    pixels = torch.rand(2, 3, 4, 4)
    assert torch.equal(tap_layers(network, ["0"])(pixels)["0"], network[0](pixels))


def test_a_network_judge_resizes_normalises_and_flattens() -> None:
    judge = NetworkJudge("x", "two_way", "", nn.Identity(), Preparation(Resize(4), "imagenet", CPU))
    features = judge.features(torch.full((2, 3, 9, 9), 0.485))
    assert features.shape == (2, 48)
    assert features[:, :16].abs().max() < 1e-6
    assert isinstance(judge, Judge)


def test_the_phantom_judges_load_from_a_folder_with_an_identity_each(tmp_path: Path) -> None:
    assert not has_phantom_judges(tmp_path)
    for kind in phantom_judges.JUDGE_KINDS:
        phantom_judges.JudgeNetwork(kind, 3, 2).save(tmp_path / kind)
    assert has_phantom_judges(tmp_path)
    judges = load_phantom_judges(tmp_path, CPU)
    pixels = torch.rand(2, 3, 32, 32)
    assert [judge.score for judge in judges] == ["two_way"] * 4 + ["distance"]
    assert len({judge.identity for judge in judges}) == len(judges)
    for judge in judges:
        assert judge.features(pixels).shape[0] == 2
        assert torch.isfinite(judge.features(pixels)).all()


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
def test_without_torchvision_the_field_judges_say_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install"):
        load_field_judges(tmp_path, SETTINGS, CPU)


def test_a_missing_clip_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        _clip_judge(tmp_path / CLIP_FOLDER, _Inputs(SETTINGS, CPU))


def test_the_clip_judge_gives_the_projected_image_embedding(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=6, **sizes))
    network.eval().save_pretrained(tmp_path)
    judge = _clip_judge(tmp_path, _Inputs(SETTINGS, CPU))
    pixels = torch.full((1, 3, 32, 32), 0.5)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    inputs = ((0.5 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    with torch.no_grad():
        expected = network(pixel_values=inputs).image_embeds
    assert torch.allclose(judge.features(pixels), expected, atol=1e-6)


@pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not installed (extra judges)")
def test_field_judges_refuse_weights_of_another_network(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "alexnet.safetensors")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_field_judges(tmp_path, SETTINGS, CPU)


@pytest.mark.parametrize("antialias", [True, False])
def test_the_tensor_resize_is_torchs_bilinear(antialias: bool) -> None:
    pixels = torch.rand(2, 3, 20, 20)
    expected = nn.functional.interpolate(pixels, size=(7, 7), mode="bilinear", antialias=antialias)
    assert torch.equal(Resize(7, antialias=antialias)(pixels), expected)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_the_pil_resize_is_pillows_on_bytes(kind: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    resized = Resize(9, "pil", filter=kind)(pictures_to_pixels(picture[None]))  # type: ignore[arg-type]
    expected = np.asarray(Image.fromarray(picture).resize((9, 9), getattr(Image.Resampling, kind.upper())))
    assert (to_uint8(resized)[0] == expected).all()


def test_a_resize_to_the_present_size_or_to_none_changes_nothing() -> None:
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(Resize(8, "pil")(pixels), pixels)
    assert torch.equal(Resize(None)(pixels), pixels)


def test_bytes_survive_the_way_to_pixels_and_back() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (1, 5, 5, 3), dtype=np.uint8)
    assert (to_uint8(pictures_to_pixels(picture)) == picture).all()
    assert to_uint8(torch.full((1, 3, 1, 1), 0.999), "truncate").max() == 254
