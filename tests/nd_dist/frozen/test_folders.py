"""Which files of a model folder count, in every layout that people have, checked against what the libraries open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nd_dist.errors import CheckpointError
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.folders import (
    NETWORK,
    STABLE_DIFFUSION,
    find_weights,
    list_files,
    model_name,
    resolve_folder,
)
from nd_dist.frozen.weights import hash_network
from tests.nd_dist.frozen.toy_folders import toy_clip_tower, toy_text_encoder, toy_unet

UNET, TEXT, CLIP = "unet", "text_encoder", ""
SAFE = {UNET: "diffusion_pytorch_model.safetensors", TEXT: "model.safetensors", CLIP: "model.safetensors"}
PICKLED = {UNET: "diffusion_pytorch_model.bin", TEXT: "pytorch_model.bin", CLIP: "pytorch_model.bin"}
MAKERS: dict[str, Callable[[], Any]] = {UNET: toy_unet, TEXT: toy_text_encoder, CLIP: toy_clip_tower}
EVERY_PART = pytest.mark.parametrize("part", [UNET, TEXT, CLIP])


@pytest.fixture
def copied(sd_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_dir, tmp_path / "sd"))


@pytest.fixture
def model(copied: Path, clip_dir: Path, tmp_path: Path, part: str) -> Path:
    """The model folder that holds a part: Stable Diffusion, or CLIP."""
    return copied if part else Path(shutil.copytree(clip_dir, tmp_path / "clip"))


def loaded(model: Path, part: str) -> dict[str, torch.Tensor]:
    if part == CLIP:
        return dict(clip_vision.load(model).tower.state_dict())
    return dict(getattr(stable_diffusion.load(model), part).state_dict())


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pickle(model: Path, part: str) -> None:
    """Rewrite a network's safetensors in torch's format."""
    safe = model / part / SAFE[part]
    torch.save(load_file(safe), model / part / PICKLED[part])
    safe.unlink()


def shard(model: Path, part: str) -> None:
    (model / part / SAFE[part]).unlink()
    MAKERS[part]().save_pretrained(model / part, max_shard_size="20KB")
    assert len(find_weights(model, part).files) > 1


def spoil(path: Path, other: Path) -> None:
    """Write another network's weights: the same tensors, each one larger by one."""
    content = {name: tensor + 1 for name, tensor in load_file(other).items()}
    save_file(content, path, metadata={"format": "pt"})


@EVERY_PART
@pytest.mark.parametrize("rewrite", [pickle, shard])
def test_the_same_tensors_are_the_same_network_in_any_files(
    model: Path, part: str, rewrite: Callable[[Path, str], None]
) -> None:
    weights, digest = loaded(model, part), hash_network(model, part)
    rewrite(model, part)
    assert equal(loaded(model, part), weights)
    assert hash_network(model, part) == digest


@EVERY_PART
def test_one_changed_value_is_another_network(model: Path, part: str) -> None:
    digest = hash_network(model, part)
    content = load_file(model / part / SAFE[part])
    next(iter(content.values())).view(-1)[0] += 1
    save_file(content, model / part / SAFE[part], metadata={"format": "pt"})
    assert hash_network(model, part) != digest


@EVERY_PART
def test_a_folder_with_a_half_precision_variant_alone_loads_it(model: Path, part: str) -> None:
    half = {name: tensor.half() for name, tensor in load_file(model / part / SAFE[part]).items()}
    before, digest = loaded(model, part), hash_network(model, part)
    (model / part / SAFE[part]).unlink()
    variant = model / part / SAFE[part].replace(".safetensors", ".fp16.safetensors")
    save_file(half, variant, metadata={"format": "pt"})
    after = loaded(model, part)
    assert all(
        torch.equal(after[name].float(), before[name].half().float())
        for name in before
        if before[name].is_floating_point()
    )
    assert hash_network(model, part) != digest


@EVERY_PART
@pytest.mark.parametrize(
    "junk", ["{stem}.fp16.safetensors", "{stem}.non_ema.safetensors", "{other}.safetensors", "a.ckpt"]
)
def test_files_beside_those_that_are_opened_change_nothing(model: Path, part: str, junk: str) -> None:
    weights, digest, files = loaded(model, part), hash_network(model, part), find_weights(model, part)
    stem = SAFE[part].removesuffix(".safetensors")
    other = "model" if part == UNET else "diffusion_pytorch_model"
    spoil(model / part / junk.format(stem=stem, other=other), model / part / SAFE[part])
    assert equal(loaded(model, part), weights)
    assert (hash_network(model, part), find_weights(model, part)) == (digest, files)


