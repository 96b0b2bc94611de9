"""Decoders side by side on the phantom: trains and evaluates each over several seeds, and prints one table.

    python -m tools.bakeoff bakeoff --seeds 0 1 2 --ranks 2          # recipe demo; the same command goes on
    python -m tools.bakeoff bakeoff --recipe demo_full

A seed is a world of its own: pictures, brains, noise and the decoder's weights. Every decoder is evaluated at the
recipe's guidance point; nothing is chosen on test pictures. Cells are means over seeds, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launch.recipe import load_recipe
from nd_dist.checkpoint import read_tensors
from nd_dist.events import events_path, read_events
from nd_dist.files import read_json
from nd_dist.metrics.table import metric_of
from shards import ShardReader

DECODERS = {
    "ridge regression": ["decoder.kind=ridge"],
    "NeuralDiffuser, random start": [],
    "NeuralDiffuser, ridge start": ["training.start=ridge", "training.learning_rate=5e-4"],
    "NeuralDiffuser with a prior": ["decoder.prior_depth=2"],
    "NeuralDiffuser, repaired mixer": ["decoder.mixer=single_residual"],
    "brain tokens": ["decoder.kind=tokens", "decoder.hidden_size=512", "decoder.num_blocks=2"],
}
NEAREST = "nearest training picture"
SECONDS = "seconds"
TARGETS = ("c", "z", "g02", "g12")
METRICS = ("kind", "kind_seen", "pixcorr", "ssim", "mixer", "image_retrieval", "brain_retrieval", "repeat_pixcorr")


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("words", nargs="*", help="key=value overrides of every run")
    given = parser.parse_intermixed_args()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in given.seeds:
        folder = given.folder / f"seed-{seed}"
        words = [f"nsd_root={folder / 'nsd'}", f"shards_dir={folder / 'shards'}", f"seed={seed}", *given.words]
        nd("phantom", str(folder / "nsd"), "--recipe", given.recipe, *words)
        nd("pack", given.recipe, *words, "--ranks", str(given.ranks))
        for name, settings in DECODERS.items():
            run = folder / name.replace(" ", "-").replace(",", "")
            own = [*words, *settings, f"run_dir={run}"]
            for command in ("train", "evaluate"):
                nd(command, given.recipe, *own, "--ranks", str(given.ranks))
            found.setdefault(name, []).append(dict(numbers(run, folder / "shards")))
        found.setdefault(NEAREST, []).append(control(folder / "ridge-regression", "nearest"))
    print(table(found))  # noqa: T201


def nd(*words: str) -> None:
    """Run a command of the product; what is finished is not made again."""
    subprocess.run([sys.executable, "-m", "launch.cli", *words], check=True)


def numbers(run: Path, shards: Path) -> Iterator[tuple[str, float]]:
    """Yield correlation of decoded targets, metrics of the recipe's point, and seconds of training."""
    config, metrics = load_recipe(str(run / "config.yaml")), read_json(run / "metrics.json")
    reader, subject = ShardReader(shards), config.training.target_subject
    ids, decoded = reader.images(subject, "test"), run / "evaluation" / "decoded" / f"subj{subject:02d}"
    batches = [read_tensors(path) for path in sorted(decoded.glob("images-*/predictions.safetensors"))]
    for target in TARGETS:
        predicted = np.concatenate([batch[target].numpy() for batch in batches])
        yield target, correlation(predicted, reader.targets(target, ids))
    point = (config.sampler.kappa, config.sampler.eta)
    (shown,) = [p["metrics"] for p in metrics["points"] if (p["kappa"], p["eta"]) == point]
    yield from ((name, shown[name]["value"]) for name in METRICS if name in shown)
    events = list(read_events(events_path(run, 0)))
    times = [event["time"] for event in events if event["event"] in ("stage_start", "stage_done")]
    yield SECONDS, max(times) - min(times)


def control(run: Path, name: str) -> dict[str, float]:
    """Return the metrics of a control."""
    (found,) = [entry["metrics"] for entry in read_json(run / "metrics.json")["controls"] if entry["control"] == name]
    return {metric: found[metric]["value"] for metric in METRICS if metric in found}


def correlation(predicted: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> float:
    """Return the mean correlation of a picture's target with its prediction, both centred over pictures (N, ...)."""
    rows = [values.reshape(len(values), -1).astype(np.float64) for values in (predicted, true)]
    first, second = (each - each.mean(axis=0) for each in rows)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.mean((first * second).sum(axis=1) / norms))


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Return Markdown: a decoder a line, mean over seeds (smallest to largest)."""
    columns = [*TARGETS, *METRICS, SECONDS]
    heads = [f"r of {name}" for name in TARGETS] + [metric_of(name).label for name in METRICS] + ["training, s"]
    lines = [f"| decoder | {' | '.join(heads)} |", "|---" * (1 + len(columns)) + "|"]
    for name, seeds in found.items():
        cells = [[seed[column] for seed in seeds if column in seed] for column in columns]
        lines.append(f"| {name} | {' | '.join(cell(values) for values in cells)} |")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    """Return a mean with its range over seeds; nothing where nothing was measured."""
    if not values:
        return ""
    digits = 0 if min(values) > 1 else 3
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
