from pathlib import Path

import pytest

from launch.recipe import config_path, config_yaml, load_recipe
from nd_dist.config import Config
from nd_dist.files import write_text


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = load_recipe("demo", [f"run_dir={tmp_path / 'run'}"])
    write_text(config_path(config), config_yaml(config))
    return config
