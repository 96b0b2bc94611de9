"""`nd doctor`: what is there, what is missing, and the command that would install it. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from launch.console import make_console
from launch.host_agents.agents import HostAgents, Inquiry
from launch.plans.environment import environment
from launch.plans.hostfile import read_hostfile
from launch.plans.tools import find_tools
from launch.recipe import load_recipe, load_settings
from launch.supervise.checks import checks_of, run_checks
from nd_dist.comm import load_mpi
from nd_dist.config import Config, LaunchConfig
from nd_dist.versions import CODE_DIR

REQUIRED = (
    "torch",
    "deepspeed",
    "diffusers",
    "transformers",
    "webdataset",
    "mpi4py",
    "torchmetrics",
    "h5py",
    "nibabel",
)
SHARED_MEMORY_BYTES = 2**30  # containers have 64 MiB unless told otherwise
OUR_PACKAGES = ("nd_dist", "launch", "shards")


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer.

    Args:
        name: What was looked at.
        state: ``ok``, ``missing`` (the line cannot run), or ``note`` (works with less).
        found: What is there.
        todo: The command that would help; empty if nothing is to be done.
    """

    name: str
    state: str
    found: str
    todo: str = ""


def run_doctor(hostfile: Path | None, shared_dir: Path, words: Sequence[str] = ()) -> int:
    """Print every check as a table; return 0, or 3 if something required is missing.

    Args:
        hostfile: Hosts to check as well, all in parallel, in the way in which a launch would.
        shared_dir: A folder that all hosts must see (runs and shards lie below it).
        words: A recipe, whose runs are looked at too, and settings, e.g. ``launch.interface=ib0``.
    """
    recipe = words[0] if words and "=" not in words[0] else None
    config = load_settings(Config, None, words) if recipe is None else load_recipe(recipe, words[1:])
    checks = [*_python(), *_mpi(), *_slurm(config), *_accelerator(), *_tools()]
    checks += _runs(config) if recipe is not None else []
    if hostfile is not None:
        checks += _hosts(hostfile, shared_dir, config.launch)
    table = Table(title="nd doctor", title_justify="left")
    for heading in ("what", "state", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    for check in checks:
        table.add_row(check.name, Text(check.state, colours[check.state]), check.found, check.todo)
    make_console().print(table, soft_wrap=False)
    return 3 if any(check.state == "missing" for check in checks) else 0


def _runs(config: Config) -> Iterator[Check]:
    """Yield what packing, training and evaluating by a recipe find: the very checks that they begin with."""
    told: set[str] = set()
    for command in ("pack", "train", "evaluate"):
        found, problems = run_checks(checks_of(command, config))
        for name, text in found.items():
            yield Check(f"{command}: {name}", "ok", text)
        for name, problem in problems.items():
            if str(problem) not in told:
                told.add(str(problem))
                text = f"{problem.what} {problem.where}"
                yield Check(f"{command}: {name}", "missing", text, problem.todo)


def _hosts(hostfile: Path, shared_dir: Path, launch: LaunchConfig) -> Iterator[Check]:
    """Yield a check for each host: ssh, Python, packages, this code, the shared folder, GPUs for its slots."""
    hosts = read_hostfile(hostfile)
    inquiry = Inquiry("", shared_dir.resolve(), launch)
    is_alone = len(hosts) == 1 and hosts[0].is_local
    with tempfile.TemporaryDirectory() as logs:
        with HostAgents(hosts, inquiry, Path(logs), environment(), always_ssh=not is_alone) as agents:  # as pdsh does
            answers = agents.facts()
        for facts in answers:
            name = f"host {facts.host.name}"
            todo = "see docs/operations.md, messages about hosts"
            for problem in facts.problems:
                yield Check(name, "missing", problem, todo)
            if facts.problems:
                continue
            same = f"slots={facts.host.slots}, {facts.gpus} GPUs; Python, packages and code as here"
            fits = facts.gpus in (0, facts.host.slots)
            todo = "" if fits else "a rank per GPU is usual"
            yield Check(name, "ok" if fits else "note", same, todo)


def _python() -> Iterator[Check]:
    """Yield the checks of the interpreter and its packages; another wheel may ship our `shards` or `launch` too."""
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    for name in REQUIRED:
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "missing", "not installed", f"pip install {name}")
    if importlib.util.find_spec("torchvision"):
        yield _torchvision()
    owners = importlib.metadata.packages_distributions()
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        others = sorted(set(owners.get(name, ())) - {"nd-dist"})
        if origin != CODE_DIR or others:
            yield Check(f"package {name}", "missing", f"comes from {origin}", f"pip uninstall {' '.join(others)}")


