from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from nd_dist.errors import CheckpointError, Requeue
from nd_dist.events import events_path, read_events
from shards.phantom.captions import vocabulary
from shards.phantom.networks.batches import Rows, labels_of, pixels_of
from shards.phantom.networks.export import write_remark
from shards.phantom.networks.folders import build_networks, text_encoder_of, write_folders
from shards.phantom.networks.objectives import UNetObjective, alphas_cumprod, vae_loss
from shards.phantom.networks.settings import NetworksRecipe
from shards.phantom.networks.stages import STAGES, run_stages, trained_networks
from shards.phantom.networks.tokenizer import write_tokenizer
from shards.phantom.networks.trainer import WarmUpAndCoolDown, average_path
from tests.ranks.launching import ROOT, environment, free_port
from tests.shards.phantom.networks.tiny import STEPS, losses_of, place_of, tiny_settings
from tests.support.waiting import HANG_S

CPU = torch.device("cpu")
RANKS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four networks after a few steps on one rank."""
    out_dir = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    run_stages(place_of(out_dir, tiny_settings()))
    return out_dir


@pytest.mark.launch
def test_two_ranks_of_which_one_is_killed_and_then_one_rank_make_the_losses_of_one_rank(
    trained: Path, tmp_path: Path
) -> None:
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.shards.phantom.networks.tiny", str(tmp_path), str(4 * STEPS - 1)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(RANKS)
    ]
    assert ranks[-1].wait(HANG_S) == -9
    ranks[0].kill()
    ranks[0].wait()
    assert list(losses_of(tmp_path))[-1] == ("unet", STEPS - 2)
    run_stages(place_of(tmp_path, tiny_settings()))
    expected, found = losses_of(trained), losses_of(tmp_path)
    assert found.keys() == expected.keys() == {(name, step) for name in STAGES for step in range(STEPS)}
    assert found == pytest.approx(expected, rel=1e-5)
    skipped = [event["stage"] for event in read_events(events_path(tmp_path, 0)) if event["event"] == "stage_skipped"]
    assert skipped == ["vae", "clip", "judges"]


@pytest.mark.launch
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    settings = tiny_settings(stages=("judges",))
    asked = iter([False, True])
    with pytest.raises(Requeue, match=f"judges, step 2 of {STEPS}"):
        run_stages(place_of(tmp_path, settings, should_stop=lambda: next(asked)))
    run_stages(place_of(tmp_path, settings))
    expected, found = (load_file(average_path(folder, "judges")) for folder in (trained, tmp_path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_steps_are_those_of_plain_adamw_on_clipped_gradients_and_the_average_follows(trained: Path) -> None:
    settings = tiny_settings()
    recipe, vae = settings.vae, build_networks(settings.vae.seed, 100).vae.train()
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    schedule = WarmUpAndCoolDown(settings, recipe.steps, recipe.learning_rate)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, settings.beta2), weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(step)
        loss = vae_loss(vae, Rows(recipe.seed, step, range(recipe.batch_size), CPU))["loss"]
        assert losses_of(trained)["vae", step] == pytest.approx(float(loss.detach()), rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), settings.gradient_clip)
        optimizer.step()
        for name, value in vae.state_dict().items():
            average[name].lerp_(value, 1 - (1 + step) / (10 + step))
    found = load_file(average_path(trained, "vae"))
    for name, value in average.items():
        torch.testing.assert_close(found[f"average.{name}"], value, rtol=1e-4, atol=2e-5)


def test_the_folders_hold_the_averaged_weights(trained: Path, tmp_path: Path) -> None:
    networks, steps = trained_networks(place_of(trained, tiny_settings()))
    assert steps == dict.fromkeys(STAGES, STEPS)
    average = load_file(average_path(trained, "unet"))["average.conv_in.weight"]
    assert torch.equal(networks.unet.conv_in.weight, average)
    write_folders(tmp_path, networks)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "stable-diffusion" / "unet")
    assert torch.equal(unet.conv_in.weight.half(), average.half())


def test_a_folder_of_another_recipe_is_refused(trained: Path) -> None:
    other = tiny_settings().model_copy(update={"beta2": 0.9})
    with pytest.raises(CheckpointError, match=r"beta2=0\.9"):
        run_stages(place_of(trained, other))


def test_reports_are_told_what_is_not_fully_trained_until_everything_is(tmp_path: Path) -> None:
    settings, path = NetworksRecipe(), tmp_path / "remark.txt"
    finished: dict[str, int] = {name: settings.recipe(name).steps for name in STAGES}
    write_remark(path, {**finished, "unet": 7}, settings)
    assert path.read_text() == "The phantom networks are not fully trained (unet: 7 of 12000 steps).\n"
    write_remark(path, finished, settings)
    assert not path.exists()


def test_the_unet_refuses_to_train_on_an_unfinished_vae(tmp_path: Path) -> None:
    run_stages(place_of(tmp_path, tiny_settings(1, ("vae",))))
    with pytest.raises(CheckpointError, match="'vae' is not finished"):
        run_stages(place_of(tmp_path, tiny_settings(2, ("unet",))))


def test_rows_do_not_depend_on_how_a_step_is_divided() -> None:
    whole = Rows(3, 5, range(6), CPU)
    parts = [Rows(3, 5, range(start, start + 2), CPU) for start in (0, 2, 4)]
    assert torch.equal(whole.normal("noise", 4), torch.cat([part.normal("noise", 4) for part in parts]))
    assert torch.equal(whole.integers("time", 1000), torch.cat([part.integers("time", 1000) for part in parts]))
    assert whole.scenes() == [scene for part in parts for scene in part.scenes()]
    assert not torch.equal(whole.normal("noise", 4), Rows(3, 6, range(6), CPU).normal("noise", 4))


def test_the_unet_loss_of_a_step_is_the_mean_over_its_parts(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, vocabulary())
    networks = build_networks(0, len(tokenizer))
    objective = UNetObjective(networks.vae, text_encoder_of(networks.clip), tokenizer)
    whole = objective(networks.unet, Rows(3, 5, range(6), CPU))["loss"]
    parts = [objective(networks.unet, Rows(3, 5, rows, CPU))["loss"] for rows in (range(3), range(3, 6))]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_pixels_lie_in_zero_to_one_and_labels_sum_to_one() -> None:
    scenes = Rows(0, 0, range(20), CPU).scenes()
    pixels_BCHW = pixels_of(scenes, CPU)
    assert pixels_BCHW.shape == (20, 3, 64, 64)
    assert 0 <= pixels_BCHW.min() < pixels_BCHW.max() <= 1
    objects_BO, places_B = labels_of(scenes, CPU)
    assert torch.allclose(objects_BO.sum(1), torch.ones(20))
    assert (objects_BO > 0).sum(1).tolist() == [len(scene.things) for scene in scenes]
    assert places_B.shape == (20,)


def test_the_noise_schedule_is_that_of_stable_diffusion() -> None:
    from diffusers import DDIMScheduler

    from shards.phantom.networks.architectures import SCHEDULER_CONFIG

    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    torch.testing.assert_close(alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    schedule = WarmUpAndCoolDown(NetworksRecipe(), steps=1000, peak=2.0)
    assert schedule.learning_rate(0) == pytest.approx(0.02)
    assert schedule.learning_rate(500) == 2.0
    assert schedule.learning_rate(850) == pytest.approx(1.0)
    assert schedule.learning_rate(999) < 0.01
    assert schedule(3)[1] == (0.9, 0.99)
