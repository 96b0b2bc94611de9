"""Trains one phantom network over all ranks: the project's engine, loop and checkpoints, with this network's loss.

Every rank has its share of the rows of a step; what a row holds depends on (seed, step, row) alone. The averaged
weights, which are what is used later, are part of the checkpoints and stand beside them in one safetensors file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from nd_dist.config import TrainingConfig
from nd_dist.errors import CheckpointError
from nd_dist.files import atomic_path
from nd_dist.schema import Batch
from nd_dist.training.checkpoints import StageCheckpoints
from nd_dist.training.engine.engine import Engine
from nd_dist.training.loop import Stage, train_stage
from nd_dist.training.objective.objectives import TOTAL, StepInputs, Trainable
from nd_dist.world import World
from shards.phantom.networks.batches import Rows
from shards.phantom.networks.objectives import Objective
from shards.phantom.networks.settings import NetworkName, NetworksRecipe, Workplace

BETA1 = 0.9
AVERAGE = "average."


@dataclass(frozen=True)
class WarmUpAndCoolDown:
    """Linear warm-up, constant, linear to zero.

    Args:
        settings: Lengths of both ends, beta2.
        steps: Optimizer steps in all.
        peak: Highest learning rate.
    """

    settings: NetworksRecipe
    steps: int
    peak: float

    def __call__(self, step: int) -> tuple[float, tuple[float, float]]:
        """Return the learning rate and AdamW's betas of a 0-based optimizer step; the betas never change."""
        return self.learning_rate(step), (BETA1, self.settings.beta2)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a 0-based optimizer step."""
        left = (self.steps - step) / (self.settings.cooldown_fraction * self.steps)
        return self.peak * min(1.0, (step + 1) / self.settings.warmup_steps, left)


class NetworkLoss(Trainable):
    """A network, its averaged weights and its objective as one module.

    Args:
        network: Trained in place.
        objective: Its loss.
        seed: Of the stream of pictures.
        settings: Decay of the average, precision.
    """

    def __init__(self, network: nn.Module, objective: Objective, seed: int, settings: NetworksRecipe) -> None:
        super().__init__()
        self.trained = network
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.num_updates: torch.Tensor
        self.register_buffer("num_updates", torch.zeros(1, dtype=torch.int64))
        self._objective, self._seed, self._settings = objective, seed, settings

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        return self.trained

    def forward(self, inputs: StepInputs, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return this rank's loss and its terms, detached; the batch says which rows, and nothing else."""
        row_ids, device = inputs.ids_B.tolist(), next(self.trained.parameters()).device
        rows = Rows(self._seed, step, range(row_ids[0], row_ids[-1] + 1), device)
        is_mixed = self._settings.autocast and device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext():
            terms = self._objective(self.trained, rows)
        return terms[TOTAL], {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def update_average(self) -> int:
        """Move the averaged weights after an optimizer step; return how many there were."""
        number = int(self.num_updates)
        decay = min(self._settings.average_decay, (1 + number) / (10 + number))
        pairs = zip(self.average.state_dict().values(), self.trained.state_dict().values(), strict=True)
        for average, value in pairs:
            if value.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
        self.num_updates += 1
        return number + 1


class RowStream:
    """The endless batches of one rank: row numbers; the objective makes pictures and draws of them.

    Args:
        batch_size: Rows of a global step, a multiple of the number of ranks.
        world: Who this rank is.
    """

    def __init__(self, batch_size: int, world: World) -> None:
        share = batch_size // world.size
        self._rows = np.arange(world.rank * share, (world.rank + 1) * share, dtype=np.int64)
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from the loaded state on."""
        zeros = np.zeros_like(self._rows)
        while True:
            self._step += 1
            yield Batch(self._step - 1, {}, {}, zeros, zeros, zeros, self._rows, zeros, self._rows)

    def state_dict(self) -> Mapping[str, object]:
        """Return the state from which the next batch follows."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a state."""
        self._step = int(str(state["step"]))

    def close(self) -> None:
        """Nothing is open."""


def average_path(out_dir: Path, name: str) -> Path:
    """Return the file of a network's averaged weights."""
    return out_dir / "states" / f"{name}.safetensors"


def write_average(loss: NetworkLoss, step: int, facts: Mapping[str, object], path: Path) -> None:
    """Write the averaged weights, and what they are, atomically."""
    named = {AVERAGE + name: value.cpu().contiguous() for name, value in loss.average.state_dict().items()}
    with atomic_path(path) as part:
        save_file(named, part, metadata={"training": json.dumps({"step": step, "facts": dict(facts)})})


def read_training(out_dir: Path, name: str) -> dict[str, Any]:
    """Return ``{"step", "facts"}`` of a network's averaged weights, an empty one where there are none."""
    path = average_path(out_dir, name)
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["training"])
    return found


