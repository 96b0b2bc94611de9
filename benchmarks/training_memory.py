"""Memory of a training per GPU and ZeRO stage, counted by ``launch.supervise.memory`` at published size.

python -m benchmarks.training_memory            the table of docs/training.md
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from launch.supervise.memory import HEADROOM, count, peak_bytes
from nd_dist.config import DecoderConfig, TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of

VOXELS = {1: 15724, 2: 14278, 3: 15226, 4: 13153, 5: 13039, 6: 17907, 7: 12682, 8: 14386}
SHAPES: dict[str, tuple[int, ...]] = {
    "c": (77, 768), "z": (4, 64, 64), **{f"g{k:02d}": (50, 768) for k in (2, 4, 6, 8, 10, 12)},
}  # fmt: skip
GPUS_GB = (16, 24, 40, 80, 141)


def full_size(targets: tuple[str, ...], heads: str, hidden_size: int, prior_depth: int = 6) -> Decoder:
    """Return the decoder of stage 1 (seven subjects) at published size on the meta device."""
    config = DecoderConfig(heads=heads, hidden_size=hidden_size, prior_depth=prior_depth)  # type: ignore[arg-type]
    with torch.device("meta"):
        subjects = {subject: count for subject, count in VOXELS.items() if subject != 1}
        decoder = Decoder(config, subjects, [TargetSpec(name, role_of(name), SHAPES[name]) for name in targets])
    # buffers too: once transformers has loaded a model, its torch.linspace ignores the device
    return decoder.to("meta")


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
                for ranks in (1, 2, 8):
                    training = TrainingConfig(shard_layers=shard_layers)
                    counts = count(full_size(targets, heads, hidden_size), training, 42, ranks)
                    cells = [peak_bytes(counts, ranks, stage, True) for stage in (1, 2, 3)]
                    text = " | ".join(f"{cell / 1e9:.1f}, {smallest_gpu(cell)}" for cell in cells)
                    divided = f"{counts.deepspeed / 1e6:.0f}, {counts.divided / 1e6:.0f}"
                    print(f"{name}, {hidden_size} | {divided} | {ranks} | {text}", flush=True)


if __name__ == "__main__":
    main()
