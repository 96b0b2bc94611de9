"""The teacher's side of z's contrastive term: pictures of a batch, plain and augmented, through the frozen network."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from nd_dist.errors import ConfigError
from nd_dist.frozen.convnext_teacher import ConvNextTeacher
from nd_dist.models.draws import Draws
from nd_dist.models.heads import STUDENT_WIDTH
from nd_dist.pixels import pictures_to_pixels, resize_bilinear
from nd_dist.schema import Batch
from nd_dist.training.objective.augment import augment
from nd_dist.training.objective.objectives import StepInputs
from nd_dist.training.source import Stream

AHEAD = 2


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
            changed_BCHW = augment(pictures_BCHW, Draws(self._seed, inputs.micro_step, inputs.sample_id_B))
            return self._network(pictures_BCHW), self._network(changed_BCHW)


class WithPictures:
    """A stream whose batches carry their pictures, read ahead in a thread of its own.

    Args:
        stream: The stream.
        read: Image ids -> pictures (B, H, W, 3) uint8.
    """

    def __init__(self, stream: Stream, read: Callable[[Sequence[int]], torch.Tensor]) -> None:
        self._stream, self._read = stream, read
        self._ahead: deque[tuple[Batch, Future[torch.Tensor]]] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the loaded state on."""
        batches = iter(self._stream)
        while True:
            started = time.perf_counter()
            while len(self._ahead) < AHEAD:
                batch = next(batches)
                self._ahead.append((batch, self._executor.submit(self._read, batch.image_id.tolist())))
            batch, pictures = self._ahead.popleft()
            yield replace(batch, pictures=pictures.result(), data_wait_s=time.perf_counter() - started)

    def state_dict(self) -> Mapping[str, object]:
        """Return the inner stream's state, at the step that comes next here."""
        state = self._stream.state_dict()
        return {**state, "step": int(str(state["step"])) - len(self._ahead)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a state."""
        self._ahead.clear()
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """Stop reading."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._stream.close()
