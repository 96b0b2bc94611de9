from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nd_dist.config import DecoderConfig
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.models.decoder import Decoder
from nd_dist.models.draws import Draws
from nd_dist.schema import GUIDANCE, TARGETS, TargetSpec, role_of

CONFIG = DecoderConfig(
    hidden_size=16, num_blocks=2, initial_channels=(8, 8, 8), prior_depth=1, prior_dim_head=8, prior_sample_steps=4
)
SHAPES = {"c": (4, 8), "z": (4, 8, 8), **dict.fromkeys(GUIDANCE, (5, 6))}
SPECS = tuple(TargetSpec(name, role_of(name), SHAPES[name]) for name in TARGETS)
VOXELS = {1: 20, 3: 17}


def decoder(specs: tuple[TargetSpec, ...] = SPECS, **changes: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG.model_copy(update=changes), VOXELS, specs)


@pytest.mark.parametrize("heads", ["joint", "single"])
def test_all_eight_targets_are_predicted_in_their_shapes(heads: str) -> None:
    predicted = decoder(heads=heads).predict(torch.randn(3, 17), 3, [1, 2, 3])
    assert {name: tuple(value.shape[1:]) for name, value in predicted.items()} == SHAPES
    assert all(value.dtype == torch.float32 and len(value) == 3 for value in predicted.values())


def test_a_prediction_does_not_depend_on_its_batch() -> None:
    model, voxels = decoder(), torch.randn(4, 20)
    together = model.predict(voxels, 1, [5, 6, 7, 8])
    alone = model.predict(voxels[2:3], 1, [7])
    for name in SHAPES:
        torch.testing.assert_close(together[name][2:3], alone[name], rtol=1e-4, atol=1e-5)


def test_without_a_prior_the_backbone_is_the_prediction() -> None:
    model, voxels = decoder(prior_depth=0), torch.randn(2, 20)
    outputs = model({1: voxels})
    torch.testing.assert_close(model.predict(voxels, 1, [1, 2])["c"], outputs["c"].backbone_BLD)
    assert not [name for name in model.state_dict() if ".prior." in name]


def test_rows_of_several_subjects_come_out_in_the_mappings_order() -> None:
    model, a, b = decoder(), torch.randn(2, 20), torch.randn(3, 17)
    both = model({3: b, 1: a})["z"].latent_BCHW
    torch.testing.assert_close(both[:3], model({3: b})["z"].latent_BCHW, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[3:], model({1: a})["z"].latent_BCHW, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", ["joint", "single"])
def test_the_latent_head_can_be_given_other_voxels_than_the_token_heads(heads: str) -> None:
    model, draws = decoder(heads=heads), Draws(0, 0, torch.arange(2))
    plain, mixed = {1: torch.randn(2, 20)}, {1: torch.randn(2, 20)}
    outputs = model(mixed, draws, latent_voxels=plain)
    torch.testing.assert_close(outputs["z"].latent_BCHW, model(plain, draws)["z"].latent_BCHW)
    torch.testing.assert_close(outputs["c"].backbone_BLD, model(mixed, draws)["c"].backbone_BLD)


def test_joint_heads_share_one_encoder_and_single_heads_have_their_own() -> None:
    assert list(decoder(heads="joint").voxels) == ["shared"]
    assert list(decoder(heads="single").voxels) == list(TARGETS)


def test_a_saved_decoder_predicts_the_same(tmp_path: Path) -> None:
    model, voxels = decoder(), torch.randn(2, 20)
    digest = model.save(tmp_path / "model")
    again = Decoder.load(tmp_path / "model")
    assert len(digest) == 64
    for name, value in model.predict(voxels, 1, [1, 2]).items():
        torch.testing.assert_close(again.predict(voxels, 1, [1, 2])[name], value, rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("heads", ["joint", "single"])
def test_moving_to_another_subject_keeps_the_heads_and_drops_every_voxel_encoder(tmp_path: Path, heads: str) -> None:
    model = decoder(heads=heads)
    model.save(tmp_path)
    moved = Decoder.load_for_subjects(tmp_path, {3: 17})  # subject 3 was there, and still starts afresh
    old, new = model.state_dict(), moved.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in new if name.startswith("heads."))
    encoders = [name for name, value in new.items() if name.startswith("voxels.") and value.ndim == 2]
    assert len(encoders) == (1 if heads == "joint" else 8)
    assert all(not torch.equal(old[name], new[name]) for name in encoders)
    assert moved.num_voxels == {3: 17}


def test_torn_or_foreign_model_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trained model"):
        Decoder.load(tmp_path)
    model = decoder(specs=SPECS[:1])
    model.save(tmp_path)
    first = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(first)
    with pytest.raises(CheckpointError, match="not those that its config"):
        Decoder.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(first[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        Decoder.load(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "decoder": {"surprise": 1}}))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        Decoder.load(tmp_path)


def test_wrong_subjects_voxels_or_an_empty_decoder_are_refused() -> None:
    model = decoder(specs=SPECS[:1])
    with pytest.raises(ConfigError, match="not trained on this subject"):
        model.predict(torch.zeros(1, 20), 2, [0])
    with pytest.raises(ConfigError, match="do not fit"):
        model.predict(torch.zeros(1, 19), 1, [0])
    with pytest.raises(ConfigError, match="do not fit"):
        model.predict(torch.zeros(2, 20), 1, [0])
    with pytest.raises(ConfigError, match="needs a subject and a target"):
        Decoder(CONFIG, {}, SPECS)
