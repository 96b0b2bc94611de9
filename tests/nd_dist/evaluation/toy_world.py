"""A very small world for evaluations: real networks at toy width in folders, and a source that is all arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.config import Config
from nd_dist.evaluation.job import Job
from nd_dist.evaluation.points.units import config_points
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.frozen import phantom_judges
from nd_dist.models.decoder import Decoder
from nd_dist.schema import GUIDANCE, INITIAL, SEMANTIC, TargetSpec, role_of
from nd_dist.seeds import unit_seed
from tests.nd_dist.frozen.toy_folders import (
    CLIP_WIDTH,
    PICTURE_SIZE,
    TEXT_LENGTH,
    TEXT_WIDTH,
    write_clip,
    write_stable_diffusion,
)

NUM_VOXELS = {1: 30, 2: 20}
TEST_IMAGES = 4
SHAPES: dict[str, tuple[int, ...]] = {
    SEMANTIC: (TEXT_LENGTH, TEXT_WIDTH),
    INITIAL: (4, 8, 8),
    **dict.fromkeys(GUIDANCE, (10, CLIP_WIDTH)),
}


@dataclass(frozen=True)
class ToyIndex:
    id: str = "toy"


class ToySource:
    """Voxels, targets and pictures as pure functions of subject and image id."""

    def __init__(self, test_images: int = TEST_IMAGES, shards: str = "toy") -> None:
        self.index = ToyIndex(shards)
        self._test_images = test_images

    def images(self, subject: int, split: str) -> list[int]:
        return list(range(self._test_images)) if split == "test" else list(range(50, 60))

    def voxels(self, subject: int, image_ids: Sequence[int], *, two_repeats: str = "mean") -> npt.NDArray[np.float32]:
        return np.stack([_noise("voxels", subject, image, shape=(NUM_VOXELS[subject],)) for image in image_ids])

    def targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.stack([_noise(name, image, shape=SHAPES[name]) for image in image_ids])

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        return np.stack([toy_picture(image) for image in image_ids])


def _noise(*words: int | str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.random.default_rng(unit_seed(0, *words)).standard_normal(shape).astype(np.float32)


def toy_picture(image_id: int, size: int = PICTURE_SIZE) -> npt.NDArray[np.uint8]:
    """A coloured gradient with a disc, different for each image."""
    rng = np.random.default_rng(image_id)
    rows, columns = np.mgrid[0:size, 0:size] / size
    ground = rng.uniform(0.2, 0.8, 3) + np.stack([rows, columns, 1 - rows], axis=-1) * rng.uniform(-0.2, 0.2, 3)
    disc = (rows - rng.uniform(0.3, 0.7)) ** 2 + (columns - rng.uniform(0.3, 0.7)) ** 2 < rng.uniform(0.02, 0.1)
    picture = np.where(disc[..., None], rng.uniform(0, 1, 3), ground)
    return np.asarray(np.clip(picture * 255, 0, 255), dtype=np.uint8)


def write_models(folder: Path, prior_depth: int = 0, seed: int = 9) -> None:
    """Write Stable Diffusion, guidance CLIP, judges and a decoder with random weights."""
    write_stable_diffusion(folder / "models" / "stable-diffusion")
    write_clip(folder / "models" / "clip-vision")
    for index, kind in enumerate(phantom_judges.JUDGE_KINDS):
        torch.manual_seed(index)
        phantom_judges.JudgeNetwork(kind, 3, 2).save(folder / "models" / "judges" / kind)
    torch.manual_seed(seed)
    decoder = toy_config(folder).decoder.model_copy(update={"prior_depth": prior_depth, "prior_dim_head": 8})
    specs = [TargetSpec(name, role_of(name), shape) for name, shape in SHAPES.items()]
    Decoder(decoder, NUM_VOXELS, specs).save(folder / "decoder")


def toy_config(folder: Path, run: str = "run", num_steps: int = 4, **evaluation: Any) -> Config:
    values = {
        "seed": 3,
        "run_dir": folder / run,
        "model": str(folder / "models" / "stable-diffusion"),
        "guidance_model": str(folder / "models" / "clip-vision"),
        "data": {"subjects": (1, 2)},
        "decoder": {"hidden_size": 16, "num_blocks": 1, "prior_depth": 0, "initial_channels": (8, 8, 8)},
        "sampler": {"kappa": 10.0, "eta": 0.5, "num_steps": num_steps, "cfg_scale": 2.0, "sag_scale": 0.0},
        "evaluation": {"num_repeats": 2, "batch_size": 2, "bootstrap": 100, **evaluation},
    }
    return Config.model_validate(values)


def toy_job(folder: Path, run: str = "run", num_steps: int = 4, **evaluation: Any) -> Job:
    config = toy_config(folder, run, num_steps, **evaluation)
    networks = Networks(config, torch.device("cpu"))
    return Job(config, config_points(config), ToySource(), folder / "decoder", networks, is_simulated=True)
