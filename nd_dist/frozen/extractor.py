"""Pictures and captions to targets c, z and g02 .. g12, batched, the same on any number of ranks.

Shape suffixes: B batch, L tokens, D width, C channels, H height, W width.
Source: NeuralDiffuser, section III-A (targets); defaults other than the VAE's mode follow the released extraction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.compute.chunks import AdaptiveChunks
from nd_dist.config import FrozenConfig
from nd_dist.errors import DataError
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from nd_dist.pixels import Lanczos, pictures_to_pixels, resize_lanczos
from nd_dist.schema import INITIAL, SEMANTIC, TargetSpec
from nd_dist.seeds import unit_seed

FINGERPRINT_FORMAT = 1


class FrozenExtractor:
    """Extracts all targets of a picture with one Stable Diffusion folder and one guidance CLIP.

    Args:
        sd: Text encoder and VAE.
        clip: Guidance CLIP.
        config: Posterior mode or sample, pixel statistics, antialias, batch size.
        seed: Run seed; matters only when ``config.vae_encode`` is ``sample``.
        recorded: Hashes of networks in records that are to be continued (see ``weights.hash_network``).
    """

    def __init__(
        self, sd: StableDiffusion, clip: ClipVision, config: FrozenConfig, seed: int, recorded: Collection[str] = ()
    ) -> None:
        self._sd, self._clip, self._config, self._seed, self._recorded = sd, clip, config, seed, recorded
        rows, on_cpu = config.batch_size, sd.device.type == "cpu"
        self._text_rows, self._clip_rows = (AdaptiveChunks(what, rows) for what in ("captions", "guidance features"))
        self._lanczos = Lanczos(sd.picture_size)
        self._vae_rows = AdaptiveChunks("the VAE's encoder", rows, most=rows if on_cpu else sd.most_vae_rows)

    @property
    def specs(self) -> tuple[TargetSpec, ...]:
        """Names and shapes of the targets: c (L, D), z (C, H, W), one guidance layer (L, D) per tapped block."""
        guidance = (TargetSpec(name, "guidance", shape) for name, shape in self._clip.feature_shapes.items())
        return (
            TargetSpec(SEMANTIC, "semantic", self._sd.text_shape),
            TargetSpec(INITIAL, "initial", self._sd.latent_shape),
            *guidance,
        )

    @cached_property
    def fingerprint(self) -> dict[str, object]:
        """What made the targets: model names, hashes of their files, every setting that changes a value (JSON)."""
        config = self._config
        hashes = {f"{part}_sha256": digest for part, digest in self._sd.hashes(self._recorded).items()}
        return {
            "format": FINGERPRINT_FORMAT,
            "model": self._sd.name,
            "guidance_model": self._clip.name,
            **hashes,
            "guidance_model_sha256": self._clip.hash(self._recorded),
            "picture_size": self._sd.picture_size,
            "guidance_size": self._clip.image_size,
            "normalize": config.normalize,
            "antialias": config.antialias,
            "vae_encode": config.vae_encode,
            "vae_seed": self._seed if config.vae_encode == "sample" else None,
            "dtype": str(self._sd.dtype).removeprefix("torch."),
            **({"guidance_layers": list(config.guidance_layers)} if config.guidance_layers else {}),
        }

    def extract(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        image_ids: Sequence[int],
        wanted: Collection[str] | None = None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return targets of some pictures.

        Args:
            pictures_BHWC: uint8 pictures (B, H, W, 3) of any size.
            captions: Captions of each picture, at least one where c is wanted; their embeddings are averaged.
            image_ids: 0-based ids; they seed the VAE's sample, and name a picture in errors.
            wanted: Names of the targets to make (none: all); a network that none of them needs does not run.

        Returns:
            Target name -> float32 (B, *shape).

        Raises:
            DataError: counts differ, a picture has no caption, or a target is not finite (the image is named).
        """
        specs = [spec for spec in self.specs if wanted is None or spec.name in wanted]
        roles = {spec.role for spec in specs}
        self._check(pictures_BHWC, captions, image_ids, needs_captions="semantic" in roles)
        batches: list[dict[str, torch.Tensor]] = []
        for rows in _slices(len(image_ids), self._config.batch_size):
            targets: dict[str, torch.Tensor] = {}
            if "semantic" in roles:
                targets[SEMANTIC] = self._semantic(captions[rows])
            pictures = _Pictures(pictures_BHWC[rows], self._sd.device, self._lanczos)
            if "initial" in roles:
                targets[INITIAL] = self._initial(pictures, image_ids[rows])
            if "guidance" in roles:
                targets |= self._guidance(pictures)
            if targets:
                _check_finite(targets, image_ids[rows])
            batches.append(targets)
        return {spec.name: _join([batch[spec.name] for batch in batches], spec) for spec in specs}

    def _check(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        ids: Sequence[int],
        needs_captions: bool,
    ) -> None:
        if not len(pictures_BHWC) == len(captions) == len(ids):
            raise DataError(
                "Pictures, captions and image ids differ in number.",
                found=f"{len(pictures_BHWC)} pictures, {len(captions)} captions, {len(ids)} ids",
            )
        if pictures_BHWC.dtype != np.uint8 or pictures_BHWC.ndim != 4 or pictures_BHWC.shape[3] != 3:
            raise DataError(
                "Pictures are not RGB bytes.",
                expected="uint8 (B, H, W, 3)",
                found=f"{pictures_BHWC.dtype} {pictures_BHWC.shape}",
            )
        if needs_captions and (bare := [image_id for image_id, texts in zip(ids, captions, strict=True) if not texts]):
            raise DataError("An image has no caption.", where=f"image {bare[0]}", expected="at least one caption")

    def _semantic(self, captions: Sequence[Sequence[str]]) -> torch.Tensor:
        texts = [text for group in captions for text in group]
        tokens: list[torch.Tensor] = []
        for first in range(0, len(texts), self._config.batch_size):
            part = texts[first : first + self._config.batch_size]
            tokens += self._text_rows.run(len(part), partial(self._tokens, part))
        groups = torch.split(torch.cat(tokens), [len(group) for group in captions])
        return torch.stack([group.mean(dim=0) for group in groups])

    def _tokens(self, texts: Sequence[str], rows: slice) -> tuple[torch.Tensor, ...]:
        return (self._sd.encode_text(texts[rows]),)

    def _initial(self, pictures: _Pictures, image_ids: Sequence[int]) -> torch.Tensor:
        sampled = self._config.vae_encode == "sample"
        seeds = [unit_seed(self._seed, "vae", int(image_id)) for image_id in image_ids] if sampled else None

        def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
            pixels = pictures_to_pixels(pictures.resized(self._sd.picture_size, rows)) * 2.0 - 1.0
            return (self._sd.encode_image(pixels, seeds[rows] if seeds is not None else None),)

        return self._vae_rows.run(len(image_ids), of_rows)[0]

    @torch.no_grad()
    def _guidance(self, pictures: _Pictures) -> Mapping[str, torch.Tensor]:
        def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
            pixels = pictures_to_pixels(pictures.there_BHWC[rows])
            return tuple(self._clip.features(pixels, self._config.antialias, self._config.normalize))

        features = self._clip_rows.run(len(pictures.there_BHWC), of_rows)
        return dict(zip(self._clip.layer_names, features, strict=True))


