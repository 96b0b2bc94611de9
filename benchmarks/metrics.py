"""All metrics of many pairs: this evaluator's path against a plain loop in the field's style, with the same judges.

    python -m benchmarks.metrics                          1,000 pairs of 256 pixels, the phantom's judges, one thread
    python -m benchmarks.metrics --cores 2                the plain loop with two threads, ours on two ranks
    python -m benchmarks.metrics --pairs 200 --judges DIR the field's judges (extra `judges`), weights in DIR

The plain loop does what MindEye2's notebook does: all pictures in memory as floats, every metric over all of them,
one judge after the other in one batch, a network that feeds two columns run for each, pictures brought to 425 pixels
once for PixCorr and again for SSIM, scikit-image's SSIM, numpy's correlation matrix of all with all. Ours reads PNG
files, judges in small fixed batches, keeps features on disk and scores in blocks; it also makes the intervals by
bootstrap, which the plain loop does not have. Each side runs in processes of its own, in turn, so that its peak memory
is its own; the numbers must agree. The floor is what nobody gets below with these judges: every picture once through
every network, in large batches, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.support.together import answer, run_together, wait_for_start
from nd_dist.evaluation.points.layout import PICTURE
from nd_dist.evaluation.scoring.judging import Judges, Verdict, judge_all
from nd_dist.evaluation.scoring.score import JudgedImages, JudgedSheets, score_images
from nd_dist.fanout.leases import LeasePool
from nd_dist.fanout.results import has_result, publish, read_png, read_record, write_png, write_staged
from nd_dist.fanout.tasks import Steps, Task, work_off
from nd_dist.files import sha256_file
from nd_dist.frozen.field_judges import load_field_judges
from nd_dist.frozen.folders import resolve_folder
from nd_dist.frozen.judges import Judge, load_phantom_judges
from nd_dist.metrics.protocols import protocol_named
from nd_dist.metrics.statistics.scores import Statistics, kept_arrays, scored_arrays
from nd_dist.pixels import pictures_to_pixels

PROTOCOL = protocol_named("mindeye2")
TOLERANCE = 1e-4
UNIT_IMAGES = 16
FLOOR_BATCH = 32
PRINT = "bench"


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
        record = {"fingerprint": PRINT, "files": {file.name: sha256_file(file)}}
        (file.parent / "record.json").write_text(json.dumps(record))


def load_judges(folder: Path | None) -> list[Judge]:
    """Return the judges that both sides use."""
    if folder is not None:
        return load_field_judges(folder, PROTOCOL.judges, torch.device("cpu"))
    return load_phantom_judges(resolve_folder("phantom/stable-diffusion").parent / "judges", torch.device("cpu"))


def ours(folder: Path, num_pairs: int, judges: Sequence[Judge], rank: int, size: int) -> dict[str, float]:
    """Judge and score together with the other ranks, as those of `nd evaluate` do."""
    units = [range(start, min(num_pairs, start + UNIT_IMAGES)) for start in range(0, num_pairs, UNIT_IMAGES)]
    for side in ("originals", "recons"):
        tasks = [judging_task(folder, side, unit, judges) for unit in units]
        work_off(tasks, LeasePool(folder / "leases" / side, rank), rank, size)
    score = folder / "score"

    def work() -> Steps:
        sheets = [JudgedSheets([sheet(folder, side, unit) for unit in units]) for side in ("recons", "originals")]
        judged = JudgedImages(sheets[0], sheets[1], range(num_pairs), 1)
        arrays = dict(score_images(judged, {judge.name: judge.score for judge in judges}, PROTOCOL))
        yield
        scored = scored_arrays(arrays, 1, PROTOCOL.distractors, Statistics(1000))
        kept = {**arrays, **kept_arrays(scored)}
        facts = {"metrics": {name: item.value for name, item in scored.items()}}
        publish(score, PRINT, facts, lambda staging: write_staged(staging / "arrays.safetensors", kept))

    tasks = [Task("score", lambda: has_result(score, PRINT), work)]
    work_off(tasks, LeasePool(folder / "leases" / "score", rank), rank, size)
    return dict(read_record(score)["metrics"])


def sheet(folder: Path, side: str, unit: range) -> Path:
    """Return where the judgement of some pairs lies."""
    return folder / "judged" / side / str(unit.start)


def judging_task(folder: Path, side: str, unit: range, judges: Sequence[Judge]) -> Task:
    """Return the task that judges the originals or the reconstructions of some pairs."""
    place = sheet(folder, side, unit)
    originals, recons = ({pair: folder / each / str(pair) for pair in unit} for each in ("originals", "recons"))
    verdict = Verdict(place, PRINT, originals, recons if side == "recons" else {})
    return Task(
        f"{side}_{unit.start:05d}",
        lambda: has_result(place, PRINT),
        lambda: judge_all([verdict], PROTOCOL, Judges(judges)),
    )


def read_sides(folder: Path, num_pairs: int) -> list[Tensor]:
    """Return all originals and all reconstructions as floats after the protocol's first resize."""
    files = {"originals": PICTURE, "recons": "repeat-0.png"}
    return [
        PROTOCOL.recon_first(
            pictures_to_pixels(np.stack([read_png(folder / side / str(pair) / file) for pair in range(num_pairs)]))
        )
        for side, file in files.items()
    ]


