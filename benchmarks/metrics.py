"""All metrics of many pairs: this evaluator's path against a plain loop in the field's style, with the same judges.

    python -m benchmarks.metrics                          1,000 pairs of 256 pixels, the phantom's judges
    python -m benchmarks.metrics --pairs 200 --judges DIR the field's judges (extra `judges`), weights in DIR

The plain loop does what MindEye2's notebook does: all pictures in memory as floats, every metric over all of them,
one judge after the other, scikit-image's SSIM, numpy's correlation matrix. Ours reads PNG files, judges picture by
picture, keeps features on disk and scores in blocks; it also makes the bootstrap intervals, which the plain loop does
not have. Each side runs in a process of its own, in turn, so that its peak memory is its own; the numbers must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nd_dist.evaluation.judging import Judges, judge_image, judge_original
from nd_dist.evaluation.layout import PICTURE
from nd_dist.evaluation.records import publish, read_png, write_png, write_staged
from nd_dist.evaluation.score import (
    JudgedImages,
    Statistics,
    judge_scores,
    resampled_arrays,
    score_images,
    scored_arrays,
)
from nd_dist.files import sha256_file
from nd_dist.frozen.field_judges import load_field_judges
from nd_dist.frozen.folders import resolve_folder
from nd_dist.frozen.judges import Judge, load_phantom_judges
from nd_dist.frozen.resize import pictures_to_pixels
from nd_dist.metrics.protocols import protocol_named

PROTOCOL = "mindeye2"
TOLERANCE = 1e-4


def write_pairs(folder: Path, num_pairs: int, size: int) -> None:
    """Write made-up pairs as an evaluation leaves them: a blurred, noisy copy stands for each reconstruction."""
    rng = np.random.default_rng(0)
    for pair in range(num_pairs):
        coarse = torch.from_numpy(rng.uniform(0, 1, (1, 3, 8, 8)))
        smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")[0].numpy().transpose(1, 2, 0)
        original = np.clip(255 * (smooth + 0.05 * rng.standard_normal(smooth.shape)), 0, 255).astype(np.uint8)
        recon = np.clip(
            original + 60.0 * rng.standard_normal((1, 1, 3)) + 20 * rng.standard_normal(smooth.shape), 0, 255
        )
        (folder / "originals" / str(pair)).mkdir(parents=True)
        write_png(folder / "originals" / str(pair) / PICTURE, original)
        (folder / "recons" / str(pair)).mkdir(parents=True)
        file = folder / "recons" / str(pair) / "repeat-0.png"
        write_png(file, recon.astype(np.uint8))
        record = {"fingerprint": "bench", "files": {file.name: sha256_file(file)}}
        (file.parent / "record.json").write_text(json.dumps(record))


def load_judges(folder: Path | None) -> list[Judge]:
    """Return the judges that both sides use."""
    if folder is not None:
        return load_field_judges(folder, protocol_named(PROTOCOL).judges, torch.device("cpu"))
    return load_phantom_judges(resolve_folder("phantom/stable-diffusion").parent / "judges", torch.device("cpu"))


def ours(folder: Path, num_pairs: int, judges: Sequence[Judge]) -> dict[str, float]:
    """Judge and score as a rank of `nd evaluate` does."""
    protocol, statistics = protocol_named(PROTOCOL), Statistics(1000, 0)
    originals = [folder / "originals" / str(pair) for pair in range(num_pairs)]
    judged_originals = [folder / "judged" / "originals" / str(pair) for pair in range(num_pairs)]
    judged = [folder / "judged" / "recons" / str(pair) for pair in range(num_pairs)]
    for pair in range(num_pairs):
        judge_original(judged_originals[pair], "bench", originals[pair], protocol, judges)
        recons = folder / "recons" / str(pair)
        judge_image(judged[pair], "bench", recons, originals[pair], protocol, Judges(judges))
    arrays = score_images(JudgedImages(judged, judged_originals, 1), judge_scores(judges), protocol)
    scored = scored_arrays(arrays, 1, statistics)
    kept = {**arrays, **resampled_arrays(scored)}
    publish(folder / "score", "bench", {}, lambda staging: write_staged(staging / "arrays.safetensors", kept))
    return {name: item.value for name, item in scored.items()}


def plain(folder: Path, num_pairs: int, judges: Sequence[Judge]) -> dict[str, float]:
    """Compute the same numbers metric by metric over all pictures in memory."""
    from scipy.spatial.distance import correlation
    from skimage.color import rgb2gray
    from skimage.metrics import structural_similarity

    protocol = protocol_named(PROTOCOL)
    files = {"originals": PICTURE, "recons": "repeat-0.png"}
    pixels = [
        protocol.recon_first(
            pictures_to_pixels(np.stack([read_png(folder / side / str(pair) / file) for pair in range(num_pairs)]))
        )
        for side, file in files.items()
    ]
    originals, recons = pixels
    resized = [protocol.recon_pixels(side) for side in (recons, originals)]
    flat = [side.reshape(num_pairs, -1).numpy() for side in resized]
    metrics = {"pixcorr": np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*flat, strict=True)])}
    grey = [rgb2gray(side.permute(0, 2, 3, 1).numpy()) for side in resized]
    metrics["ssim"] = np.mean(
        [
            structural_similarity(*pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
            for pair in zip(*grey, strict=True)
        ]
    )
    for judge in judges:
        real, made = (judge.features(side).numpy() for side in (originals, recons))
        if judge.score == "distance":
            metrics[judge.name] = np.mean([correlation(*pair) for pair in zip(real, made, strict=True)])
            continue
        r = np.corrcoef(real, made)[:num_pairs, num_pairs:]
        metrics[judge.name] = np.mean((r < np.diag(r)).sum(0)) / (num_pairs - 1)
    return {name: float(value) for name, value in metrics.items()}


def run_side(arguments: argparse.Namespace) -> None:
    """Run one side in this process and print what it took as one line of JSON."""
    torch.set_num_threads(arguments.threads)
    judges = load_judges(arguments.judges)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = {"ours": ours, "plain": plain}[arguments.side](arguments.folder, arguments.pairs, judges)
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**took, "peak_mib": peak / 1024, "loaded_mib": before / 1024, "metrics": metrics}))


def measure(side: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what one side took, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.metrics", "--side", side, "--folder", str(folder)]
    words += ["--pairs", str(arguments.pairs), "--threads", str(arguments.threads)]
    words += ["--judges", str(arguments.judges)] if arguments.judges else []
    env = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    result = subprocess.run(words, env=env, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256, help="pixels of a picture's side on disk")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--judges", type=Path, help="folder of the field's judges (default: the phantom's)")
    parser.add_argument("--side", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure both sides and print images a second, peak memory and the ratios."""
    arguments = parse()
    if arguments.side:
        run_side(arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pairs(folder, arguments.pairs, arguments.size)
        found = {side: measure(side, folder, arguments) for side in ("ours", "plain")}
    load = os.getloadavg()[0]
    print(f"{arguments.pairs} pairs of {arguments.size} pixels, {arguments.threads} thread(s), load {load:.1f}")
    print(f"{'':8}{'images/s':>10}{'per CPU s':>11}{'peak MiB':>10}{'above load':>12}")
    for side, item in found.items():
        rate, cpu_rate = (arguments.pairs / item[key] for key in ("wall_s", "cpu_s"))
        above = item["peak_mib"] - item["loaded_mib"]
        print(f"{side:8}{rate:10.2f}{cpu_rate:11.2f}{item['peak_mib']:10.0f}{above:12.0f}")
    mine, theirs = found["ours"], found["plain"]
    print(
        f"ours / plain: {theirs['wall_s'] / mine['wall_s']:.2f}x images/s, {theirs['cpu_s'] / mine['cpu_s']:.2f}x per "
        f"CPU second, {mine['peak_mib'] / theirs['peak_mib']:.3f} of the peak memory"
    )
    worst = max(abs(mine["metrics"][name] - value) for name, value in theirs["metrics"].items())
    print(f"largest difference of a metric: {worst:.1e}")
    if worst > TOLERANCE:
        sys.exit("the two sides do not compute the same numbers")


if __name__ == "__main__":
    main()
