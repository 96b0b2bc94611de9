from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nd_dist.frozen.folders import resolve_folder
from shards.phantom.captions import vocabulary
from shards.phantom.networks import quality
from shards.phantom.networks.batches import pixels_of
from shards.phantom.networks.cards import Card
from shards.phantom.networks.folders import CPU, Networks, build_networks, read_folders, write_folders
from shards.phantom.networks.history import History, read_history
from shards.phantom.networks.measure import measure
from shards.phantom.networks.settings import NetworksRecipe
from shards.phantom.networks.tokenizer import write_tokenizer
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
    assert not torch.equal(drawn, quality.draw(networks, tokenizer, scenes, cfg=0.0))


def test_an_untrained_clip_retrieves_near_chance(networks: Networks, tmp_path: Path) -> None:
    figures = quality.clip_figures(networks.clip, write_tokenizer(tmp_path, vocabulary()), num=30)
    assert len(figures) == 4
    assert all(0 <= rate < 0.3 for rate in figures.values())


def test_a_card_names_recipe_time_machine_figures_and_whether_training_was_finished() -> None:
    recipe = NetworksRecipe().judges
    history = History(recipe=recipe, steps=10, minutes=3.4, machine="2 rank(s) of 1 thread(s)")
    text = Card("judges", "Phantom judges", "judges", history, {"plain: objects top-1": 0.5}).render()
    for words in (
        "stopped early",
        "| plain: objects top-1 | 0.500 |",
        f"seed {recipe.seed} ",
        "3 minutes",
        "2 rank(s)",
    ):
        assert words in text


def test_every_shipped_network_has_a_card_that_is_of_its_recorded_training() -> None:
    folder = resolve_folder("phantom/")
    cards = {"vae": "stable-diffusion/vae", "clip": "clip-vision", "judges": "judges", "unet": "stable-diffusion/unet"}
    for name, history in read_history(folder).items():
        text = (folder / cards[name] / "README.md").read_text()
        assert (
            f"{history.steps} of {history.recipe.batch_size} pictures (finished); seed {history.recipe.seed}" in text
        )
        assert f"{history.minutes:.0f} minutes" in text
        assert history.recipe == NetworksRecipe().recipe(name)


def figures_on_card(folder: str) -> dict[str, float]:
    rows = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) \|$", (resolve_folder("phantom/") / folder / "README.md").read_text(), re.M
    )
    return {name: float(value) for name, value in rows}


def test_the_cards_show_what_the_phantom_needs() -> None:
    vae, clip, unet = (
        figures_on_card(name) for name in ("stable-diffusion/vae", "clip-vision", "stable-diffusion/unet")
    )
    for kind in ("combinations", "objects"):
        assert (
            vae[f"PSNR, held-out {kind} (dB)"] > vae[f"PSNR of PCA with the same code size, held-out {kind} (dB)"] + 1
        )
    assert clip["top-1 among 300, caption of a picture, held-out combinations"] > 0.5  # chance 0.0033
    recognised = {cfg: unet[f"objects top-1, pictures drawn at cfg {cfg}, mean over judges"] for cfg in (0, 1, 3)}
    assert recognised[0] < 0.05 < recognised[1] < recognised[3]


@pytest.mark.slow
def test_the_figures_on_the_cards_are_those_of_the_shipped_weights() -> None:
    for folder, figures in measure(resolve_folder("phantom/"), write=False).items():
        assert figures == pytest.approx(figures_on_card(folder), abs=0.03), folder


def test_a_folder_set_is_read_back_as_it_was_written(networks: Networks, tmp_path: Path) -> None:
    write_folders(tmp_path, networks)
    again = read_folders(tmp_path)
    for name in ("vae", "clip", "unet", "judges"):
        written, found = getattr(networks, name).state_dict(), getattr(again, name).state_dict()
        assert written.keys() == found.keys()
        assert all(torch.equal(value.half(), found[key].half()) for key, value in written.items())
