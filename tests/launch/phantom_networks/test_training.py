from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from launch.phantom_networks.__main__ import _write_remark, main
from launch.phantom_networks.batches import Rows, labels_of, pixels_of
from launch.phantom_networks.folders import build_networks, text_encoder_of, write_folders
from launch.phantom_networks.objectives import UNetObjective, alphas_cumprod
from launch.phantom_networks.stages import RECIPES, Workplace, run_stage, trained_networks
from launch.phantom_networks.tokenizer import write_tokenizer
from launch.phantom_networks.trainer import Recipe, state_path
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.events import EventLog, events_path, read_events
from shards.phantom.captions import vocabulary

CPU = torch.device("cpu")
PROGRAM = """
import sys; from pathlib import Path; import torch
from tests.launch.phantom_networks.test_training import tiny_workplace
from launch.phantom_networks.stages import run_stage
torch.set_num_threads(1)
run_stage(sys.argv[2], tiny_workplace(Path(sys.argv[1]), int(sys.argv[3])))
"""


def tiny_workplace(out_dir: Path, steps: int) -> Workplace:
    recipes = {
        name: Recipe(name, steps, batch_size=4, learning_rate=1e-3, seed=recipe.seed, checkpoint_every=1)
        for name, recipe in RECIPES.items()
    }
    return Workplace(out_dir, recipes, CPU, EventLog(out_dir, 0, "phantom-networks"), 32)


def newest_step(path: Path) -> int:
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["training"].split('"step": ')[1].split(",")[0])


def test_a_run_that_was_killed_and_started_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    straight, broken, steps = tmp_path / "straight", tmp_path / "broken", 8
    run_stage("vae", tiny_workplace(straight, steps))
    command = [sys.executable, "-c", PROGRAM, str(broken), "vae", str(steps)]
    first = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while newest_step(state_path(broken, "vae")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 3 <= newest_step(state_path(broken, "vae")) < steps
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    expected, found = (load_file(state_path(folder, "vae")) for folder in (straight, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_all_stages_train_in_order_and_the_folders_hold_the_averaged_weights(tmp_path: Path) -> None:
    place = tiny_workplace(tmp_path, steps=2)
    for name in RECIPES:
        run_stage(name, place)
    networks, steps = trained_networks(place)
    assert steps == dict.fromkeys(RECIPES, 2)
    average = load_file(state_path(tmp_path, "unet"))["average.conv_in.weight"]
    assert torch.equal(networks.unet.conv_in.weight, average)
    events = list(read_events(events_path(tmp_path, 0)))
    assert [event["task"] for event in events if event["event"] == "progress"] == list(RECIPES)
    write_folders(tmp_path / "folders", networks)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "folders" / "stable-diffusion" / "unet")
    assert torch.equal(unet.conv_in.weight.half(), average.half())


def test_reports_are_told_what_is_not_fully_trained_until_everything_is(tmp_path: Path) -> None:
    path, finished = tmp_path / "remark.txt", {name: recipe.steps for name, recipe in RECIPES.items()}
    _write_remark(path, {**finished, "unet": 7}, RECIPES)
    assert (
        path.read_text() == f"The phantom networks are not fully trained (unet: 7 of {RECIPES['unet'].steps} steps).\n"
    )
    _write_remark(path, finished, RECIPES)
    assert not path.exists()


def test_the_unet_refuses_to_train_on_an_unfinished_vae(tmp_path: Path) -> None:
    run_stage("vae", tiny_workplace(tmp_path, steps=1))
    with pytest.raises(CheckpointError, match="not finished"):
        run_stage("unet", tiny_workplace(tmp_path, steps=2))


def test_exporting_before_training_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"python -m launch\.phantom_networks"):
        main([str(tmp_path), "--export", str(tmp_path / "folders")])


@pytest.mark.parametrize("options", [["--steps", "vea=3"], ["--steps", "vae"], ["--only", "vea"]])
def test_a_wrong_stage_name_is_refused(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(ConfigError):
        main([str(tmp_path), *options])


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

    from launch.phantom_networks.architectures import SCHEDULER_CONFIG

    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    torch.testing.assert_close(alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe("vae", steps=1000, batch_size=1, learning_rate=2.0, seed=0)
    assert recipe.rate(0) == pytest.approx(0.02)
    assert recipe.rate(500) == 2.0
    assert recipe.rate(850) == pytest.approx(1.0)
    assert recipe.rate(999) < 0.01