@EVERY_PART
@pytest.mark.parametrize("whole", ["SAFE", "PICKLED"])
def test_of_whole_weights_and_shards_that_is_named_which_the_library_opens(model: Path, part: str, whole: str) -> None:
    safe = model / part / SAFE[part]
    content = load_file(safe)
    shard(model, part)
    if whole == "SAFE":
        spoil_content = {name: tensor + 1 for name, tensor in content.items()}
        save_file(spoil_content, safe, metadata={"format": "pt"})
    else:
        torch.save({name: tensor + 1 for name, tensor in content.items()}, model / part / PICKLED[part])
    is_spoiled = len(find_weights(model, part).files) == 1
    assert is_spoiled == (whole == "SAFE" and part != UNET)
    name = next(name for name in content if "layers.7" not in name and content[name].is_floating_point())
    found = loaded(model, part)
    suffix = name.removeprefix("vision_model.").removeprefix("text_model.")
    value = next(tensor for key, tensor in found.items() if key.endswith(suffix))
    assert torch.equal(value, content[name] + 1 if is_spoiled else content[name])


@EVERY_PART
def test_a_missing_shard_is_refused_by_name(model: Path, part: str) -> None:
    shard(model, part)
    gone = find_weights(model, part).files[1]
    (model / part / gone).unlink()
    with pytest.raises(CheckpointError, match="weights are missing") as caught:
        list_files(model, STABLE_DIFFUSION if part else NETWORK)
    assert gone in caught.value.expected


class Trap:
    """Something that runs code when a pickle with it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@EVERY_PART
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(model: Path, part: str, tmp_path: Path) -> None:
    (model / part / SAFE[part]).unlink()
    torch.save({"a": Trap(tmp_path / "ran")}, model / part / PICKLED[part])
    for use in (loaded, hash_network):
        with pytest.raises(CheckpointError):
            use(model, part)
    assert not (tmp_path / "ran").exists()


LACKING = [
    *(f"{part}/config.json" for part in STABLE_DIFFUSION[:3]),
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.mark.parametrize("name", LACKING)
def test_a_model_that_lacks_a_file_is_refused_before_anything_is_loaded(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=r"missing") as caught:
        list_files(copied, STABLE_DIFFUSION)
    assert Path(name).name in str(caught.value)


def test_a_tokenizer_without_a_vocabulary_and_an_index_without_shards_are_refused(copied: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (copied / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"tokenizer/vocab\.json"):
        list_files(copied, STABLE_DIFFUSION)
    shard(copied, TEXT)
    (copied / TEXT / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weights are missing"):
        find_weights(copied, TEXT)


def cached(folder: Path, cache: Path, name: str, commit: str, main: str = "") -> Path:
    """Put a folder into a Hugging Face cache as a client does: blobs, and links to them in a snapshot."""
    entry = cache / f"models--{name.replace('/', '--')}"
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = entry / "blobs" / f"{commit[:4]}{number}", entry / "snapshots" / commit / path.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    if main:
        (entry / "refs").mkdir(exist_ok=True)
        (entry / "refs" / "main").write_text(main)
    return entry


def test_a_cache_without_the_safety_checker_loads_by_name_entry_and_snapshot(
    sd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = cached(sd_dir, tmp_path, "toy/diffusion", "a" * 40, main="a" * 40)
    tree = [{"type": "file", "path": "safety_checker/model.safetensors", "size": 9, "oid": "0", "lfs": None}]
    (entry / "trees").mkdir()
    (entry / "trees" / f"{'a' * 40}.json").write_text(json.dumps(tree))
    for model in ("toy/diffusion", entry, entry / "snapshots" / ("a" * 40)):
        assert resolve_folder(model) == entry / "snapshots" / ("a" * 40)
        assert model_name(model) == "toy/diffusion"
    assert stable_diffusion.load(entry).hashes() == stable_diffusion.load(sd_dir).hashes()


def test_refs_say_which_snapshot_counts_and_a_single_one_needs_none(
    clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = cached(clip_dir, tmp_path, "toy/clip", "a" * 40)
    assert resolve_folder("toy/clip").name == "a" * 40
    cached(clip_dir, tmp_path, "toy/clip", "b" * 40)
    with pytest.raises(CheckpointError, match="main one"):
        resolve_folder("toy/clip")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("b" * 40 + "\n")
    assert resolve_folder("toy/clip").name == "b" * 40


def test_a_cached_file_whose_content_is_gone_counts_as_missing(clip_dir: Path, tmp_path: Path) -> None:
    entry = cached(clip_dir, tmp_path, "toy/clip", "a" * 40)
    (entry / "snapshots" / ("a" * 40) / "model.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match="weights are missing"):
        list_files(resolve_folder(entry), NETWORK)


def test_the_shipped_phantom_lists_what_it_loads() -> None:
    names = [path.name for path in list_files(resolve_folder("phantom/stable-diffusion"), STABLE_DIFFUSION)]
    assert names.count("config.json") == 3
    assert not {"README.md", "model_index.json"} & set(names)
    assert len(list_files(resolve_folder("phantom/clip-vision"), NETWORK)) == 2
