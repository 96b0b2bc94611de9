"""The frozen networks that an evaluation needs, and what identifies them. Loaded once per rank, only if needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nd_dist.compute.device import DTYPES, arithmetic
from nd_dist.config import Config
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.guidance import Guidance, LatentGuidance, PixelGuidance, SumOfGuidance
from nd_dist.diffusion.sampler import GuidedSampler
from nd_dist.errors import ConfigError
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
from nd_dist.frozen.vision_tower import load_guidance_network
from nd_dist.frozen.weights import hash_network
from nd_dist.metrics.protocols import protocol_named
from nd_dist.plugins import named_object, registered
from nd_dist.schema import INITIAL

PHANTOM_JUDGES = "judges"
PIXEL_SIDE = 32  # of the pictures that pixel guidance compares
REMARK = "remark.txt"  # in a model folder: a sentence that every report of its pictures shows


def guidance_of(config: Config, sd: stable_diffusion.StableDiffusion, clip: clip_vision.ClipVision) -> Guidance:
    """Return the guidance of a recipe: its terms, weighted.

    Raises:
        ConfigError: a term is none of ours and no class.
    """
    terms: dict[str, tuple[Guidance, float]] = {}
    for name, weight in _weights(config).items():
        if name == "clip":
            frozen, scale = config.frozen, config.sampler.layer_scale
            term: Guidance = ClipGuidance(clip, scale, antialias=frozen.antialias, normalize=frozen.normalize)
        elif name == "latent":
            term = LatentGuidance(sd.latent_shape)
        elif name == "pixels":
            term = PixelGuidance(PIXEL_SIDE, INITIAL, sd.decode)
        else:
            term = named_object("sampler.guidance", name)(sd, clip, config)
        terms[name] = term, weight
    first, weight = next(iter(terms.values()))
    return first if len(terms) == 1 and weight == 1.0 else SumOfGuidance(terms)


def _weights(config: Config) -> dict[str, float]:
    """Return the terms that have a weight."""
    weights = {name: weight for name, weight in config.sampler.guidance.items() if weight}
    if not weights:
        raise ConfigError(
            "No guidance term has a weight.", where="sampler.guidance", todo="use kappa 0 for no guidance"
        )
    return weights


def guidance_settings(config: Config) -> dict[str, Any]:
    """Return what the terms of a recipe add to the settings of its pictures; nothing for the paper's guidance."""
    terms = _weights(config)
    versions = {name: getattr(named_object("sampler.guidance", name), "version", 1) for name in terms if ":" in name}
    added = {
        "terms": {} if terms == {"clip": 1.0} else terms,
        "versions": versions,
        "layers": list(config.frozen.guidance_layers),
    }
    return {name: value for name, value in added.items() if value}


@dataclass
class Networks:
    """The networks of a recipe, read from its model folders on first use.

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
        self._samplers: dict[str, GuidedSampler] = {}

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

    def sampler(self, config: Config) -> GuidedSampler:
        """Return the guided sampler of a recipe.

        Raises:
            DataError: the targets were made by other networks or settings.
        """
        key = canonical_json([config.sampler.model_dump(mode="json", exclude={"kappa", "eta"}), self._source(config)])
        if key not in self._samplers:
            sd, clip = self._networks(config)
            self._samplers[key] = GuidedSampler(sd, guidance_of(config, sd, clip), config.sampler)
        return self._samplers[key]

    def _networks(self, config: Config) -> tuple[stable_diffusion.StableDiffusion, clip_vision.ClipVision]:
        """Return the loaded networks of a recipe; the last ones are kept, those of other folders are let go."""
        key = canonical_json([self._source(config), config.sampler.dtype, len(config.sampler.layer_scale)])
        if key not in self._loaded:
            self._loaded.clear()
            self._samplers.clear()
            dtype = DTYPES[config.sampler.dtype]
            sd = stable_diffusion.load(config.model, dtype=dtype, device=self.device)
            clip = load_guidance_network(config, dtype, self.device)
            check_sources(self.sources, sd, clip, config)
            self._loaded[key] = sd, clip
        return self._loaded[key]

    def decoder(self, folder: Path) -> Predictor:
        """Return the trained decoder of a folder, on the device; it is let go with what is returned."""
        return DecoderFolder(folder, self.device)

    @staticmethod
    def _source(config: Config) -> list[object]:
        return [config.model, config.guidance_model, config.frozen.model_dump(mode="json")]

    def judges(self) -> Sequence[Judge]:
        """Return the judges of ``judges_dir`` or beside a phantom model, and those that other packages register."""
        return [*self._known_judges(), *registered("judges", self.device).values()]

    def _known_judges(self) -> Sequence[Judge]:
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
