from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from nd_dist.config import FrozenConfig
from nd_dist.errors import DataError
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.compatibility import check_compatible
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.frozen.stable_diffusion import StableDiffusion
from nd_dist.schema import GUIDANCE, TARGETS
from tests.nd_dist.frozen.toy_folders import hash_files

CAPTIONS = [["a cat", "a dog"], ["one bird"], ["x y z", "a", "b c"]]
IDS = [10, 3, 77]


@pytest.fixture
def pictures() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), dtype=np.uint8)


def extractor(sd: StableDiffusion, clip: ClipVision, **config: object) -> FrozenExtractor:
    return FrozenExtractor(sd, clip, FrozenConfig(**config), seed=5)


def test_all_targets_come_out_in_the_specified_shapes(
    sd: StableDiffusion, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    made = extractor(sd, clip)
    targets = made.extract(pictures, CAPTIONS, IDS)
    assert tuple(spec.name for spec in made.specs) == TARGETS
    for spec in made.specs:
        assert targets[spec.name].shape == (3, *spec.shape)
        assert targets[spec.name].dtype == np.float32


def test_the_semantic_target_is_the_mean_over_captions(
    sd: StableDiffusion, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    semantic = extractor(sd, clip).extract(pictures, CAPTIONS, IDS)["c"]
    expected = np.stack([sd.encode_text(group).mean(dim=0).numpy() for group in CAPTIONS])
    np.testing.assert_allclose(semantic, expected, rtol=1e-5, atol=1e-6)


def test_the_initial_target_is_the_encoded_lanczos_resized_picture(
    sd: StableDiffusion, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    initial = extractor(sd, clip).extract(pictures, CAPTIONS, IDS)["z"]
    resized = np.asarray(Image.fromarray(pictures[1]).resize((32, 32), Image.Resampling.LANCZOS))
    pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    np.testing.assert_allclose(initial[1], sd.encode_image(pixels)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_the_guidance_targets_are_clip_features_of_the_unresized_picture(
    sd: StableDiffusion, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    targets = extractor(sd, clip, antialias=True, normalize="clip").extract(pictures, CAPTIONS, IDS)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    expected = clip.features(pixels, antialias=True, normalize="clip")
    for name, feature in zip(GUIDANCE, expected, strict=True):
        np.testing.assert_allclose(targets[name], feature.numpy(), rtol=1e-4, atol=1e-5)


def test_targets_do_not_depend_on_the_batch_size(
    sd: StableDiffusion, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    whole = extractor(sd, clip, vae_encode="sample").extract(pictures, CAPTIONS, IDS)
    single = extractor(sd, clip, vae_encode="sample", batch_size=1).extract(pictures, CAPTIONS, IDS)
    for name in TARGETS:
        np.testing.assert_allclose(whole[name], single[name], rtol=1e-4, atol=1e-5)


def test_half_precision_targets_are_close_and_stored_in_float32(
    sd: StableDiffusion, clip: ClipVision, sd_dir: Path, clip_dir: Path, pictures: npt.NDArray[np.uint8]
) -> None:
    half = extractor(
        stable_diffusion.load(sd_dir, dtype=torch.bfloat16), clip_vision.load(clip_dir, dtype=torch.bfloat16)
    )
    made = half.extract(pictures, CAPTIONS, IDS)
    whole = extractor(sd, clip).extract(pictures, CAPTIONS, IDS)
    assert half.fingerprint["dtype"] == "bfloat16"
    for name, values in whole.items():
        assert made[name].dtype == np.float32
        error = np.abs(made[name] - values).max() / np.abs(values).max()
        assert error < 0.05, name
    np.testing.assert_array_equal(made["c"], whole["c"])


def test_a_sampled_latent_depends_on_seed_and_image_id_only(
    sd: StableDiffusion, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    made = extractor(sd, clip, vae_encode="sample")
    first = made.extract(pictures, CAPTIONS, IDS)["z"]
    turned = made.extract(pictures[::-1].copy(), CAPTIONS[::-1], IDS[::-1])["z"]
    np.testing.assert_allclose(first, turned[::-1], rtol=1e-4, atol=1e-5)
    other = FrozenExtractor(sd, clip, FrozenConfig(vae_encode="sample"), seed=6)
    assert not np.allclose(first, other.extract(pictures, CAPTIONS, IDS)["z"], atol=1e-3)


def test_no_pictures_give_empty_targets(sd: StableDiffusion, clip: ClipVision) -> None:
    targets = extractor(sd, clip).extract(np.zeros((0, 8, 8, 3), dtype=np.uint8), [], [])
    assert targets["c"].shape == (0, 12, 24)


def test_wrong_inputs_are_refused_by_name(
    sd: StableDiffusion, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    made = extractor(sd, clip)
    with pytest.raises(DataError, match="image 3"):
        made.extract(pictures, [["a"], [], ["b"]], IDS)
    with pytest.raises(DataError, match="differ in number"):
        made.extract(pictures, CAPTIONS, IDS[:2])
    with pytest.raises(DataError, match="RGB"):
        made.extract(pictures.astype(np.float32), CAPTIONS, IDS)  # type: ignore[arg-type]


def test_a_target_that_is_not_finite_names_its_image(
    sd_dir: Path, clip: ClipVision, pictures: npt.NDArray[np.uint8]
) -> None:
    broken = stable_diffusion.load(sd_dir)
    with torch.no_grad():
        broken.vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="image 10"):
        extractor(broken, clip).extract(pictures, CAPTIONS, IDS)


def test_the_fingerprint_is_json_and_records_everything_that_changes_a_value(
    sd: StableDiffusion, clip: ClipVision
) -> None:
    plain = extractor(sd, clip).fingerprint
    assert json.loads(json.dumps(plain)) == plain
    assert plain["model"] == "sd"
    assert plain["guidance_model"] == "clip"
    assert "/" not in json.dumps(plain)
    for change in ({"antialias": True}, {"normalize": "clip"}, {"vae_encode": "sample"}):
        assert extractor(sd, clip, **change).fingerprint != plain
    assert extractor(sd, clip, batch_size=3).fingerprint == plain


@pytest.mark.parametrize(
    ("change", "target", "texts"),
    [
        ({"antialias": True}, "g04", ("antialias=True", "antialias=False")),
        ({"normalize": "clip"}, "g02", ("normalize='clip'", "normalize='imagenet'")),
        ({"vae_encode": "sample"}, "z", ("vae_encode='sample'", "vae_encode='mode'")),
    ],
)
def test_targets_made_otherwise_are_refused_naming_both_values(
    sd: StableDiffusion, clip: ClipVision, change: dict[str, object], target: str, texts: tuple[str, str]
) -> None:
    stored = {target: extractor(sd, clip).fingerprint}
    with pytest.raises(DataError) as caught:
        check_compatible(stored, extractor(sd, clip, **change).fingerprint)
    assert all(text in str(caught.value) for text in (target, *texts))


def test_only_what_a_target_depends_on_is_compared(sd: StableDiffusion, clip: ClipVision) -> None:
    mine = extractor(sd, clip).fingerprint
    elsewhere = {**mine, "vae_sha256": "other", "vae_encode": "sample", "model": "renamed", "dtype": "bfloat16"}
    check_compatible({"c": elsewhere, "g02": elsewhere, "pictures": {}}, mine)
    with pytest.raises(DataError, match="vae_sha256"):
        check_compatible({"z": elsewhere}, mine)
    with pytest.raises(DataError, match="not recorded"):
        check_compatible({"g02": {}}, mine)


def test_targets_that_record_the_hashes_of_the_files_are_of_the_same_networks(
    sd: StableDiffusion, clip: ClipVision, sd_dir: Path, clip_dir: Path
) -> None:
    now = extractor(sd, clip).fingerprint
    recorded = {f"{part}_sha256": hash_files(sd_dir / part) for part in ("vae", "text_encoder", "tokenizer")}
    recorded["guidance_model_sha256"] = hash_files(clip_dir)
    before = {**now, **recorded}
    assert all(before[key] != now[key] for key in recorded if key != "tokenizer_sha256")
    again = FrozenExtractor(sd, clip, FrozenConfig(), 5, recorded.values())
    assert again.fingerprint == before
    other = FrozenExtractor(sd, clip, FrozenConfig(), 5, ["0" * 64])
    assert other.fingerprint == now
