"""The frozen networks that an evaluation needs, and what identifies them. Loaded once per rank, only if needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nd_dist.compute.device import DTYPES, arithmetic
from nd_dist.config import Config
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.sampler import GuidedSampler, SampleResult
from nd_dist.diffusion.samples import SampleOptions
from nd_dist.diffusion.schedule import StepPlan
from nd_dist.evaluation.reconstruction.decode import DecoderFolder, Predictor
from nd_dist.fanout.results import SETTINGS
from nd_dist.files import canonical_json, read_json
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.compatibility import check_compatible
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.frozen.field_judges import load_field_judges
from nd_dist.frozen.folders import SCHEDULER_CONFIG, resolve_folder
from nd_dist.frozen.judges import Judge, PairJudge, has_phantom_judges, load_phantom_judges
from nd_dist.frozen.optional_judges import absent_metrics, load_pair_judges
from nd_dist.frozen.weights import hash_network
from nd_dist.metrics.protocols import protocol_named

PHANTOM_JUDGES = "judges"
REMARK = "remark.txt"  # in a model folder: a sentence that every report of its pictures shows


class Sampler(Protocol):
    """What makes pictures from targets: ``GuidedSampler``."""

    def sample(
        self,
        c_BLD: Tensor,
        z_BCHW: Tensor,
        targets: Mapping[str, Tensor],
        requests: Sequence[NoiseRequest],
        kappa: float | None = None,
        eta: float | None = None,
        options: SampleOptions = ...,
    ) -> SampleResult:
        """Return one picture per request."""
        ...

    def plan(self, kappa: float | None = None, eta: float | None = None) -> StepPlan:
        """Return the steps of a run."""
        ...


class Networks(Protocol):
    """Networks of an evaluation, loaded on first use."""

    @property
    def device(self) -> torch.device:
        """Where all of them run."""
        ...

    def identity(self, config: Config) -> dict[str, str | bool]:
        """Return what identifies the networks that make a recipe's pictures, and the arithmetic they run in."""
        ...

    def sampler(self, config: Config) -> Sampler:
        """Return the guided sampler of a recipe; recipes that differ in scales only share the loaded networks."""
        ...

    def decoder(self, folder: Path) -> Predictor:
        """Return the trained decoder of a folder; it is let go with what is returned."""
        ...

    def judges(self) -> Sequence[Judge]:
        """Return the metric networks; none leaves pixel metrics only."""
        ...

    def pair_judges(self) -> Sequence[PairJudge]:
        """Return the metric networks that compare a pair of pictures directly."""
        ...

    def absent(self) -> dict[str, str]:
        """Return the metrics that cannot be computed here, each with the reason."""
        ...


