"""`nd fetch` against a local server in the place of hub and publishers; real clients, real formats, tiny networks."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nd_dist.config.data import DataConfig
from nd_dist.files import sha256_file
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.folders import resolve_folder
from shards.sources.known import NSD
from shards.sources.laion_fmri_layout import LaionFmriLayout
from tests.nd_dist.frozen.toy_folders import write_clip, write_stable_diffusion
from tests.support.command_line import Ended, nd, nd_process
from tests.support.file_server import FileServer

COMMIT = "c" * 40
NAMES = ("model=toy/diffusion", "guidance_model=toy/clip")


def publish(root: Path, repo: str, folder: Path) -> None:
    """Put a folder on the server as the hub does: an answer of its API, and the files of one commit."""
    files = root / repo / "resolve" / COMMIT
    shutil.copytree(folder, files)
    siblings: list[dict[str, Any]] = []
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        size = path.stat().st_size
        lfs = {"sha256": sha256_file(path), "size": size, "pointerSize": 9} if size > 4000 else None
        siblings.append({"rfilename": str(path.relative_to(files)), "size": size, "blobId": "b", "lfs": lfs})
    answer = root / "api" / "models" / repo
    answer.parent.mkdir(parents=True, exist_ok=True)
    answer.write_text(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with a Stable Diffusion in many formats, and a CLIP that has no safetensors."""
    root = tmp_path_factory.mktemp("hub")
    sd, clip = write_stable_diffusion(root / "made-sd"), write_clip(root / "made-clip")
    for extra in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "v1-4.ckpt"):
        (sd / extra).write_bytes(b"never asked for" * 1000)
    (sd / "safety_checker").mkdir()
    (sd / "safety_checker" / "model.safetensors").write_bytes(b"never asked for")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    publish(root, "toy/diffusion", sd)
    publish(root, "toy/clip", clip)
    return root


@pytest.fixture
def server(published: Path) -> Iterator[FileServer]:
    with FileServer(published, headers={"X-Repo-Commit": COMMIT}) as running:
        yield running


def fetched(server: FileServer, what: str, to: Path, *words: str) -> Ended:
    return nd("fetch", what, "--to", str(to), "--mirror", server.url, *words)


def test_fetched_models_load_and_hold_only_what_is_opened(server: FileServer, published: Path, tmp_path: Path) -> None:
    ended = nd_process("fetch", "models", "--to", str(tmp_path), *NAMES, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0")
    assert ended.returncode == 0, ended.stderr
    assert f"model={tmp_path}/toy/diffusion guidance_model={tmp_path}/toy/clip" in ended.stdout
    assert COMMIT in ended.stdout
    sd = stable_diffusion.load(tmp_path / "toy" / "diffusion")
    assert sd.hashes() == stable_diffusion.load(published / "made-sd").hashes()
    assert clip_vision.load(tmp_path / "toy" / "clip").hash() == clip_vision.load(published / "made-clip").hash()
    asked = " ".join(request.path for request in server.requests)
    assert not any(word in asked for word in ("fp16", ".ckpt", "safety_checker", "diffusion_pytorch_model.bin"))


def test_without_a_folder_models_go_where_recipes_find_them_by_name(
    server: FileServer, published: Path, tmp_path: Path
) -> None:
    variables = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    ended = nd_process("fetch", "models", *NAMES, **variables)
    assert ended.returncode == 0, ended.stderr
    assert "model=toy/diffusion guidance_model=toy/clip" in ended.stdout
    folder = resolve_folder(tmp_path / "hub" / "models--toy--diffusion")
    assert stable_diffusion.load(folder).hashes() == stable_diffusion.load(published / "made-sd").hashes()
    again = nd_process("fetch", "models", *NAMES, **variables)
    assert "downloaded" not in again.stdout
    assert nd("fetch", "judges").returncode == 2


def test_a_dry_run_names_files_and_sizes_and_writes_nothing(server: FileServer, tmp_path: Path) -> None:
    ended = fetched(server, "models", tmp_path / "new", "--dry-run", *NAMES)
    assert ended.returncode == 0, ended.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in ended.stdout
    assert "pytorch_model.bin" in ended.stdout
    assert "downloaded" not in ended.stdout
    assert not (tmp_path / "new").exists()


def test_what_is_there_stays_and_what_is_damaged_comes_again(server: FileServer, tmp_path: Path) -> None:
    fetched(server, "models", tmp_path, *NAMES)
    weights = tmp_path / "toy" / "diffusion" / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9] + bytes(9))
    server.requests.clear()
    again = fetched(server, "models", tmp_path, *NAMES)
    assert weights.read_bytes() == whole
    assert again.stdout.count("downloaded") == 1
    files = {request.path.rpartition("/")[2] for request in server.requests if "resolve" in request.path}
    assert files == {weights.name}


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[FileServer]:
    """A server of files by their last name."""
    folder = tmp_path / "files"
    folder.mkdir()
    with FileServer(folder) as running:
        yield running


