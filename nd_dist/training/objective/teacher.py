"""The teacher's side of z's contrastive term: pictures of a batch, plain and augmented, through the frozen network."""

from __future__ import annotations

import torch

from nd_dist.compute.device import sent
from nd_dist.errors import ConfigError
from nd_dist.frozen.augment import PURPOSES, augment
from nd_dist.frozen.convnext_teacher import ConvNextTeacher
from nd_dist.models.draws import Draws
from nd_dist.models.heads import STUDENT_WIDTH
from nd_dist.pixels import pictures_to_pixels, resize_bilinear
from nd_dist.training.objective.objectives import StepInputs


class PictureTeacher:
    """Returns the teacher's rows of a batch's pictures and of their augmented versions.

    Args:
        folder: Model folder, see ``nd_dist.frozen.convnext_teacher``.
        map_side: Positions along one side of the student's map.
        seed: Keys the augmentation.
        device: Where to compute.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ConfigError: its rows are not as wide as the student's.
    """

    def __init__(self, folder: str, map_side: int, seed: int, device: torch.device) -> None:
        self._network = ConvNextTeacher(folder).to(device)
        self._size, self._seed = map_side * self._network.downscale, seed
        if self._network.width != STUDENT_WIDTH:
            raise ConfigError(
                "The teacher's rows do not fit the student's.",
                where=f"training.teacher={folder}",
                expected=f"{STUDENT_WIDTH} wide",
                found=self._network.width,
            )

    def __call__(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two times (B, P, 512), without gradients."""
        assert inputs.pictures is not None  # the stream of a run with a teacher brings them
        with torch.no_grad():
            pixels_BCHW = pictures_to_pixels(inputs.pictures)
            pictures_BCHW = resize_bilinear(pixels_BCHW, self._size, antialias=True)
            changed_BCHW = augment(pictures_BCHW, *self._draws(inputs))
            return self._network(pictures_BCHW), self._network(changed_BCHW)

    def _draws(self, inputs: StepInputs) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return the numbers of every picture, made on the host at once, and the order of a step's jitters."""
        names = [f"teacher/{purpose}" for purpose in PURPOSES]
        numbers_PB = Draws.host_uniforms(self._seed, inputs.micro_step, names, inputs.ids_B)
        first = Draws(self._seed, inputs.micro_step, torch.zeros(1, dtype=torch.int64))
        order = torch.argsort(first.uniform("teacher/order", 4)[0]).tolist()
        moved_PB = sent(numbers_PB, self._network.mean.device)
        return dict(zip(PURPOSES, moved_PB, strict=True)), order
