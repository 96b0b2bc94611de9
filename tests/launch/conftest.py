from pathlib import Path

import pytest

from launch.recipe import load_recipe, write_config
from nd_dist.config import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = load_recipe("demo", [f"run_dir={tmp_path / 'run'}"])
    write_config(config)
    return config
