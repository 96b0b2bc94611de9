from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.toy_inputs import LAYER_SCALE
from tests.nd_dist.frozen.toy_folders import SECOND_VERSION, write_stable_diffusion


@pytest.fixture(scope="package")
def v_prediction_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd-v"
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    return write_stable_diffusion(folder, text_width=32, unet=SECOND_VERSION, **scheduler)


@pytest.fixture(scope="package")
def sd64(sd_dir: Path) -> StableDiffusion:
    return stable_diffusion.load(sd_dir, dtype=torch.float64)


@pytest.fixture(scope="package")
def clip64(clip_dir: Path) -> ClipVision:
    return clip_vision.load(clip_dir, dtype=torch.float64)


@pytest.fixture(scope="package")
def guidance(clip: ClipVision) -> ClipGuidance:
    return ClipGuidance(clip, LAYER_SCALE)


@pytest.fixture(scope="package")
def guidance64(clip64: ClipVision) -> ClipGuidance:
    return ClipGuidance(clip64, LAYER_SCALE)
