from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer, CLIPVisionModel

from nd_dist.errors import CheckpointError
from nd_dist.files import sha256_file
from nd_dist.frozen.phantom_judges import JUDGE_KINDS, JudgeNetwork, load_judges
from shards.phantom.captions import vocabulary
from shards.phantom.networks.architectures import MAX_TOKENS, TEXT_WIDTH
from shards.phantom.networks.folders import write_untrained
from shards.phantom.networks.tokenizer import learn_merges, write_tokenizer


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    write_untrained(folder, seed=0)
    return folder


def test_the_pipeline_of_diffusers_loads_the_folder_and_draws_a_picture(untrained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(untrained / "stable-diffusion", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    images = pipeline("a tiger in the snow", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def test_the_vision_tower_loads_with_the_stock_class_and_has_six_taps_of_65_tokens(untrained: Path) -> None:
    tower = CLIPVisionModel.from_pretrained(untrained / "clip-vision").float()
    taps: list[torch.Size] = []
    for name, module in tower.named_modules():
        if name.endswith("mlp.fc2"):
            module.register_forward_hook(lambda _module, _inputs, output: taps.append(output.shape))
    tower(pixel_values=torch.rand(2, 3, 64, 64))
    assert taps == [torch.Size([2, 65, TEXT_WIDTH])] * 6
    assert tower.config.hidden_act == "quick_gelu"


def test_the_unet_has_a_mid_block_self_attention_and_takes_the_text_tokens(untrained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(untrained / "stable-diffusion", dtype=torch.float32)
    unet, vae = pipeline.unet, pipeline.vae
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1 is not None
    assert unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size == TEXT_WIDTH
    text_BLD = torch.rand(2, MAX_TOKENS, TEXT_WIDTH)
    assert unet(torch.rand(2, 4, 16, 16), 10, encoder_hidden_states=text_BLD).sample.shape == (2, 4, 16, 16)
    assert vae.encode(torch.rand(2, 3, 64, 64)).latent_dist.mean.shape == (2, 4, 16, 16)
    assert unet.config.sample_size * 4 == vae.config.sample_size


def test_everything_together_stays_under_twenty_megabytes_and_is_safetensors(untrained: Path) -> None:
    files = [path for path in untrained.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} == {".json", ".txt", ".safetensors"}


def test_the_same_seed_writes_the_same_bytes(untrained: Path, tmp_path: Path) -> None:
    write_untrained(tmp_path, seed=0)
    for path in untrained.rglob("*.safetensors"):
        assert sha256_file(path) == sha256_file(tmp_path / path.relative_to(untrained))


def test_every_word_of_a_caption_is_one_token_and_comes_back(untrained: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(untrained / "stable-diffusion" / "tokenizer")
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3
    caption = "a picture of a hot dog next to an umbrella on a rock"
    ids = tokenizer(caption, padding="max_length", max_length=MAX_TOKENS).input_ids
    assert len(ids) == MAX_TOKENS == tokenizer.model_max_length
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1


def test_an_unknown_word_splits_into_known_pieces(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, ("tiger", "time"))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("tigers").input_ids)[1:-1]
    assert "".join(pieces) == "tigers</w>"
    assert len(pieces) > 1
    assert learn_merges(("tiger", "time"))[0] == ("t", "i")


def test_judges_have_other_architectures_than_clip_and_features_at_two_depths(untrained: Path) -> None:
    judges = load_judges(untrained / "judges")
    assert tuple(judges) == JUDGE_KINDS
    pixels_BCHW = torch.rand(3, 3, 64, 64)
    for judge in judges.values():
        features = judge.features(pixels_BCHW)
        assert features.early.shape[0] == 3
        assert features.late.shape == (3, 128)
        objects, places = judge(pixels_BCHW)
        assert objects.shape == (3, judge.config["num_objects"])
        assert places.shape == (3, 16)
        assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert len({sum(p.numel() for p in judge.parameters()) for judge in judges.values()}) == len(JUDGE_KINDS)


def test_a_judge_saved_and_loaded_gives_the_same_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = JudgeNetwork("plain", 5, 3).eval()
    judge.save(tmp_path)
    pixels_BCHW = torch.rand(2, 3, 64, 64)
    assert torch.equal(JudgeNetwork.load(tmp_path).features(pixels_BCHW).late, judge.features(pixels_BCHW).late)


def test_a_missing_or_foreign_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        load_judges(tmp_path)
    JudgeNetwork("plain", 5, 3).save(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "mixer", "num_objects": 5, "num_places": 3}')
    with pytest.raises(CheckpointError, match="do not fit"):
        JudgeNetwork.load(tmp_path)
