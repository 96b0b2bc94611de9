"""An engine's state: the files of a checkpoint, read on any number of ranks, and the whole network for a model folder.

Which folder of such files counts as a checkpoint is decided in ``nd_dist.training.checkpoints``.
"""

from __future__ import annotations

import copy
import shutil
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from nd_dist.checkpoint import FileRecord, write_hashed, write_tensors
from nd_dist.errors import CheckpointError, DataError, StorageError
from nd_dist.training.engine.engine import Engine, full_parameter, write_universal
from nd_dist.training.engine.shard_optimizer import shard_file
from nd_dist.training.ranks import on_main

Staged = dict[str, Any]
"""Name of a file in a checkpoint folder -> what it will hold, on the host."""


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Return the network's whole state dict in float32 on the CPU on rank 0, an empty one elsewhere."""
    state = engine.shards.whole()
    for name, parameter in engine.objective.network.named_parameters():
        full = full_parameter(parameter)  # collective under ZeRO; none where nothing is partitioned
        if engine.world.is_main:
            value = parameter.detach() if full is None else full
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 holds only a part of it
            state[name] = value.to(device="cpu", dtype=torch.float32, copy=True).view(shape)
    return state


def layout_of(engine: Engine) -> dict[str, Any]:
    """Return what the files of a checkpoint depend on besides the recipe."""
    training = engine.training
    return {
        "world_size": engine.world.size,
        "zero_stage": training.zero_stage,
        "shard_layers": training.shard_layers,
    }


def stage_state(engine: Engine, folder: Path, tag: str) -> Staged:
    """Return the state of this rank, copied to the host, as the files that it will be; every rank calls it."""
    staged: Staged = {}

    def keep(state_dict: object, path: str) -> None:
        staged[str(Path(path).relative_to(folder / tag))] = tree_map(_on_host, state_dict)

    engine.deepspeed.checkpoint_engine.save = keep
    if engine.shards.optimizers:
        # DeepSpeed's own export script would give a model without the divided layers
        engine.deepspeed._copy_recovery_script = lambda path: None
        staged[shard_file(engine.world.rank)] = tree_map(_on_host, engine.shards.state())
    engine.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False)
    return staged


def _on_host(leaf: object) -> object:
    """Return a copy of a part of a state that later steps do not change."""
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def write_state(staged: Staged, folder: Path) -> dict[str, FileRecord]:
    """Write staged files and return their records; what is written is let go of. Runs in a thread.

    Raises:
        StorageError: a file could not be written (disk full).
    """
    records: dict[str, FileRecord] = {}
    try:
        for name in list(staged):
            state, path = staged.pop(name), folder / name
            if path.suffix == ".safetensors":
                records[name] = write_tensors(path, state)
            else:
                records[name] = write_hashed(path, partial(torch.save, state))
    except (OSError, RuntimeError, DataError) as error:  # torch.save reports a full disk as RuntimeError
        raise StorageError(
            "A checkpoint could not be written; the one before is still valid.",
            where=str(path),
            found=_cause(error, folder),
            todo="free some space, then run the same command again: it continues from the last valid checkpoint",
        ) from error
    return records


def _cause(error: Exception, folder: Path) -> str:
    """Return why a file could not be written; torch's own writer does not say that the disk is full."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, DataError):
        return error.found or error.what
    free = shutil.disk_usage(folder).free
    return f"{str(error).splitlines()[0]} ({free / 1e6:.1f} MB free in that folder)"


def load_state(engine: Engine, folder: Path, tag: str, saved: Mapping[str, Any]) -> None:
    """Load the state of every rank from ``folder / tag``, which any number of ranks wrote.

    Args:
        engine: Takes the state.
        folder: Folder of the stage.
        tag: The checkpoint's own folder in it.
        saved: The layout that it was saved with: ZeRO 1 and 2 read each other, other stages only themselves.

    Raises:
        CheckpointError: it was saved with another ZeRO stage or division of layers, or DeepSpeed cannot read it.
    """
    own = layout_of(engine)
    stages = {own["zero_stage"], saved["zero_stage"]}
    if saved["shard_layers"] != own["shard_layers"] or (len(stages) > 1 and stages != {1, 2}):
        raise CheckpointError(
            "The checkpoint was saved with another ZeRO stage or division of layers.",
            where=str(folder / tag),
            expected=own,
            found=dict(saved),
            todo=f"continue with training.zero_stage={saved['zero_stage']} "
            f"training.shard_layers={saved['shard_layers']} (any number of ranks), or choose another run_dir",
        )
    weight_decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    if saved == own or own["zero_stage"] == 0:
        _load_deepspeed(engine, folder, tag)
    else:  # ZeRO's files are those of one world; DeepSpeed's universal format is any world's
        universal = f"universal-{tag}"
        on_main(lambda: _convert(folder / tag, folder / universal))
        engine.deepspeed._config.load_universal_checkpoint = True
        _load_deepspeed(engine, folder, universal)
        engine.deepspeed._config.load_universal_checkpoint = False
        on_main(lambda: shutil.rmtree(folder / universal))
    for group, weight_decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay  # ZeRO 3 gives all groups the first one's when it reads universal
    for state in engine.optimizer.state.values():  # fused AdamW wants its count on the device, and counts in place:
        # ZeRO 3 hands all groups the same tensor when it reads universal
        state["step"] = torch.tensor(float(state["step"]), device=engine.device)
    engine.shards.load(folder / tag, saved["world_size"])


def _load_deepspeed(engine: Engine, folder: Path, tag: str) -> None:
    """Load DeepSpeed's state; the schedule is this project's."""
    path, _ = engine.deepspeed.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError("DeepSpeed cannot read a checkpoint.", where=str(folder / tag))


def _convert(source: Path, target: Path) -> None:
    """Write a checkpoint of ZeRO 1 to 3 in DeepSpeed's universal format, which any number of ranks reads (rank 0).

    Raises:
        CheckpointError: DeepSpeed cannot convert it, or the disk is full.
    """
    shutil.rmtree(target, ignore_errors=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: forking one that computes with threads can hang
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    target.mkdir()
    try:
        write_universal(options)
    except (AssertionError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            "A checkpoint cannot be converted for another number of ranks.",
            where=str(source),
            found=f"{type(error).__name__}: {error}",
            todo="continue with the number of ranks that saved it",
        ) from error
    (target.parent / "latest_universal").unlink()
