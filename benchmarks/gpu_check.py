"""Everything that this project claims of a GPU, checked and timed on a real one: one command, under eight minutes.

    python -m benchmarks.gpu_check --out DIR                            one H100 or the like; needs no network
    python -m benchmarks.gpu_check --out DIR --size toy --device cpu    whether the check itself works

Every part is a process of its own with a limit of its own; each gives one line of JSON, which is printed and kept in
DIR/gpu_check.jsonl. Figures stand beside what the pretended GPU predicts (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.support import gpu_networks, gpu_programs
from benchmarks.support.gpu_parts import Setting

Part = Callable[[Setting], dict[str, Any]]  # Any: JSON

PARTS: dict[str, tuple[Part, int]] = {
    "machine": (gpu_networks.machine, 40),
    "correctness": (gpu_networks.correctness, 80),
    "engine": (gpu_programs.engine, 120),
    "training": (gpu_programs.training, 180),
    "sampler": (gpu_networks.sampler, 150),
    "extraction and decoding": (gpu_networks.extraction_and_decoding, 90),
    "evaluation": (gpu_programs.evaluation, 60),
    "memory": (gpu_networks.memory, 60),
}
"""Part -> what it does, and the seconds after which it is ended on a GPU."""
CPU_PATIENCE = 30  # times the limit, where several programs share a few cores


def run_part(name: str, setting: Setting) -> dict[str, Any]:
    """Run a part in a process of its own; return its line."""
    limit_s = PARTS[name][1] * (CPU_PATIENCE if setting.device == "cpu" else 1)
    words = ["--part", name, "--size", setting.size, "--device", setting.device, "--out", str(setting.folder)]
    environ = {**os.environ, **({"OMP_NUM_THREADS": "1"} if setting.device == "cpu" else {})}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_check", *words],
            capture_output=True,
            text=True,
            env=environ,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"part": name, "ok": False, "error": f"not done after {limit_s} s"}
    line: dict[str, Any] = {"part": name, "ok": done.returncode == 0}
    if done.returncode == 0:
        line |= json.loads(done.stdout.splitlines()[-1])
        line["ok"] = not line.get("wrong")
    else:
        line["error"] = (done.stderr or done.stdout)[-1500:]
    return {**line, "seconds": round(time.monotonic() - began, 1)}


def main(words: list[str] | None = None) -> int:
    """Run the parts; return 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_check.jsonl")
    parser.add_argument("--size", choices=("toy", "full"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.part:
        print(json.dumps(PARTS[options.part][0](Setting(options.size, options.device, options.out))))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    are_right = []
    with open(options.out / "gpu_check.jsonl", "w", encoding="utf-8") as lines:
        for name in options.only:
            with tempfile.TemporaryDirectory(prefix="nd-gpu-check-") as folder:
                found = run_part(name, Setting(options.size, options.device, Path(folder)))
            lines.write(json.dumps(found) + "\n")
            lines.flush()
            print(json.dumps(found), flush=True)
            are_right.append(bool(found["ok"]))
    return 0 if all(are_right) else 1


if __name__ == "__main__":
    sys.exit(main())