def plain(folder: Path, num_pairs: int, judges: Sequence[Judge], _rank: int, _size: int) -> dict[str, float]:
    """Compute the same numbers metric by metric over all pictures in memory."""
    from scipy.spatial.distance import correlation
    from skimage.color import rgb2gray
    from skimage.metrics import structural_similarity

    originals, recons = read_sides(folder, num_pairs)
    flat = [PROTOCOL.recon_pixels(side).reshape(num_pairs, -1).numpy() for side in (recons, originals)]
    metrics = {"pixcorr": np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*flat, strict=True)])}
    grey = [rgb2gray(PROTOCOL.recon_pixels(side).permute(0, 2, 3, 1).numpy()) for side in (recons, originals)]
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


def floor(folder: Path, num_pairs: int, judges: Sequence[Judge], _rank: int, _size: int) -> dict[str, float]:
    """Run every picture once through every network, and do nothing with the features."""
    for side in read_sides(folder, num_pairs):
        for first in range(0, num_pairs, FLOOR_BATCH):
            pixels_BCHW = side[first : first + FLOOR_BATCH]
            for judge in judges:
                judge.features(pixels_BCHW)
    return {}


def run_side(arguments: argparse.Namespace) -> None:
    """Run one side in this process and print what it took as one line of JSON."""
    torch.set_num_threads(arguments.threads)
    judges = load_judges(arguments.judges)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wait_for_start()
    cpu = time.process_time()
    side = {"ours": ours, "plain": plain, "floor": floor}[arguments.side]
    metrics = side(arguments.folder, arguments.pairs, judges, arguments.rank, arguments.size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = {"cpu_s": time.process_time() - cpu, "peak_mib": peak / 1024, "loaded_mib": before / 1024}
    answer({**took, "metrics": metrics})


def measure(side: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what one side took: ours on as many ranks of one thread as there are cores, others in one process."""
    ranks = arguments.cores if side == "ours" else 1
    threads = arguments.cores // ranks
    words = [sys.executable, "-m", "benchmarks.metrics", "--side", side, "--folder", str(folder)]
    words += ["--pairs", str(arguments.pairs), "--threads", str(threads), "--size", str(ranks)]
    words += ["--judges", str(arguments.judges)] if arguments.judges else []
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    wall_s, answers = run_together([[*words, "--rank", str(rank)] for rank in range(ranks)], env)
    sums = {key: sum(item[key] for item in answers) for key in ("cpu_s", "peak_mib", "loaded_mib")}
    return {"wall_s": wall_s, **sums, "metrics": answers[0]["metrics"]}


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--pixels", type=int, default=256, help="of a picture's side on disk")
    parser.add_argument("--cores", type=int, default=1, help="threads of the plain loop, ranks of ours")
    parser.add_argument("--judges", type=Path, help="folder of the field's judges (default: the phantom's)")
    parser.add_argument("--side", choices=["ours", "plain", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    for name in ("--rank", "--size", "--threads"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure all sides and print images a second, peak memory and the ratios."""
    arguments = parse()
    if arguments.side:
        run_side(arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pairs(folder, arguments.pairs, arguments.pixels)
        found = {side: measure(side, folder, arguments) for side in ("ours", "plain", "floor")}
    load = os.getloadavg()[0]
    print(f"{arguments.pairs} pairs of {arguments.pixels} pixels, {arguments.cores} core(s), load {load:.1f}")
    print(f"{'':8}{'images/s':>10}{'per CPU s':>11}{'peak MiB':>10}{'above load':>12}")
    for side, item in found.items():
        rate, cpu_rate = (arguments.pairs / item[key] for key in ("wall_s", "cpu_s"))
        above = item["peak_mib"] - item["loaded_mib"]
        print(f"{side:8}{rate:10.2f}{cpu_rate:11.2f}{item['peak_mib']:10.0f}{above:12.0f}")
    mine, theirs, least = found["ours"], found["plain"], found["floor"]
    print(
        f"ours / plain: {theirs['wall_s'] / mine['wall_s']:.2f}x images/s, {theirs['cpu_s'] / mine['cpu_s']:.2f}x per "
        f"CPU second, {mine['peak_mib'] / theirs['peak_mib']:.3f} of the peak memory"
    )
    print(
        f"the floor is {100 * least['cpu_s'] / mine['cpu_s']:.0f} % of our CPU seconds; at the floor it would be "
        f"{theirs['cpu_s'] / least['cpu_s']:.2f}x per CPU second"
    )
    worst = max(abs(mine["metrics"][name] - value) for name, value in theirs["metrics"].items())
    print(f"largest difference of a metric: {worst:.1e}")
    if worst > TOLERANCE:
        sys.exit("the two sides do not compute the same numbers")


if __name__ == "__main__":
    main()
