"""Memory of a training per GPU and ZeRO stage: counted on the real modules at full size, without allocating them.

    python -m benchmarks.training_memory            the table of docs/training.md

Weights, gradients and optimizer state follow from parameter counts: a layer whose columns are divided among the ranks
keeps float32 weights, gradients and two moments of its share; DeepSpeed's parameters depend on stage and precision
(``kept_bytes``, ``peak_bytes``; a test holds the former against a real DeepSpeed training). Activations are counted by
running the real objective on the meta device with the published batch and adding up what autograd saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nd_dist.config import DecoderConfig, TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from nd_dist.training.engine.sharded import shard_large_layers
from nd_dist.training.objective.objectives import Objective, StepInputs
from nd_dist.training.parameters import REDUCE_BUCKET
from nd_dist.world import World

VOXELS = {1: 15724, 2: 14278, 3: 15226, 4: 13153, 5: 13039, 6: 17907, 7: 12682, 8: 14386}
SHAPES: dict[str, tuple[int, ...]] = {
    "c": (77, 768), "z": (4, 64, 64), **{f"g{k:02d}": (50, 768) for k in (2, 4, 6, 8, 10, 12)},
}  # fmt: skip
GPUS_GB = (16, 24, 40, 80, 141)
HEADROOM = 1.1
"""Allocator fragments, libraries' workspaces: a guess, not measured (no GPU was at hand)."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a training.

    Args:
        deepspeed: Those that DeepSpeed holds.
        divided: Those of layers divided among the ranks (all of them, over all ranks).
        largest_divided: Those of the largest such layer.
        activation_values: Numbers that autograd saves for a rank's batch of the given rows.
    """

    deepspeed: int
    divided: int
    largest_divided: int
    activation_values: int


def full_size(targets: tuple[str, ...], heads: str, hidden_size: int, prior_depth: int = 6) -> Decoder:
    """Return the decoder of stage 1 (seven subjects) at published size on the meta device."""
    config = DecoderConfig(heads=heads, hidden_size=hidden_size, prior_depth=prior_depth)  # type: ignore[arg-type]
    with torch.device("meta"):
        subjects = {subject: count for subject, count in VOXELS.items() if subject != 1}
        decoder = Decoder(config, subjects, [TargetSpec(name, role_of(name), SHAPES[name]) for name in targets])
    # buffers too: once transformers has loaded a model, its torch.linspace ignores the device
    return decoder.to("meta")


def count(decoder: Decoder, rows: int, rows_per_rank: int, shard_layers: bool = True) -> Counts:
    """Return the counts of a decoder on the meta device; its large layers are replaced.

    Args:
        decoder: On the meta device.
        rows: Rows of the global batch, which decide which layers are divided.
        rows_per_rank: Rows whose activations are counted.
        shard_layers: As in the recipe.
    """
    activations = _activation_values(decoder, rows_per_rank)
    layers = {}
    if shard_layers:
        per_subject = rows // len(decoder.num_voxels)
        layers = shard_large_layers(decoder, rows, per_subject, World(), torch.device("meta"))
    sizes = [sum(p.numel() for p in layer.own.values()) for layer in layers.values()]
    deepspeed = sum(p.numel() for p in decoder.parameters())
    return Counts(deepspeed, sum(sizes), max(sizes, default=0), activations)


def _activation_values(decoder: Decoder, rows: int) -> int:
    """Return how many numbers autograd saves in a forward pass, weights left out."""
    per_subject = rows // len(decoder.num_voxels)
    meta = torch.device("meta")
    voxels = {s: torch.empty(per_subject, count, device=meta) for s, count in decoder.num_voxels.items()}
    total = per_subject * len(voxels)
    targets = {spec.name: torch.empty(total, *spec.shape, device=meta) for spec in decoder.targets}
    inputs = StepInputs(0, voxels, targets, torch.empty(total, dtype=torch.int64, device=meta))
    # SoftCLIP from the first step: MixCo's shares need real numbers
    objective = Objective(decoder, TrainingConfig(mixco_fraction=0.0), total_steps=2, seed=0)
    weights = {id(parameter) for parameter in decoder.parameters()}
    seen: set[int] = set()
    saved = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        key = id(tensor)
        if id(tensor._base if tensor._base is not None else tensor) not in weights and key not in seen:
            seen.add(key)
            kept.append(tensor)  # ids stay unique as long as the tensors live
            saved += tensor.numel()
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(inputs, 1)
    return saved


def kept_bytes(counts: Counts, ranks: int, zero_stage: int, is_half: bool) -> float:
    """Return the bytes of weights, optimizer state and kept gradients per rank between steps."""
    divided = 16 * counts.divided / ranks  # their gradients keep their memory
    p, part = counts.deepspeed, counts.deepspeed / ranks
    weights = 2 if is_half else 4
    if zero_stage == 0:
        return divided + 12 * p
    if zero_stage == 3:
        return divided + (2 * weights + 12) * part + weights * REDUCE_BUCKET  # gradients keep their memory
    return divided + weights * p + 12 * part


def peak_bytes(counts: Counts, ranks: int, zero_stage: int, is_half: bool) -> float:
    """Return the bytes per rank when the optimizer steps or the backward pass begins, whichever is more."""
    width = 2 if is_half else 4
    p, part = counts.deepspeed, counts.deepspeed / ranks
    gradients = {0: width * p, 1: width * p, 2: width * part, 3: 0.0}[zero_stage]
    stepping = gradients + (4 * part if zero_stage else 0)  # ZeRO copies its part to float32
    passing = width * counts.activation_values + gradients
    casting = 2 * counts.largest_divided / ranks if is_half else 0
    return kept_bytes(counts, ranks, zero_stage, is_half) + max(stepping, passing + casting)


def smallest_gpu(num_bytes: float) -> str:
    """Return the smallest usual GPU memory that holds so much with some room."""
    fitting = [size for size in GPUS_GB if num_bytes * HEADROOM <= size * 1e9]
    return str(fitting[0]) if fitting else "none"


TRAININGS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "single c": (("c",), "single"),
    "single g": (("g02",), "single"),
    "single z": (("z",), "single"),
    "joint, all 8": (tuple(SHAPES), "joint"),
}


def main() -> None:
    """Print the table: stage 1 at the published batch of 42, bfloat16."""
    print(
        "training, h | parameters (M): DeepSpeed's, divided | ranks | "
        + " | ".join(f"ZeRO {s}: GB, GPU" for s in (1, 2, 3))
    )
    for hidden_size in (1024, 4096):
        for name, (targets, heads) in TRAININGS.items():
            for shard_layers in (True, False):
                for ranks in (1, 2, 6):
                    counts = count(full_size(targets, heads, hidden_size), 42, 42 // ranks // 7 * 7, shard_layers)
                    cells = [peak_bytes(counts, ranks, stage, True) for stage in (1, 2, 3)]
                    text = " | ".join(f"{cell / 1e9:.1f}, {smallest_gpu(cell)}" for cell in cells)
                    divided = f"{counts.deepspeed / 1e6:.0f}, {counts.divided / 1e6:.0f}"
                    print(f"{name}, {hidden_size} | {divided} | {ranks} | {text}", flush=True)


if __name__ == "__main__":
    main()