def _torchvision() -> Check:
    """Return the check that torchvision was built for this torch; another one breaks transformers and diffusers."""
    version = importlib.metadata.version("torchvision")
    code = "import torchvision"  # in a process of its own: half an import would stay in this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("torchvision", "ok", version)
    found = f"{version} cannot be imported: {done.stderr.strip().splitlines()[-1]}"
    todo = "install the torchvision built for this torch, or pip uninstall torchvision"
    return Check("torchvision", "missing", found, todo)


def _mpi() -> Iterator[Check]:
    """Yield the check of the MPI library and its mpirun."""
    mpi, tools = load_mpi(), find_tools()
    if mpi is None:
        yield Check("MPI", "note", "mpi4py finds no MPI library: one process does all work", "pip install mpich")
        return
    library = mpi.Get_library_version().splitlines()[0].split(",")[0].strip()
    yield Check("MPI library", "ok", library)
    if not tools.mpirun:
        yield Check("mpirun", "note", "not on PATH: one process does all work", "pip install mpich")
    elif ("Open MPI" in library) != (tools.mpi_flavour == "openmpi"):
        todo = "put the mpirun that belongs to the library first on PATH"
        yield Check("mpirun", "missing", f"{tools.mpirun} ({tools.mpi_flavour}) does not fit {library}", todo)
    else:
        yield Check("mpirun", "ok", f"{tools.mpirun} ({tools.mpi_flavour})")


def _slurm(config: Config) -> Iterator[Check]:
    """Yield the check of how srun starts ranks, where there is a Slurm."""
    if shutil.which("srun") is None:
        return
    answer = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, check=False)
    plugins, chosen = re.findall(r"[\w-]+", answer.stdout + answer.stderr), config.slurm.mpi
    if chosen in ("auto", "none", *plugins):
        meeting = "ranks need no MPI library" if chosen in ("auto", "none") else f"ranks meet by {chosen}"
        yield Check("Slurm", "ok", f"srun starts ranks; {meeting} (slurm.mpi={chosen})")
    else:
        yield Check("Slurm", "missing", f"`srun --mpi=list` does not name {chosen}", "leave slurm.mpi out")


def _accelerator() -> Iterator[Check]:
    """Yield the check of the GPUs that torch sees."""
    import torch

    from launch.supervise.memory import gpu_bytes

    if not torch.cuda.is_available() and gpu_bytes():
        header = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        driver = re.search(r"CUDA Version: ([\d.]+)", header)
        able = driver.group(1) if driver else "unknown"
        wheel = f"cu{able.replace('.', '')}" if driver else "cuXYZ"
        yield Check(
            "GPU",
            "missing",
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not reach it; its driver is for CUDA {able}",
            f"pip install torch --index-url https://download.pytorch.org/whl/{wheel}, or of an older CUDA",
        )
    elif torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Check(f"GPU {number}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    else:
        yield Check("GPU", "note", "none: everything runs on the CPU, far slower at full size")


def _tools() -> Iterator[Check]:
    """Yield checks of programs that only launches over several hosts need, and of the disks that may fill up."""
    for program, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if found := shutil.which(program):
            yield Check(program, "ok", found)
        else:
            yield Check(program, "note", "missing: needed only for several hosts", f"apt-get install {package}")
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir() and shutil.disk_usage(shared_memory).total < SHARED_MEMORY_BYTES:
        found = f"{shutil.disk_usage(shared_memory).total / 2**20:.0f} MiB: NCCL and MPI may want more"
        yield Check("/dev/shm", "note", found, "docker run --shm-size=8g, or --ipc=host")
    places = {"here": Path(), "TMPDIR": Path(tempfile.gettempdir()), "/dev/shm": shared_memory, "home": Path.home()}
    free = (f"{name} {shutil.disk_usage(path).free / 2**30:.1f} GiB" for name, path in places.items() if path.is_dir())
    yield Check("free space", "ok", f"{', '.join(free)} (Triton, torch and Hugging Face keep caches below home)")
