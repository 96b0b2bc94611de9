"""Run every benchmark at the size that fits a laptop: ``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

names = sorted(
    module.name
    for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    if not module.ispkg and module.name[0] != "_"
)
wanted = sys.argv[1:] or names
if unknown := sorted(set(wanted) - set(names)):
    sys.exit(f"unknown benchmarks {unknown}; there are {names}")
for name in wanted:
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
