"""Targets per second: captions, VAE latents and guidance features of pictures, by batch size and precision.

    python -m benchmarks.extraction                              toy width on this machine's CPU
    python -m benchmarks.extraction --device cuda --size sd14 --dtype bfloat16 float32

Random weights; the text encoder is left out (one pass of a small network per caption).
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.support.networks import WIDTHS, make_networks
from benchmarks.support.samples import Networks, timed
from nd_dist.pixels import pictures_to_pixels, resize_lanczos

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.no_grad()
def extract(networks: Networks, pictures_BHWC: npt.NDArray[np.uint8], batch: int) -> torch.Tensor:
    """Extract latents and guidance features of all pictures, ``batch`` at a time; return the latents."""
    sd, clip = networks
    made = []
    for start in range(0, len(pictures_BHWC), batch):
        rows = pictures_BHWC[start : start + batch]
        made.append(sd.encode_image(pictures_to_pixels(resize_lanczos(rows, sd.picture_size)) * 2.0 - 1.0))
        clip.features(pictures_to_pixels(rows))
    return torch.cat(made)


def main(words: list[str] | None = None) -> None:
    """Print a line per precision and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(WIDTHS), default="toy")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    pictures = np.random.default_rng(0).integers(0, 256, (arguments.pictures, 425, 425, 3), dtype=np.uint8)
    for dtype in arguments.dtype:
        networks = make_networks(WIDTHS[arguments.size], arguments.device, DTYPES[dtype])
        for batch in arguments.batch:
            run = partial(extract, networks, pictures, batch)
            run()
            times = [timed(run, arguments.device)[1] for _ in range(arguments.rounds)]
            wall, cpu = (statistics.median(getattr(time, kind) for time in times) for kind in ("wall_s", "cpu_s"))
            print(
                f"{arguments.size} {dtype}, batch {batch:3d}: {len(pictures) / wall:8.1f} pictures/s"
                f" ({len(pictures) / cpu:.1f} per second of processor)",
                flush=True,
            )


if __name__ == "__main__":
    main()
