from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nd_dist.errors import CheckpointError
from nd_dist.frozen import stable_diffusion
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.frozen.toy_folders import (
    PICTURE_SIZE,
    TEXT_LENGTH,
    TEXT_WIDTH,
    toy_text_encoder,
    toy_unet,
    toy_vae,
)


@pytest.fixture
def copied(sd_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_dir, tmp_path / "copy"))


def test_shapes_follow_from_the_folder_s_own_configuration(sd: StableDiffusion) -> None:
    assert sd.upscale == 4
    assert sd.latent_shape == (4, 8, 8)
    assert sd.picture_size == PICTURE_SIZE
    assert sd.text_shape == (TEXT_LENGTH, TEXT_WIDTH)


def test_loaded_weights_are_those_of_the_files_and_frozen(sd: StableDiffusion, sd_dir: Path) -> None:
    for network, part in ((sd.unet, "unet"), (sd.vae, "vae")):
        stored = load_file(sd_dir / part / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in stored.items())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not network.training


def test_captions_become_padded_tokens_that_do_not_depend_on_their_batch(sd: StableDiffusion) -> None:
    together = sd.encode_text(["a dog", "a cat on a very very very long table", ""])
    assert together.shape == (3, TEXT_LENGTH, TEXT_WIDTH)
    assert together.dtype == torch.float32
    torch.testing.assert_close(sd.encode_text(["a dog"])[0], together[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(together[0], together[1])


def test_a_caption_is_cut_at_the_encoder_s_length_but_keeps_its_end_token(sd: StableDiffusion) -> None:
    long, longer = ("a b c d e f g h i j" + suffix for suffix in ("", " k l m n"))
    torch.testing.assert_close(sd.encode_text([long]), sd.encode_text([longer]))


def test_mode_is_deterministic_and_a_sample_depends_on_its_own_seed_only(sd: StableDiffusion) -> None:
    pixels = torch.rand(2, 3, PICTURE_SIZE, PICTURE_SIZE) * 2 - 1
    mode = sd.encode_image(pixels)
    assert mode.shape == (2, 4, 8, 8)
    posterior = sd.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mode, posterior.mode() * 0.18215)
    both = sd.encode_image(pixels, seeds=[7, 8])
    torch.testing.assert_close(sd.encode_image(pixels[1:], seeds=[8])[0], both[1], rtol=1e-5, atol=1e-6)
    expected = posterior.mean + posterior.std * torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)]
    )
    torch.testing.assert_close(both, expected * 0.18215)


def test_decode_undoes_the_scaling_and_is_differentiable(sd: StableDiffusion) -> None:
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    pixels = sd.decode(latents)
    assert pixels.shape == (1, 3, PICTURE_SIZE, PICTURE_SIZE)
    torch.testing.assert_close(pixels, sd.vae.decode(latents / 0.18215).sample)
    pixels.sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_bfloat16_touches_unet_and_vae_but_not_the_text_encoder(sd_dir: Path) -> None:
    half = stable_diffusion.load(sd_dir, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.encode_text(["a"]).dtype == torch.float32
    assert next(half.text_encoder.parameters()).dtype == torch.float32
    assert half.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.bfloat16


def test_hashes_name_every_part_that_defines_targets_and_change_with_its_weights(
    sd: StableDiffusion, copied: Path
) -> None:
    before = sd.hashes()
    assert set(before) == {"vae", "text_encoder", "tokenizer"}
    assert stable_diffusion.load(copied).hashes() == before
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.bias"] += 1.0
    save_file(weights, path)
    after = stable_diffusion.load(copied).hashes()
    assert after["vae"] != before["vae"]
    assert after["text_encoder"] == before["text_encoder"]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_refused_by_name(copied: Path, part: str) -> None:
    shutil.rmtree(copied / part)
    with pytest.raises(CheckpointError, match=part):
        stable_diffusion.load(copied)


def test_torn_weights_are_refused(copied: Path) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="vae"):
        stable_diffusion.load(copied)


def test_a_missing_weight_is_refused_and_named(copied: Path) -> None:
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight"):
        stable_diffusion.load(copied)


def test_a_configuration_of_another_width_is_refused(copied: Path) -> None:
    path = copied / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 32}))
    with pytest.raises(CheckpointError, match="unet"):
        stable_diffusion.load(copied)


def test_a_text_encoder_of_another_width_is_refused_with_both_widths(copied: Path) -> None:
    shutil.rmtree(copied / "text_encoder")
    toy_text_encoder(width=32).save_pretrained(copied / "text_encoder")
    with pytest.raises(CheckpointError, match="text width") as caught:
        stable_diffusion.load(copied)
    assert "24" in caught.value.expected
    assert "32" in caught.value.found


def test_a_name_that_is_not_in_the_local_cache_is_refused_without_a_download() -> None:
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        stable_diffusion.load("nobody/has-this-model")


def test_networks_without_text_encoder_say_so_when_a_text_comes() -> None:
    bare = StableDiffusion(toy_unet(), toy_vae(), {})
    with pytest.raises(CheckpointError, match="text encoder"):
        bare.encode_text(["a"])
    with pytest.raises(CheckpointError, match="in memory"):
        bare.hashes()
