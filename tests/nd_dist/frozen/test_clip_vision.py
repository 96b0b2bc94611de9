from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.frozen import clip_vision
from nd_dist.frozen.clip_vision import ClipVision, layer_name
from nd_dist.pixels import normalize_pixels, resize_bilinear
from tests.nd_dist.frozen.toy_folders import CLIP_SIZE, CLIP_WIDTH, toy_clip_tower, write_clip


def test_only_the_tapped_blocks_are_built(clip: ClipVision) -> None:
    assert clip.num_layers == 6
    assert clip.layer_names == ("g02", "g04", "g06", "g08", "g10", "g12")
    assert clip.feature_shape == (1 + (CLIP_SIZE // 8) ** 2, CLIP_WIDTH)


def test_taps_are_the_mlp_outputs_before_the_residual_of_the_full_tower(clip: ClipVision) -> None:
    full = toy_clip_tower().eval()
    encoder = getattr(full, "vision_model", full).encoder
    expected: list[torch.Tensor] = []
    for layer in encoder.layers:
        layer.mlp.register_forward_hook(lambda _module, _inputs, output: expected.append(output))
    pixels = torch.rand(2, 3, CLIP_SIZE, CLIP_SIZE)
    with torch.no_grad():
        full(pixel_values=normalize_pixels(pixels, "imagenet"))
        features = clip.features(pixels)
    assert len(features) == 6
    for ours, theirs in zip(features, expected, strict=False):
        assert ours.shape == (2, *clip.feature_shape)
        torch.testing.assert_close(ours, theirs)


def test_an_independent_float64_transformer_gives_the_same_features(clip_dir: Path) -> None:
    """Recomputed from the stored weights alone: pre-norm blocks, quick GELU, class token first."""
    clip = clip_vision.load(clip_dir, dtype=torch.float64)
    stored = {
        name.removeprefix("vision_model."): w.double()
        for name, w in load_file(next(clip_dir.glob("*.safetensors"))).items()
    }

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ stored[f"{name}.weight"].T + stored[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * stored[f"{name}.weight"] + stored[f"{name}.bias"]

    pixels = torch.rand(1, 3, CLIP_SIZE, CLIP_SIZE, dtype=torch.float64)
    inputs = normalize_pixels(pixels, "imagenet")
    patches = inputs.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(1, 9, -1)
    embedded = patches @ stored["embeddings.patch_embedding.weight"].flatten(1).T
    x = torch.cat([stored["embeddings.class_embedding"].expand(1, 1, -1), embedded], dim=1)
    x = norm(x + stored["embeddings.position_embedding.weight"], "pre_layrnorm")
    features = clip.features(pixels)
    for block in range(6):
        prefix = f"encoder.layers.{block}"
        y = norm(x, f"{prefix}.layer_norm1")
        q, k, v = (linear(y, f"{prefix}.self_attn.{part}_proj").reshape(1, 10, 2, 8).transpose(1, 2) for part in "qkv")
        mixed = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).reshape(1, 10, 16), f"{prefix}.self_attn.out_proj")
        hidden = linear(norm(x, f"{prefix}.layer_norm2"), f"{prefix}.mlp.fc1")
        output = linear(hidden * torch.sigmoid(1.702 * hidden), f"{prefix}.mlp.fc2")
        torch.testing.assert_close(features[block], output, rtol=1e-9, atol=1e-10)
        x = x + output


@pytest.mark.parametrize("prefix", ["", "vision_model.", "clip.vision_model."])
def test_weights_load_under_the_names_of_every_transformers_version(
    clip: ClipVision, clip_dir: Path, tmp_path: Path, prefix: str
) -> None:
    stored = load_file(next(clip_dir.glob("*.safetensors")))
    plain = {name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
    renamed = {prefix + name: tensor for name, tensor in plain.items()}
    renamed[f"{prefix}embeddings.position_ids"] = torch.arange(10)[None]
    save_file(renamed, tmp_path / "model.safetensors")
    shutil.copy(clip_dir / "config.json", tmp_path)
    pixels = torch.rand(1, 3, 30, 40)
    for ours, theirs in zip(clip_vision.load(tmp_path).features(pixels), clip.features(pixels), strict=True):
        assert torch.equal(ours, theirs)


def test_a_whole_clip_model_loads_its_vision_tower_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = toy_clip_tower().config.to_dict()
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 7,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).eval()
    whole.save_pretrained(tmp_path)
    taps: list[torch.Tensor] = []
    encoder = whole.vision_model.encoder
    encoder.layers[5].mlp.register_forward_hook(lambda _module, _inputs, output: taps.append(output))
    pixels = torch.rand(1, 3, CLIP_SIZE, CLIP_SIZE)
    with torch.no_grad():
        whole.vision_model(pixel_values=normalize_pixels(pixels, "clip"))
        ours = clip_vision.load(tmp_path).features(pixels, normalize="clip")[5]
    torch.testing.assert_close(ours, taps[0])


def test_pixel_statistics_and_antialias_are_switches_that_matter(clip: ClipVision) -> None:
    pixels = torch.rand(1, 3, 96, 96)
    plain = clip.features(pixels)[0]
    assert not torch.allclose(plain, clip.features(pixels, normalize="clip")[0], atol=1e-4)
    assert not torch.allclose(plain, clip.features(pixels, antialias=True)[0], atol=1e-4)


def test_features_are_differentiable_and_leave_no_hooks_behind(clip: ClipVision) -> None:
    pixels = torch.rand(1, 3, 48, 48, requires_grad=True)
    clip.features(pixels)[5].square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    layers = getattr(clip.tower, "vision_model", clip.tower).encoder.layers
    assert all(not layer.mlp.fc2._forward_hooks for layer in layers)


def test_the_paper_s_layer_names_are_aliases() -> None:
    assert layer_name("Linear-2") == "g02"
    assert layer_name("Linear-12") == "g12"
    assert layer_name("g06") == "g06"
    for wrong in ("Linear-3", "g14", "mlp"):
        with pytest.raises(ConfigError, match="guidance layer"):
            layer_name(wrong)


def test_a_tower_with_too_few_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="too few blocks") as caught:
        clip_vision.load(write_clip(tmp_path / "short", num_layers=4))
    assert caught.value.found == "4"


def test_weights_of_another_width_are_refused_with_both_shapes(clip_dir: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(clip_dir, tmp_path / "copy"))
    text = (copied / "config.json").read_text().replace('"hidden_size": 16', '"hidden_size": 32')
    (copied / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="do not belong") as caught:
        clip_vision.load(copied)
    assert "32" in caught.value.expected
    assert "16" in caught.value.found


def test_a_missing_block_and_torn_files_are_refused(clip_dir: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(clip_dir, tmp_path / "copy"))
    path = next(copied.glob("*.safetensors"))
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "layers.3.mlp.fc2.weight" not in name}, path)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.fc2\.weight"):
        clip_vision.load(copied)
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="could not be read"):
        clip_vision.load(copied)
    path.rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        clip_vision.load(copied)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        clip_vision.load(tmp_path)


def test_resize_is_done_in_float32_for_half_precision() -> None:
    pixels = torch.rand(1, 3, 50, 50)
    half = resize_bilinear(pixels.bfloat16(), 24, antialias=True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), resize_bilinear(pixels, 24, antialias=True), atol=2e-2, rtol=0)
    assert resize_bilinear(pixels, 50, antialias=False) is pixels