class _Pictures:
    """Some pictures on the extractor's device, where they went as bytes.

    Args:
        given_BHWC: uint8 pictures (B, H, W, 3).
        device: The extractor's.
        lanczos: Resizes there.
    """

    def __init__(self, given_BHWC: npt.NDArray[np.uint8], device: torch.device, lanczos: Lanczos) -> None:
        self._given_BHWC, self._lanczos = given_BHWC, lanczos
        self.there_BHWC = torch.from_numpy(np.ascontiguousarray(given_BHWC)).to(device)

    def resized(self, size: int, rows: slice) -> torch.Tensor:
        """Return some pictures (B, size, size, 3) by Pillow's Lanczos filter; on a GPU the GPU applies it."""
        if self.there_BHWC.device.type == "cpu":
            return torch.from_numpy(np.ascontiguousarray(resize_lanczos(self._given_BHWC[rows], size)))
        return self._lanczos(self.there_BHWC[rows])


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _join(parts: Sequence[torch.Tensor], spec: TargetSpec) -> npt.NDArray[np.float32]:
    if not parts:
        return np.zeros((0, *spec.shape), dtype=np.float32)
    return np.asarray(torch.cat(list(parts)).float().cpu().numpy(), dtype=np.float32)


def _check_finite(targets: Mapping[str, torch.Tensor], image_ids: Sequence[int]) -> None:
    finite_TB = torch.stack([torch.isfinite(values.flatten(1)).all(dim=1) for values in targets.values()]).cpu()
    for name, finite_B in zip(targets, finite_TB, strict=True):
        if not bool(finite_B.all()):
            raise DataError(
                f"Target {name} is not finite.",
                where=f"image {image_ids[int((~finite_B).int().argmax())]}",
                todo="use frozen.dtype=float32, or check the model folder",
            )
