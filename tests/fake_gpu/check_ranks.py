"""Whole rank programs on a toy world: every network lies on the device that the launcher means for the rank."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from nd_dist.comm import Comm
from nd_dist.compute.device import rank_device, use_device
from nd_dist.config import Config, FrozenConfig
from nd_dist.evaluation.job import Job
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.run import sweep
from nd_dist.events import EventLog
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.models.decoder import Decoder
from nd_dist.world import World
from tests.nd_dist.evaluation.toy_world import ToySource, toy_job, write_models
from tests.support.fake_gpu.gpu import PretendedGpu, pretended_gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of toy models, written before there is a GPU."""
    folder = tmp_path_factory.mktemp("world")
    write_models(folder)
    return folder


@pytest.fixture
def gpu(folder: Path) -> Iterator[PretendedGpu]:
    with pretended_gpu(16.0) as gpu:
        yield gpu


class Watched:
    """Collects the device of every network that is ever run."""

    def __init__(self) -> None:
        self.devices: dict[str, set[str]] = {}

    def note(self, module: torch.nn.Module, _inputs: object) -> None:
        """Note where a network's own parameters and buffers lie when it is run."""
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        self.devices.setdefault(type(module).__name__, set()).update(str(tensor.device) for tensor in own)


@pytest.fixture
def watched() -> Iterator[Watched]:
    found = Watched()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(found.note)
    yield found
    handle.remove()


def job_of(folder: Path, run: str, device: torch.device) -> Job:
    """Return a small evaluation: one image, one guided step, SAG on, bfloat16."""
    job = toy_job(folder, run, num_steps=1, num_images=1, num_repeats=1)
    sampler = {"sag_scale": 0.75, "dtype": "bfloat16", "eta": 1.0}
    sweep = {"kappa": (10.0,), "eta": (1.0,), "num_images": 2}
    config = job.config.model_copy(
        update={
            "sampler": job.config.sampler.model_copy(update=sampler),
            "sweep": job.config.sweep.model_copy(update=sweep),
        }
    )
    return replace(job, config=config, networks=Networks(config, device))


def test_a_sweep_decodes_calibrates_samples_and_judges_on_the_rank_s_gpu(
    folder: Path, gpu: PretendedGpu, watched: Watched
) -> None:
    device = use_device(World(3, 8, 3, "openmpi"), Config())
    assert (device, torch.cuda.current_device()) == (torch.device("cuda", 3), 3)
    job = job_of(folder, "swept", device)
    metrics = sweep(replace(job, split="train"), job, Comm(), EventLog(job.config.run_dir, 0, "sweep"))
    assert len(metrics["points"]) == 2
    assert {"Decoder", "Conv2d", "Linear", "CLIPEncoderLayer", "UNet2DConditionModel"} <= set(watched.devices)
    elsewhere = {name: found for name, found in watched.devices.items() if found - {"cuda:3"}}
    assert not elsewhere, "networks were run elsewhere"
    gc.collect()
    kept = [item for item in gc.get_objects() if isinstance(item, torch.nn.Module)]
    assert {str(tensor.device) for network in kept for tensor in network.parameters()} <= {"cuda:3", "meta"}
    assert not [network for network in kept if isinstance(network, Decoder)], "it is let go when all is decoded"


@pytest.mark.parametrize(
    ("roles", "loaded"),
    [(("vae",), {"AutoencoderKL"}), (("text_encoder",), {"CLIPTextModel"}), (("vae", "text_encoder"), set())],
)
def test_packing_loads_only_the_parts_that_its_targets_need(
    folder: Path, gpu: PretendedGpu, watched: Watched, roles: tuple[str, ...], loaded: set[str]
) -> None:
    models = folder / "models"
    sd = stable_diffusion.load(models / "stable-diffusion", device="cuda:1", parts=roles)
    clip = clip_vision.load(models / "clip-vision", device="cuda:1")
    extractor = FrozenExtractor(sd, clip, FrozenConfig(), 0)
    assert sd.device == torch.device("cuda", 1)
    wanted = [name for part, name in (("text_encoder", "c"), ("vae", "z")) if part in roles]
    source = ToySource()
    targets = extractor.extract(source.pictures([0, 1]), [["a", "b"], ["c"]], [0, 1], (*wanted, "g02"))
    assert set(targets) == {*wanted, "g02"}
    assert not {name: found for name, found in watched.devices.items() if found - {"cuda:1"}}
    assert {str(tensor.device) for tensor in sd.unet.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("visible", "local_ranks", "expected"),
    [
        (8, (0, 3), ("cuda:0", "cuda:3")),
        (1, (0, 3), ("cuda:0", "cuda:0")),
        (2, (1, 2), ("cuda:1", "cuda:0")),
    ],
)
def test_a_rank_counts_around_the_gpus_that_it_sees(
    gpu: PretendedGpu, visible: int, local_ranks: tuple[int, ...], expected: tuple[str, ...]
) -> None:
    with mock.patch.object(torch.cuda, "device_count", return_value=visible):
        assert tuple(str(rank_device(World(r, 8, r, "slurm"))) for r in local_ranks) == expected
