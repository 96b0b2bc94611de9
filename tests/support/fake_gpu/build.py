"""Compiles the library that lets a CPU build of torch hold tensors of device ``cuda``, once per version of torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def why_not() -> str:
    """Return why no GPU can be pretended here; an empty text where one can."""
    if sys.platform != "linux":
        return "the pretended GPU is built for Linux only"
    if shutil.which("g++") is None:
        return "there is no g++ to build the pretended GPU with"
    if any(torch_folder().glob("lib/libtorch_cuda*")):
        return "this torch has CUDA of its own"
    return ""


def torch_folder() -> Path:
    """Return where torch lies, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def library() -> Path:
    """Return the compiled library, from the cache where it is there."""
    version, source = importlib.metadata.version("torch"), SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nd_dist" / "pretended_gpu"
    path = cache / f"{version}-{hashlib.sha256(source).hexdigest()[:12]}.so"
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    torch = torch_folder()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / path.name
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch}/include"]
        links = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(made), *links], check=True)
        os.replace(made, path)
    return path
