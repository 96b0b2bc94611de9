"""Architecture and layer taps of the field's judges, with random weights: what feeds each column of the table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nd_dist.errors import CheckpointError
from nd_dist.frozen.field_judges import CLIP_FOLDER, load_field_judges
from nd_dist.frozen.judges import Judge
from nd_dist.frozen.optional_judges import FID_WEIGHTS, absent_metrics, load_distribution_judge, load_pair_judges
from nd_dist.metrics.protocols import JudgeSettings, protocol_named

CPU = torch.device("cpu")
SETTINGS = JudgeSettings(
    alexnet=64, inception=75, efficientnet=64, clip=32, swav=64, backend="tensor", antialias=True,
    efficientnet_weights="V1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of every judge, in the files that users put there."""
    from torchvision import models
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("judges")
    for name, network in (
        ("alexnet", models.alexnet()),
        ("inception_v3", models.inception_v3(init_weights=False)),
        ("efficientnet_b1_v1", models.efficientnet_b1()),
        ("swav_resnet50", models.resnet50()),
    ):
        state = {key: value for key, value in network.state_dict().items() if "swav" not in name or "fc" not in key}
        save_file(state, place / f"{name}.safetensors")
    (place / "efficientnet_b1_v2.safetensors").write_bytes((place / "efficientnet_b1_v1.safetensors").read_bytes())
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=768, **sizes))
    clip.save_pretrained(place / CLIP_FOLDER)
    return place


@pytest.fixture(scope="module")
def judges(folder: Path) -> dict[str, Judge]:
    return {judge.name: judge for judge in load_field_judges(folder, SETTINGS, CPU)}


def picture(seed: int = 0, size: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def test_the_six_judges_feed_the_fields_columns(judges: dict[str, Judge]) -> None:
    scores = {name: judge.score for name, judge in judges.items()}
    assert scores == {
        "alexnet_2": "two_way", "alexnet_5": "two_way", "inception": "two_way", "clip": "two_way",
        "effnet_b": "distance", "swav": "distance",
    }  # fmt: skip
    widths = {name: judge.features(picture()).shape[1] for name, judge in judges.items()}
    assert (widths["inception"], widths["clip"], widths["effnet_b"], widths["swav"]) == (2048, 768, 1280, 2048)


def test_the_alexnet_columns_are_the_outputs_of_features_4_and_11(judges: dict[str, Judge], folder: Path) -> None:
    from torchvision import models

    network = models.alexnet()
    network.load_state_dict(load_file(folder / "alexnet.safetensors"))
    inputs = normalized(picture())
    with torch.no_grad():
        for name, last in (("alexnet_2", 4), ("alexnet_5", 11)):
            layers = network.eval().features[: last + 1]
            assert torch.allclose(judges[name].features(picture()), layers(inputs.clone()).flatten(1), atol=1e-6), name


def test_the_taps_are_those_of_torchvisions_own_feature_extraction(judges: dict[str, Judge], folder: Path) -> None:
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    builders = {
        "inception": (models.inception_v3(init_weights=False, transform_input=True), "inception_v3", 75),
        "effnet_b": (models.efficientnet_b1(), "efficientnet_b1_v1", 64),
        "swav": (models.resnet50(), "swav_resnet50", 64),
    }
    for name, (network, file, size) in builders.items():
        network.load_state_dict(load_file(folder / f"{file}.safetensors"), strict=False)
        extractor = create_feature_extractor(network.eval(), return_nodes={"avgpool": "tap"})
        with torch.no_grad():
            expected = extractor(normalized(picture(size=size)))["tap"].flatten(1)
        rounding = 1e-5 * float(expected.abs().max())  # ours lies channels last: other kernels, other last bits
        assert torch.allclose(judges[name].features(picture(size=size)), expected, atol=rounding), name


def test_both_versions_of_efficientnet_are_separate_files_that_a_protocol_chooses(folder: Path) -> None:
    assert protocol_named("mindeye2").judges.efficientnet_weights == "V2"
    assert protocol_named("brain-diffuser").judges.efficientnet_weights == "V1"
    found = load_field_judges(folder, protocol_named("mindeye2").judges, CPU)
    assert next(judge for judge in found if judge.name == "effnet_b").identity.startswith("efficientnet_b1_v2")


def test_features_do_not_depend_on_what_else_is_in_the_batch(judges: dict[str, Judge]) -> None:
    pixels = picture()
    for name, judge in judges.items():
        alone = torch.cat([judge.features(pixels[:1]), judge.features(pixels[1:])])
        assert torch.allclose(judge.features(pixels), alone, rtol=1e-4, atol=1e-5), name


def test_weights_of_another_network_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "inception_v3.safetensors").unlink()
    save_file({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "inception_v3.safetensors")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_field_judges(tmp_path, SETTINGS, CPU)


def test_lpips_is_torchmetrics_with_our_alexnet(folder: Path) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    (judge,) = load_pair_judges(folder, CPU)
    pixels, other = picture(0), picture(1)
    found = judge.distances(pixels, other)
    assert found.shape == (2,)
    assert judge.distances(pixels, pixels).abs().max() < 1e-6
    assert (found > 0).all()
    network = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    weights = load_file(folder / "alexnet.safetensors")
    for name in network.net.state_dict():
        layer, kind = name.split(".")[1:]
        network.net.state_dict()[name].copy_(weights[f"features.{layer}.{kind}"])
    with torch.no_grad():
        expected = network(pixels, other, normalize=True).flatten().double()
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_the_inception_of_fid_is_torchmetrics_on_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_fidelity.feature_extractor_inceptionv3 as original
    from torchmetrics.image.fid import NoTrainInceptionV3

    assert "its weights are missing" in absent_metrics(folder)["fid"]
    with monkeypatch.context() as patch:  # an untrained network, without asking the internet for the trained one
        patch.setattr(original, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(original.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    save_file(network.state_dict(), tmp_path / FID_WEIGHTS)
    (judge,) = load_distribution_judge(tmp_path, CPU)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 40, 40), dtype=np.uint8))
    assert judge.score == "distribution"
    assert torch.equal(judge.features(pixels.float() / 255), network(pixels))
    assert "fid" not in absent_metrics(tmp_path)