@dataclass
class ModelFolders:
    """The networks of a recipe, read from its model folders.

    Args:
        config: The recipe; its ``model`` names the folder that judges may lie beside.
        device: Where they run.
        judges_dir: Folder of the field's judges; None takes the phantom's judges, which lie in ``judges`` beside a
            phantom model, or goes without.
        sources: Target store -> what made it, as the shards' index records it; refused where the recipe's networks
            or settings would make other targets.
    """

    config: Config
    device: torch.device
    judges_dir: Path | None = None
    sources: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start with nothing loaded."""
        self._loaded: dict[str, tuple[stable_diffusion.StableDiffusion, clip_vision.ClipVision]] = {}
        self._samplers: dict[str, Sampler] = {}

    def identity(self, config: Config) -> dict[str, str | bool]:
        """Return hashes of UNet, VAE, text encoder, guidance CLIP and scheduler settings."""
        folder = resolve_folder(config.model)
        recorded = _recorded_hashes(config.run_dir)
        parts = {part: hash_network(folder, part, recorded) for part in ("unet", "vae", "text_encoder")}
        settings = (folder / "scheduler" / SCHEDULER_CONFIG).read_text(encoding="utf-8")
        guidance = hash_network(resolve_folder(config.guidance_model), recorded=recorded)
        device = {"device": self.device.type, **arithmetic(self.device, config)}
        identity = {**parts, "scheduler": settings, "guidance": guidance, **device}
        remark = folder / REMARK
        return {**identity, "remark": remark.read_text(encoding="utf-8").strip()} if remark.is_file() else identity

    def sampler(self, config: Config) -> Sampler:
        """Return the guided sampler of a recipe.

        Raises:
            DataError: the targets were made by other networks or settings.
        """
        key = canonical_json([config.sampler.model_dump(mode="json", exclude={"kappa", "eta"}), self._source(config)])
        if key not in self._samplers:
            sd, clip = self._networks(config)
            guidance = ClipGuidance(
                clip,
                config.sampler.layer_scale,
                antialias=config.frozen.antialias,
                normalize=config.frozen.normalize,
            )
            self._samplers[key] = GuidedSampler(sd, guidance, config.sampler)
        return self._samplers[key]

    def _networks(self, config: Config) -> tuple[stable_diffusion.StableDiffusion, clip_vision.ClipVision]:
        """Return the loaded networks of a recipe; the last ones are kept, those of other folders are let go."""
        key = canonical_json([self._source(config), config.sampler.dtype, len(config.sampler.layer_scale)])
        if key not in self._loaded:
            self._loaded.clear()
            self._samplers.clear()
            dtype = DTYPES[config.sampler.dtype]
            sd = stable_diffusion.load(config.model, dtype=dtype, device=self.device)
            num_layers = len(config.sampler.layer_scale)
            clip = clip_vision.load(config.guidance_model, num_layers, dtype=dtype, device=self.device)
            check_sources(self.sources, sd, clip, config)
            self._loaded[key] = sd, clip
        return self._loaded[key]

    def decoder(self, folder: Path) -> Predictor:
        """Return the trained decoder of a folder, on the device."""
        return DecoderFolder(folder, self.device)

    @staticmethod
    def _source(config: Config) -> list[object]:
        return [config.model, config.guidance_model, config.frozen.model_dump(mode="json")]

    def judges(self) -> Sequence[Judge]:
        """Return the judges of ``judges_dir`` (the field's or the phantom's), or those beside a phantom model."""
        folder = self.judges_dir or self._beside_model()
        if folder is not None and has_phantom_judges(folder):
            return load_phantom_judges(folder, self.device)
        if self.judges_dir is None:
            return []
        return load_field_judges(self.judges_dir, protocol_named(self.config.evaluation.protocol).judges, self.device)

    def _beside_model(self) -> Path | None:
        return resolve_folder(self.config.model).parent / PHANTOM_JUDGES

    def pair_judges(self) -> Sequence[PairJudge]:
        """Return LPIPS where its weights are in ``judges_dir``."""
        return load_pair_judges(self.judges_dir, self.device) if self.judges_dir is not None else []

    def absent(self) -> dict[str, str]:
        """Return which metrics of the field lack their weights or packages."""
        return absent_metrics(self.judges_dir)


def check_sources(
    sources: Mapping[str, Mapping[str, object]],
    sd: stable_diffusion.StableDiffusion,
    clip: clip_vision.ClipVision,
    config: Config,
) -> None:
    """Refuse targets that other networks or settings than a recipe's made.

    Raises:
        DataError: see ``check_compatible``.
    """
    recorded = {str(value) for source in sources.values() for value in source.values()}
    check_compatible(sources, FrozenExtractor(sd, clip, config.frozen, config.seed, recorded).fingerprint)


def _recorded_hashes(run_dir: Path) -> set[str]:
    """Return the hashes of networks that made the pictures of a run."""
    below = f"reconstructions/*/*/{SETTINGS}"
    found = (read_json(path) for pattern in (below, f"*/{below}") for path in run_dir.glob(pattern))
    return {str(value) for record in found for value in record["settings"].get("networks", {}).values()}
