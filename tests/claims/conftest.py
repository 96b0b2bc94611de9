"""The runs that the claims are read from."""

import shutil
from pathlib import Path

import pytest

from tests.claims.line import World, claims_dir


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The folder of all runs; ``nd demo --full`` has gone through in it."""
    found = World(claims_dir() or tmp_path_factory.mktemp("claims"))
    found.nd("demo", "run")
    return found


def copy_stage_1(world: World, source: str, target: str) -> None:
    """Give a run the finished stage 1 of another one, so that it is not trained twice."""
    place = Path("checkpoints") / "stage1"
    if not (world.folder / target / place).exists():
        shutil.copytree(world.folder / source / place, world.folder / target / place)
