"""The training loop of one phantom network: AdamW, averaged weights, checkpoints that resume bit for bit.

The state is one safetensors file, replaced atomically; running the same command again goes on from it. Data and losses
are the objective's; a step is a pure function of (weights, optimizer state, step).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from launch.phantom_networks.batches import Rows
from launch.phantom_networks.objectives import Objective
from nd_dist.errors import CheckpointError
from nd_dist.events import EventLog
from nd_dist.files import atomic_path

EMA_DECAY = 0.999
GRADIENT_CLIP = 1.0
COOL_DOWN = 0.3
"""Last share of the steps in which the learning rate falls to zero."""
WARM_UP_STEPS = 100
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one network is trained.

    Args:
        name: ``vae``, ``clip``, ``unet`` or ``judges``.
        steps: Optimizer steps in all.
        batch_size: Rows of a step.
        learning_rate: Peak of the schedule: linear warm-up, constant, linear to zero.
        seed: Of initial weights and stream.
        weight_decay: AdamW's.
        autocast: bfloat16 autocast, where the device is fast at it.
        checkpoint_every: Steps between states on disk.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    weight_decay: float = 1e-2
    autocast: bool = False
    checkpoint_every: int = 250

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        left = (self.steps - step) / (COOL_DOWN * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS, left)


class TrainingState:
    """Weights, their moving average and the optimizer of one network.

    Args:
        network: Trained in place.
        recipe: Its recipe.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        self.network, self.recipe, self.step = network, recipe, 0
        self.average = {name: value.detach().clone() for name, value in network.state_dict().items()}
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )

    def update(self, loss: torch.Tensor) -> None:
        """Take one optimizer step down ``loss`` and move the average."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stub lacks it
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)
        self._optimizer.step()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
                else:
                    self.average[name].copy_(value)
        self.step += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything that a resumed run needs, as named CPU tensors."""
        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        named |= {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.network.named_parameters():
            for moment in MOMENTS if parameter in self._optimizer.state else ():
                named[f"{moment}.{name}"] = self._optimizer.state[parameter][moment]
        return {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}

    def restore(self, named: dict[str, torch.Tensor], step: int) -> None:
        """Set everything from :meth:`tensors` of a run at ``step``."""
        device = next(self.network.parameters()).device
        self.network.load_state_dict(_part(named, "network."))
        self.average = {name: value.to(device) for name, value in _part(named, "average.").items()}
        for name, parameter in self.network.named_parameters():
            if f"step.{name}" in named:
                self._optimizer.state[parameter] = {
                    moment: named[f"{moment}.{name}"].to("cpu" if moment == "step" else device) for moment in MOMENTS
                }
        self.step = step


def _part(named: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the entries whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def state_path(out_dir: Path, name: str) -> Path:
    """Return the file of a network's training state."""
    return out_dir / "states" / f"{name}.safetensors"


def save_state(state: TrainingState, out_dir: Path) -> None:
    """Write a training state atomically."""
    facts = {"step": state.step, "network": state.recipe.name, "seed": state.recipe.seed}
    with atomic_path(state_path(out_dir, state.recipe.name)) as part:
        save_file(state.tensors(), part, metadata={"training": json.dumps(facts)})


def read_state(out_dir: Path, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """Return the tensors and the step of a network's newest state.

    Raises:
        CheckpointError: there is none yet.
    """
    path = state_path(out_dir, name)
    if not path.is_file():
        raise CheckpointError(
            f"The network {name!r} has not been trained yet.",
            where=str(path),
            todo=f"python -m launch.phantom_networks {out_dir} --only {name}",
        )
    with safe_open(path, framework="pt") as file:
        step = json.loads(file.metadata()["training"])["step"]
        return {key: file.get_tensor(key) for key in file.keys()}, int(step)  # noqa: SIM118  # not a mapping


def load_average(network: nn.Module, out_dir: Path, name: str) -> int:
    """Load the averaged weights of a network's newest state into ``network``, frozen; return the step."""
    named, step = read_state(out_dir, name)
    network.load_state_dict(_part(named, "average."))
    network.eval().requires_grad_(False)
    return step


def train(
    network: nn.Module, objective: Objective, recipe: Recipe, out_dir: Path, events: EventLog, device: torch.device
) -> None:
    """Train one network to the last step of its recipe, from its newest state where there is one.

    Args:
        network: Built with ``recipe.seed``; trained in place.
        objective: Its loss.
        recipe: Steps, rates, seed.
        out_dir: Where states and events go.
        events: Receives ``progress`` events.
        device: Where it runs.
    """
    network.to(device).train()
    state = TrainingState(network, recipe)
    if state_path(out_dir, recipe.name).is_file():
        state.restore(*read_state(out_dir, recipe.name))
    for scalars in _steps(state, objective, device):
        if state.step % 50 == 0 or state.step == recipe.steps:
            values = {name: round(float(value), 5) for name, value in scalars.items()}
            events.progress(recipe.name, state.step, recipe.steps, **values)
        if state.step % recipe.checkpoint_every == 0 or state.step == recipe.steps:
            save_state(state, out_dir)


def _steps(state: TrainingState, objective: Objective, device: torch.device) -> Iterator[dict[str, Any]]:
    """Train step by step; yield the objective's scalars after each."""
    recipe = state.recipe
    while state.step < recipe.steps:
        rows = Rows(recipe.seed, state.step, range(recipe.batch_size), device)
        with torch.autocast(device.type, torch.bfloat16) if recipe.autocast else nullcontext():
            scalars = objective(state.network, rows)
        state.update(scalars["loss"])
        yield {name: value.detach() for name, value in scalars.items()}
