"""What a launching shell may hold, and what must have become of it in every rank, whatever started it."""

from __future__ import annotations

from pathlib import Path

from nd_dist.events import events_path, read_events

KNOWN = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDNN_NOTE": "1", "NVIDIA_TF32_OVERRIDE": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "two words; $HOME %h", "KMP_BLOCKTIME": "0",
    "WANDB_MODE": "offline", "WANDB_PROJECT": "p", "AWS_ENDPOINT_URL": "http://store:9000", "AWS_PROFILE": "lab",
    "https_proxy": "http://proxy:3128", "NO_PROXY": "store", "HUGGINGFACE_HUB_CACHE": "/cache", "XDG_CACHE_HOME": "/c",
    "TRITON_CACHE_DIR": "/t", "MPIR_CVAR_NOTE": "2", "MY_OWN": "carried",
}  # fmt: skip
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "s", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "HTTPS_PROXY": "http://me:word@proxy:3128",
}  # fmt: skip
FOREIGN = {
    "OMPI_UNIVERSE_SIZE": "9", "PMI_ID": "3", "PMIX_NAMESPACE": "other", "HYDRA_BOOTSTRAP": "slurm",
    "HYDRA_LAUNCHER": "slurm", "HYDRA_RMK": "slurm", "TORCHELASTIC_RUN_ID": "other", "GROUP_RANK": "4",
    "PBS_JOBID": "5", "LSB_JOBID": "6", "DS_ENV_FILE": "bad",
}  # fmt: skip
SLURM = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1",
         "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "2"}  # fmt: skip
SHELL = {**KNOWN, **SECRETS, **FOREIGN}
WORDS = ("launch.env={NCCL_NOTE: from the recipe, OMP_SCHEDULE: 4}", "launch.carry=[MY_OWN]")


def rank_environments(run_dir: Path, ranks: int) -> list[dict[str, str]]:
    """Return the variables of every rank of ``rank_program environment``."""
    events = [event for rank in range(ranks) for event in read_events(events_path(run_dir, rank))]
    return [event["variables"] for event in events if event["event"] == "environment"]


def assert_as_planned(environments: list[dict[str, str]]) -> None:
    """Every rank has what moves numbers and packets, equal everywhere, and nothing of other launchers."""
    wanted = {**KNOWN, "NCCL_NOTE": "from the recipe", "OMP_SCHEDULE": "4", "OMP_NUM_THREADS": "1"}
    for found in environments:
        assert {name: found.get(name) for name in wanted} == wanted
        assert {name: found[name] for name in FOREIGN if found.get(name) == FOREIGN[name]} == {}
