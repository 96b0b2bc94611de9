"""The small recipe of the training tests: fits ``SyntheticSource``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nd_dist.config import Config, DataConfig, DecoderConfig, LaunchConfig, TrainingConfig
from tests.support.waiting import HANG_S


def small_recipe(folder: Path, **training: Any) -> Config:  # Any: fields of TrainingConfig, checked there
    """Subjects 2 and 5 then 1, three kinds of targets, a prior, 8 + 6 steps, a checkpoint every 2."""
    defaults: dict[str, Any] = {
        "targets": ("c", "z", "g02"),
        "steps": (8, 6),
        "samples_per_subject": (4, 8),
        "checkpoint_every": 2,
    }
    return Config(
        run_dir=folder / "run",
        data=DataConfig(subjects=(1, 2, 5)),
        decoder=DecoderConfig(
            hidden_size=32, num_blocks=2, initial_channels=(8, 16, 16), prior_depth=1, prior_dim_head=8
        ),
        training=TrainingConfig(**{**defaults, **training}),
        launch=LaunchConfig(timeout_s=HANG_S),
    )
