"""Every command of README and docs parses, and would start where everything that it names is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import typer

from launch.cli import app
from launch.ranks.networks import load_extractor
from launch.recipe import load_recipe
from nd_dist.comm import Comm
from nd_dist.compute.device import rank_device
from nd_dist.config import PhantomConfig
from nd_dist.events import EventLog
from nd_dist.frozen.phantom_judges import JUDGE_KINDS, JudgeNetwork
from nd_dist.models.decoder import Decoder
from nd_dist.training.records import stage_dir
from nd_dist.world import World
from shards.packing.pack import pack
from shards.phantom.write import write_phantom
from tests.nd_dist.frozen.toy_folders import write_clip, write_stable_diffusion
from tests.support.command_line import nd

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PHANTOM = PhantomConfig(num_subjects=8, num_sessions=2, trials_per_session=24, num_shared=6, num_voxels=60)
STANDS_FOR = {  # what a reader puts there
    "https://host/shards": "shards",
    "/scratch/me": "scratch",
    "RECIPE": "paper",
    "...": "shards_dir=shards",
    "RUN_DIR": "runs/subj01",
}
WITH_DRY_RUN = ("pack", "train", "evaluate", "sweep", "submit")
ELSEWHERE = ("data.reader=mindeye2", "laion_fmri")  # other files than this world has


def documented() -> list[str]:
    """Return every command of `nd` that stands in an indented block."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^ {4}(nd .*)$", text, re.MULTILINE)
    return [" ".join(shlex.join(shlex.split(line.partition(" > ")[0], comments=True)).split()) for line in found]


COMMANDS = list(dict.fromkeys(documented()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the documentation names: a phantom, small networks under the real names, hosts, runs."""
    folder = tmp_path_factory.mktemp("world")
    write_phantom(folder / "nsd", PHANTOM, 3)
    for name, write in (
        ("models--CompVis--stable-diffusion-v1-4", write_stable_diffusion),
        ("models--openai--clip-vit-base-patch32", write_clip),
    ):
        write(folder / "hub" / name / "snapshots" / "1a2b")
        (folder / "hub" / name / "refs").mkdir()
        (folder / "hub" / name / "refs" / "main").write_text("1a2b")
    for kind in JUDGE_KINDS:
        torch.manual_seed(0)
        JudgeNetwork(kind, 3, 2).save(folder / "judges" / kind)
    (folder / "hosts").write_text("".join(f"node{number} slots=4\n" for number in range(1, 5)))
    (folder / "bin").mkdir()
    for program in ("pdsh", "srun", "sbatch"):
        (folder / "bin" / program).write_text("#!/bin/sh\nexit 1\n")
        (folder / "bin" / program).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def packed(world: Path) -> Path:
    """The same, with shards and decoders."""
    with pytest.MonkeyPatch.context() as patch:
        at_home(patch, world)
        config = load_recipe("paper", ["nsd_root=nsd", "shards_dir=shards"], "pack")
        extractor = load_extractor(config, rank_device(World()))
        index = pack(config, Comm(), EventLog(world / "log", 0, "pack"), extractor)
    (world / "shards_nsd").symlink_to("shards")
    small = config.decoder.model_copy(update={"hidden_size": 8, "prior_depth": 0})
    for run in ("runs/subj01", "scratch/run", "runs/paper-subj01"):
        Decoder(small, index.num_voxels, index.target_specs).save(stage_dir(world / run, 2) / "model")
    return world


def at_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in a world's folder, with its programs and its Hugging Face cache."""
    patch.chdir(folder)
    patch.setenv("PATH", str(folder / "bin"), prepend=":")
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))


@pytest.fixture
def home(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    at_home(monkeypatch, packed)
    return packed


def test_the_documentation_has_commands_of_every_shape() -> None:
    assert len(COMMANDS) > 60
    readme = "\n".join(
        line for line in COMMANDS if line in " ".join(PAGES[0].read_text().replace("\\\n", " ").split())
    )
    for shape in ("--hostfile hosts", "nd submit pack,train,evaluate", "nd fetch judges", "nd demo"):
        assert shape in readme, shape


@pytest.mark.parametrize(
    "command", [*COMMANDS, pytest.param("nd train paper --nonsense", marks=pytest.mark.xfail(strict=True))]
)
def test_every_documented_command_parses(command: str) -> None:
    _, name, *words = shlex.split(command)
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[name].make_context(name, words)


@pytest.mark.parametrize(
    "command",
    [line for line in COMMANDS if line.split()[1] in WITH_DRY_RUN and not any(word in line for word in ELSEWHERE)],
)
@pytest.mark.usefixtures("home")
def test_every_documented_launch_would_start(command: str) -> None:
    for placeholder, word in STANDS_FOR.items():
        command = command.replace(placeholder, word)
    words = [word for word in shlex.split(command)[1:] if word != "--dry-run"]
    result = nd(*words, "--dry-run")
    refused = set(re.findall(r"# would be refused: (.*)", result.stdout))
    assert result.returncode == 0 or refused == {"The disk is too small."}, result.stdout[-3000:] + result.stderr
