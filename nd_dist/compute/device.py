"""Which device a rank computes on, and with which arithmetic. Whatever holds a network asks here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nd_dist.config import Config, Dtype
from nd_dist.files import read_json, write_json
from nd_dist.world import World

PLATFORM = "platform.json"
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def rank_device(world: World) -> torch.device:
    """Return a rank's GPU, or the CPU where torch sees none.

    A rank sees all GPUs of its host, or its own alone (srun --gpus-per-task=1, MIG, a mask of the user's): its number
    on the host counts around those that it sees.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def use_device(world: World, config: Config) -> torch.device:
    """Return a rank's device after making it the process's own, with the recipe's arithmetic. Call it first of all.

    On a CPU there is nothing to set: its arithmetic is exact for the dtype and reproducible.
    """
    device = rank_device(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            torch.use_deterministic_algorithms(True)
    return device


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device, without waiting for it: through page-locked memory to a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def arithmetic(device: torch.device, config: Config) -> dict[str, str | bool]:
    """Return the settings that move a network's numbers on a device; on the CPU there are none.

    With ``deterministic`` equal bits are promised, which only hold on one model of GPU and one torch.
    """
    if device.type != "cuda":
        return {}
    exact = platform_facts(device) if config.deterministic else {}
    return {"tf32": config.tf32, "deterministic": config.deterministic, **exact}


def note_platform(run_dir: Path, command: str, device: torch.device) -> str:
    """Write what a command runs on into the run folder; return a sentence where an earlier launch ran on another.

    What is finished stays: but it was not made by the same hardware and libraries, and equal bits are then no promise.
    """
    path, facts = run_dir / PLATFORM, platform_facts(device)
    noted = read_json(path) if path.is_file() else {}
    before = noted.get(command, facts)
    write_json(path, {**noted, command: facts})
    if before == facts:
        return ""
    was, now = (", ".join(f"{key} {value}" for key, value in found.items()) for found in (before, facts))
    return f"an earlier {command} of this run ran on {was}; now it is {now}: results agree up to rounding"


def platform_facts(device: torch.device) -> dict[str, str]:
    """Return what a rank computes on: the model of the GPU (or "CPU"), and the versions below it."""
    if device.type != "cuda":
        return {"device": "CPU", "torch": torch.__version__}
    name = torch.cuda.get_device_name(device)
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
