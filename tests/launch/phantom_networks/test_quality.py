from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.phantom_networks import quality
from launch.phantom_networks.batches import pixels_of
from launch.phantom_networks.cards import Card
from launch.phantom_networks.folders import CPU, Networks, build_networks
from launch.phantom_networks.tokenizer import write_tokenizer
from nd_dist.config import PhantomNetworksConfig
from shards.phantom.captions import vocabulary
from shards.phantom.pictures import training_scene


@pytest.fixture(scope="module")
def networks() -> Networks:
    networks = build_networks(0, 1272)
    for part in (networks.vae, networks.clip, networks.unet, networks.judges):
        part.eval()
    return networks


def pictures(num: int) -> torch.Tensor:
    return pixels_of([training_scene(0, 0, row) for row in range(num)], CPU)


def test_psnr_of_a_known_error_is_the_textbook_value() -> None:
    zeros = torch.zeros(2, 3, 8, 8)
    assert quality.psnr(zeros, zeros + 0.1) == pytest.approx(20.0, abs=1e-4)


def test_pca_with_four_components_is_exact_on_pictures_that_have_four_and_near_on_real_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(4, 3, 4, 4, generator=generator)
    weights = torch.rand(6, 4, 8, 8, generator=generator) * 0.02
    simple = 0.5 + torch.einsum("nkyx,kcij->ncyixj", weights, basis).reshape(6, 3, 32, 32)
    assert quality.psnr(simple, quality.pca_reconstruct(simple, simple)) > 80
    assert 20 < quality.psnr(pictures(16), quality.pca_reconstruct(pictures(16), pictures(16))) < 30


def test_reconstructions_and_drawn_pictures_lie_in_zero_to_one(networks: Networks, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, vocabulary())
    scenes = [training_scene(0, 0, row) for row in range(2)]
    drawn = quality.draw(networks, tokenizer, scenes)
    again = quality.draw(networks, tokenizer, scenes)
    assert torch.equal(drawn, again)
    for pixels in (drawn, quality.reconstruct(networks.vae, pictures(2))):
        assert pixels.shape == (2, 3, 64, 64)
        assert 0 <= pixels.min() <= pixels.max() <= 1
    sheet = quality.contact_sheet(networks, tokenizer, columns=2)
    assert sheet.shape == (6 * 64, 2 * 64, 3)


def test_an_untrained_clip_retrieves_near_chance(networks: Networks, tmp_path: Path) -> None:
    figures = quality.clip_figures(networks.clip, write_tokenizer(tmp_path, vocabulary()), num=30)
    assert len(figures) == 4
    assert all(0 <= rate < 0.3 for rate in figures.values())


def test_a_card_names_recipe_figures_and_whether_training_was_finished() -> None:
    card = Card(
        "judges", "Phantom judges", "judges", PhantomNetworksConfig().judges, 10, {"plain: objects top-1": 0.5}
    )
    text = card.render()
    assert "stopped early" in text
    assert "| plain: objects top-1 | 0.500 |" in text
    assert f"seed {PhantomNetworksConfig().judges.seed}" in text