def load_average(network: nn.Module, out_dir: Path, name: str) -> int:
    """Load a network's averaged weights into ``network``, frozen; return the step they are of.

    Raises:
        CheckpointError: there are none yet.
    """
    path = average_path(out_dir, name)
    if not path.is_file():
        raise CheckpointError(
            f"The network {name!r} has not been trained yet.",
            where=str(path),
            todo=f"python -m launch.phantom_networks {out_dir} stages=[{name}]",
        )
    with safe_open(path, framework="pt") as file:
        step = int(json.loads(file.metadata()["training"])["step"])
        keys = [key for key in file.keys() if key.startswith(AVERAGE)]  # noqa: SIM118  # not a mapping
        network.load_state_dict({key.removeprefix(AVERAGE): file.get_tensor(key) for key in keys})
    network.eval().requires_grad_(False)
    return step


def train_network(
    name: NetworkName, parts: tuple[nn.Module, Objective], place: Workplace, facts: Mapping[str, object]
) -> None:
    """Train one network to its last step, from its newest checkpoint where there is one. Every rank calls it.

    Args:
        name: Which one.
        parts: The network, built with its recipe's seed, and its objective.
        place: Where, by which ranks.
        facts: Fingerprint: a checkpoint of another recipe is refused.

    Raises:
        Requeue: a rank was asked to stop; the state is saved.
        CheckpointError: the checkpoint is of another recipe.
        NonFiniteError: the training diverged.
    """
    settings, recipe = place.settings, place.settings.recipe(name)
    loss = NetworkLoss(*parts, recipe.seed, settings).train()
    training = TrainingConfig(
        weight_decay=recipe.weight_decay,
        gradient_clip=settings.gradient_clip,
        zero_stage=0,
        shard_layers=False,
        checkpoint_every=settings.checkpoint_every,
    )
    schedule = WarmUpAndCoolDown(settings, recipe.steps, recipe.learning_rate)
    engine = Engine(loss, training, schedule, recipe.batch_size // place.world.size, place.world, place.timeout_s)
    folder, grace_s = place.out_dir / "checkpoints" / name, settings.launch.stop_grace_s
    checkpoints = StageCheckpoints(folder, engine, facts, place.events, grace_s)
    after_step = partial(_after_step, loss, name, place, facts)
    stage = Stage(name, recipe.steps, recipe.batch_size, place.should_stop, after_step=after_step)
    with closing(checkpoints):
        train_stage(stage, engine, RowStream(recipe.batch_size, place.world), checkpoints, place.events)
    engine.close()


def _after_step(loss: NetworkLoss, name: NetworkName, place: Workplace, facts: Mapping[str, object]) -> None:
    """Move the average; write it where a checkpoint follows."""
    step, settings = loss.update_average(), place.settings
    if place.world.is_main and (step % settings.checkpoint_every == 0 or step == settings.recipe(name).steps):
        write_average(loss, step, facts, average_path(place.out_dir, name))
