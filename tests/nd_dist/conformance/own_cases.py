"""Writes a folder of reference cases in the layout that conformance reads, from the plain reference procedure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.reference import Reference
from tests.nd_dist.frozen.toy_folders import SCHEDULER, toy_clip_tower, toy_unet, toy_vae

NAMES = tuple(f"Linear-{k}" for k in range(2, 14, 2))
CASES = (
    {"sample": 1, "kappa": 2000, "eta": 0.1, "sag": 0.75, "dtype": "f64"},
    {"sample": 0, "kappa": 0, "eta": 0, "sag": 0.0, "dtype": "f64"},
    {"sample": 0, "kappa": 2000, "eta": 0.05, "sag": 0.5, "dtype": "f32"},
)
DDIM = {key: value for key, value in SCHEDULER.items() if key not in ("_class_name", "skip_prk_steps")}


def _plain(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def write_cases(folder: Path) -> Path:
    """Write weights, inputs and a few sampler cases; return the folder."""
    _write_sampler(folder / "sampler", write_weights(folder))
    return folder


def write_weights(folder: Path) -> dict[str, Any]:
    """Write the folder ``weights``; return its networks."""
    networks = {"unet": toy_unet(), "vae": toy_vae(), "clip_vision_hf": toy_clip_tower(6)}
    (folder / "weights").mkdir(parents=True)
    for name, network in networks.items():
        save_file(
            {key: w.contiguous() for key, w in network.state_dict().items()},
            folder / "weights" / f"{name}.safetensors",
        )
    configs = {name: _plain(network.config) for name, network in networks.items() if name != "clip_vision_hf"}
    vision = networks["clip_vision_hf"].config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    configs["clip_vision_hf"] = {key: getattr(vision, key) for key in (*keys, "hidden_act")}
    (folder / "weights" / "configs.json").write_text(json.dumps({**configs, "scheduler": DDIM}))
    return networks


def _write_sampler(folder: Path, networks: dict[str, Any]) -> None:
    folder.mkdir()
    rng = np.random.default_rng(3)
    shapes = {"z": (2, 4, 8, 8), "noise": (2, 4, 8, 8), "c": (2, 12, 24), "uncond": (1, 12, 24)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs |= {f"g_{name}": rng.normal(size=(2, 160)).astype(np.float32) for name in NAMES}
    np.savez(folder / "inputs.npz", **inputs)
    index = []
    for case in CASES:
        entry = {"file": "s{sample}_k{kappa}_e{eta}_sag{sag}_{dtype}.npz".format(**case), "cfg": 7.5, **case}
        np.savez(folder / entry["file"], **_run(networks, inputs, entry))
        index.append({**entry, "guided_steps": int(37 * entry["eta"])})
    (folder / "index.json").write_text(json.dumps(index))


def _run(networks: dict[str, Any], inputs: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    dtype = {"f64": torch.float64, "f32": torch.float32}[entry["dtype"]]
    unet, vae, tower = (network.requires_grad_(False).eval().to(dtype) for network in networks.values())
    sd, clip = StableDiffusion(unet, vae, DDIM), ClipVision(tower)
    reference = Reference(sd, clip, DDIM, entry["kappa"], entry["eta"], entry["cfg"], entry["sag"], antialias=True)
    row = {
        name: torch.from_numpy(value[entry["sample"]][None] if len(value) > 1 else value).to(dtype)
        for name, value in inputs.items()
    }
    targets = {name: row[f"g_{name}"].reshape(1, 10, 16) for name in NAMES}
    picture, _ = reference.run(row["c"], row["uncond"], row["z"], row["noise"], targets)
    trace = {name: torch.cat(list(values)).detach().numpy() for name, values in reference.trace.items()}
    trace["eps_used_first"] = trace.pop("eps_used")[:1]
    return {**trace, "image": picture.permute(0, 2, 3, 1).detach().numpy()}