def test_captions_come_out_of_coco_s_archive(bare: FileServer, tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writing:
        for name in ("captions_train2017", "captions_val2017", "instances_val2017"):
            writing.writestr(f"annotations/{name}.json", json.dumps({"name": name}))
    (bare.folder / "annotations_trainval2017.zip").write_bytes(archive.getvalue())
    assert fetched(bare, "captions", tmp_path / "to").returncode == 0
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [
        "captions_train2017.json",
        "captions_val2017.json",
    ]
    assert json.loads((tmp_path / "to" / "captions_val2017.json").read_text()) == {"name": "captions_val2017"}
    bare.requests.clear()
    assert "is there" in fetched(bare, "captions", tmp_path / "to").stdout
    assert bare.requests == []


def test_a_metric_network_with_another_hash_than_its_name_says_is_refused(bare: FileServer, tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.ones(2)}, bare.folder / "alexnet-owt-7be5be79.pth")
    ended = fetched(bare, "judges", tmp_path / "to")
    assert ended.returncode == 3
    assert "invalid hash value" in ended.stderr
    assert not list((tmp_path / "to").iterdir())


def test_metric_networks_become_safetensors_under_the_names_that_are_read(
    bare: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"module.conv1.weight": torch.arange(4.0)}, bare.folder / "swav.pth.tar")
    monkeypatch.setattr("launch.commands.fetch._JUDGES", {"swav_resnet50": "https://nowhere.invalid/swav.pth.tar"})
    ended = fetched(bare, "judges", tmp_path / "to")
    assert ended.returncode == 3, "this server is no hub, and the CLIP judge comes from one"
    assert "clip-vit-large-patch14" in ended.stderr
    assert torch.equal(load_file(tmp_path / "to" / "swav_resnet50.safetensors")["conv1.weight"], torch.arange(4.0))


@pytest.mark.parametrize("what", ["models", "judges", "captions"])
def test_without_a_network_it_says_so_and_what_to_do(what: str, tmp_path: Path) -> None:
    ended = nd("fetch", what, "--to", str(tmp_path), "--mirror", "http://127.0.0.1:9")
    assert ended.returncode == 3
    assert "--mirror" in ended.stderr
    assert "127.0.0.1:9" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_nsd_s_commands_name_every_part_of_the_subjects_with_sizes(tmp_path: Path) -> None:
    text = nd("fetch", "nsd", "--to", "nsd", "--subjects", "1,8").stdout
    assert "Terms-and-Conditions" in text
    assert f"nsddata_betas/ppdata/subj08/func1pt8mm/{DataConfig().betas}" in text
    assert "subj02" not in text
    assert "39.6 GB" in text
    assert f"{81 * 104 * 83 * 2 * 750 * NSD[1].sessions / 1e9:.0f} GB" in text
    assert nd("fetch", "nsd", "--to", "nsd", "--subjects", "9").returncode == 2


def test_laion_fmri_s_commands_say_what_is_there_and_which_sizes_nobody_published(tmp_path: Path) -> None:
    layout = LaionFmriLayout(tmp_path)
    for path in (
        layout.stimuli("stimuli.h5"),
        layout.betas(3, "glmsingle-tedana", 1),
        layout.trials(3, "glmsingle-tedana", 1),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lines = nd("fetch", "laion-fmri", "--to", str(tmp_path), "--subjects", "1,3").stdout.splitlines()
    [pictures] = [line for line in lines if "download-stimuli" in line]
    assert pictures.endswith("3.2 GB; is there")
    [betas_1, betas_3] = [line for line in lines if "SingletrialBetas" in line]
    assert betas_3.endswith("2 of 60 files are there")
    assert "there" not in betas_1
    assert "size not published" in betas_1
    assert "$B/derivatives/glmsingle-tedana/sub-03 " in betas_3
    assert not any("sub-05" in line for line in lines)
    assert "no subjects [2]" in nd("fetch", "laion-fmri", "--to", "new", "--subjects", "2").stderr


@pytest.mark.parametrize("words", [[], ["--to", "somewhere"]])
def test_a_wrong_word_is_named_before_anything_that_is_missing(words: list[str]) -> None:
    ended = nd("fetch", "everything", *words)
    assert ended.returncode == 2
    assert "found: everything" in ended.stderr
    assert "--to" not in ended.stderr
