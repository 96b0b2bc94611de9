"""The four training stages in order (vae, clip, judges, unet), each built from what is already trained."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from nd_dist.compute.device import rank_device
from nd_dist.errors import CheckpointError
from nd_dist.files import sha256_file
from nd_dist.training.ranks import on_main
from nd_dist.training.records import check_fingerprint
from shards.phantom.networks.batch_norm import make_batch_norms_global
from shards.phantom.networks.folders import Networks, build_networks, set_scaling_factor, text_encoder_of
from shards.phantom.networks.history import STARTED, machine
from shards.phantom.networks.objectives import (
    ClipObjective,
    ClipWithClassifiers,
    Objective,
    UNetObjective,
    judges_loss,
    vae_loss,
)
from shards.phantom.networks.settings import NetworkName, Workplace
from shards.phantom.networks.trainer import average_path, load_average, read_training, train_network

STAGES: tuple[NetworkName, ...] = get_args(NetworkName)
NEEDED: dict[NetworkName, tuple[NetworkName, ...]] = {"unet": ("vae", "clip")}
"""What a network is trained on the outputs of."""
_FREE = ("stages", "checkpoint_every", *STAGES)
"""Settings that leave the trained numbers alone, or are those of one network."""


def run_stages(place: Workplace) -> None:
    """Train the chosen networks in order; finished ones are skipped. Every rank calls it.

    Raises:
        CheckpointError: the UNet's turn has come before the VAE or CLIP is finished, or the folder holds another
            recipe's training.
    """
    for name in STAGES:
        if name in place.settings.stages:
            run_stage(name, place)


def run_stage(name: NetworkName, place: Workplace) -> None:
    """Train one network to its last step, or go on where it stopped."""
    facts, is_finished = on_main(partial(_state_on_disk, name, place))
    if is_finished:
        place.events.write("stage_skipped", stage=name, reason="finished with the same recipe")
        return
    place.events.write(STARTED, stage=name, machine=machine(place.world.size))
    train_network(name, _parts(name, place), place, facts)


def _state_on_disk(name: NetworkName, place: Workplace) -> tuple[dict[str, object], bool]:
    """Return a stage's fingerprint and whether it is finished.

    Raises:
        CheckpointError: what it needs is missing, or the folder holds another recipe's training.
    """
    for needed in NEEDED.get(name, ()):
        step, steps = read_training(place.out_dir, needed).get("step", 0), place.settings.recipe(needed).steps
        if step < steps:
            raise CheckpointError(
                f"The network {needed!r} is not finished; the UNet is trained on its outputs.",
                where=str(place.out_dir),
                expected=f"{steps} steps",
                found=f"{step} steps",
                todo=f"python -m launch.phantom_networks {place.out_dir} stages=[{needed}]",
            )
    recipe, settings = place.settings.recipe(name), place.settings.model_dump(mode="json", exclude=set(_FREE))
    facts: dict[str, object] = {"network": name, **recipe.model_dump(mode="json"), **settings}
    facts.update({needed: sha256_file(average_path(place.out_dir, needed)) for needed in NEEDED.get(name, ())})
    found = read_training(place.out_dir, name)
    if found.get("step", 0) < recipe.steps:
        return facts, False
    check_fingerprint(facts, found["facts"], average_path(place.out_dir, name))
    return facts, True


def _parts(name: NetworkName, place: Workplace) -> tuple[nn.Module, Objective]:
    """Return a network before training and its objective, the same on every rank."""
    seed = place.settings.recipe(name).seed
    tokenizer = on_main(place.tokenizer)
    networks = build_networks(seed, len(tokenizer))
    if name == "vae":
        return networks.vae, vae_loss
    if name == "clip":
        torch.manual_seed(seed)  # the classifiers' weights
        return ClipWithClassifiers(networks.clip), ClipObjective(tokenizer, place.gather)
    if name == "judges":
        if place.world.size > 1:
            make_batch_norms_global(networks.judges)
        return networks.judges, judges_loss
    return networks.unet, _unet_objective(networks, tokenizer, place)


def _unet_objective(networks: Networks, tokenizer: Any, place: Workplace) -> UNetObjective:
    """Return the UNet's objective on the finished VAE and text encoder."""
    classified, settings = ClipWithClassifiers(networks.clip), place.settings
    load_average(networks.vae, place.out_dir, "vae")
    load_average(classified, place.out_dir, "clip")
    factor = on_main(lambda: set_scaling_factor(networks.vae, settings.vae.seed, settings.scaling_pictures))
    networks.vae.register_to_config(scaling_factor=factor)
    device, text_encoder = rank_device(place.world), text_encoder_of(classified.clip)
    return UNetObjective(networks.vae.to(device), text_encoder.to(device), tokenizer)


def trained_networks(place: Workplace) -> tuple[Networks, dict[NetworkName, int]]:
    """Return all networks with their newest averaged weights, and name -> steps trained.

    Raises:
        CheckpointError: one has no checkpoint yet.
    """
    networks = build_networks(0, len(place.tokenizer()))
    classified = ClipWithClassifiers(networks.clip)
    parts: dict[NetworkName, nn.Module] = {
        "vae": networks.vae,
        "clip": classified,
        "judges": networks.judges,
        "unet": networks.unet,
    }
    steps = {name: load_average(part, place.out_dir, name) for name, part in parts.items()}
    set_scaling_factor(networks.vae, place.settings.vae.seed, place.settings.scaling_pictures)
    return networks, steps
