"""NeuralDiffuser as a diffusers pipeline: voxels, or targets c, z and guidance features, to pictures.

A thin shape around ``GuidedSampler``, ``FrozenExtractor`` and ``Decoder``: the same networks, settings and noise give
the pictures of `nd evaluate`. Networks are read from folders or the local Hugging Face cache; nothing is downloaded.
Shape suffixes: B batch, V voxels, L tokens, D width, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import yaml
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps

from nd_dist.checkpoint import write_tensors
from nd_dist.compute.device import DTYPES
from nd_dist.config import Config, FrozenConfig, SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.pictures import grey_rows
from nd_dist.diffusion.sampler import GuidedSampler
from nd_dist.diffusion.samples import SampleOptions
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import recipe_point
from nd_dist.evaluation.reconstruction.decode import STATISTICS, STATISTICS_FOLDER, calibrated, read_statistics
from nd_dist.files import read_json
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.clip_vision import ClipVision, layer_name
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.frozen.folders import SCHEDULER_CONFIG, resolve_folder
from nd_dist.frozen.stable_diffusion import StableDiffusion
from nd_dist.models.decoder import CONFIG, Decoder
from nd_dist.pixels import to_uint8
from nd_dist.schema import INITIAL, SEMANTIC
from nd_dist.training.records import model_dir, stage_dir

CLIP, DECODER = "image_encoder", "decoder"  # sub-folders
INDEX, RECIPE = "model_index.json", "config.yaml"

Generators = torch.Generator | Sequence[torch.Generator] | None
Picture = Image.Image | npt.NDArray[np.uint8]
Statistics = Mapping[str, npt.NDArray[np.float64]]


class _Parts(NamedTuple):
    """Where a pipeline's frozen networks are, its settings, and its decoder with what calibrates it."""

    model: str | Path
    guidance_model: str | Path
    sampler: SamplerConfig
    frozen: FrozenConfig
    decoder: Decoder | None
    statistics: Statistics


class NeuralDiffuserPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Reconstructs pictures from fMRI, or from the embeddings of a picture.

        pipe = NeuralDiffuserPipeline.from_pretrained("phantom/stable-diffusion")
        pipe(**pipe.embed([picture], ["a radio in a forest"])).images[0]

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: Those of a Stable Diffusion folder. Of the scheduler only the
            noise levels are used: the sampler is NeuralDiffuser's own.
        image_encoder: transformers' CLIPVisionModel, cut after its last guidance layer.
        decoder: The trained decoder; None reconstructs from given targets only.
        statistics: What the decoder's predictions are calibrated with, as an evaluation keeps it; None leaves them.
        sampler: Settings of the sampler.
        frozen: How pictures are turned into targets.
    """

    def __init__(
        self,
        vae: Any,  # Any: diffusers and transformers ship no usable types
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        image_encoder: Any,
        decoder: Decoder | None = None,
        statistics: Statistics | None = None,
        sampler: SamplerConfig | None = None,
        frozen: FrozenConfig | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
        )
        self.decoder, self.statistics = decoder, statistics or {}
        self.sampler, self.frozen = sampler or SamplerConfig(), frozen or FrozenConfig()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        guidance_model: str | Path | None = None,
        sampler: SamplerConfig | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return the pipeline of a model.

        Args:
            model: A folder that ``save_pretrained`` wrote; a run folder of `nd train` and `nd evaluate`; or any Stable
                Diffusion: a folder in Hugging Face layout, a name in the local Hugging Face cache, or
                ``phantom/stable-diffusion``, the small one that comes with the package.
            guidance_model: The guidance CLIP, a folder or name; None: the model's own, else OpenAI's ViT-B/32.
            sampler: Settings of the sampler; None: the model's own, else the published ones.
            torch_dtype: Dtype of UNet, VAE and CLIP; None: as the sampler's settings say.
            device: Where the networks go.

        Raises:
            CheckpointError: a network is missing or damaged, or a run has no trained decoder or no statistics yet.
        """
        parts = _of_run(Path(model)) if (Path(model) / RECIPE).is_file() else _of_folder(model)
        settings = sampler or parts.sampler
        dtype = torch_dtype or DTYPES[settings.dtype]
        sd = stable_diffusion.load(parts.model, dtype, device)
        clip = clip_vision.load(guidance_model or parts.guidance_model, len(settings.layer_scale), dtype, device)
        return cls(
            vae=sd.vae,
            text_encoder=sd.text_encoder,
            tokenizer=sd.tokenizer,
            unet=sd.unet,
            scheduler=_load_scheduler(resolve_folder(parts.model) / "scheduler"),
            image_encoder=clip.tower,
            decoder=parts.decoder and parts.decoder.to(device).eval(),
            statistics=parts.statistics,
            sampler=settings,
            frozen=parts.frozen,
        )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # Any: diffusers' own options
        """Write everything into a folder in diffusers' layout; ``from_pretrained`` reads it back.

        Args:
            save_directory: Folder to write.
            options: Of ``diffusers.DiffusionPipeline.save_pretrained``.
        """
        settings = {"sampler": self.sampler, "frozen": self.frozen}
        self.register_to_config(**{name: each.model_dump(mode="json") for name, each in settings.items()})
        super().save_pretrained(save_directory, **options)
        if self.decoder is not None:
            folder = Path(save_directory) / DECODER
            self.decoder.save_pretrained(folder)
            if self.statistics:
                tensors = {name: torch.from_numpy(values) for name, values in self.statistics.items()}
                write_tensors(folder / STATISTICS, tensors)

    @torch.no_grad()
    def __call__(
        self,
        voxels: torch.Tensor | npt.NDArray[np.float32] | None = None,
        *,
        subject: int | None = None,
        c: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        guidance: Mapping[str, torch.Tensor] | None = None,
        kappa: float | None = None,
        eta: float | None = None,
        generator: Generators = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> Any:  # Any: diffusers' output class, or a tuple of its field
        """Return one picture per row of voxels, or of c and z.

        Args:
            voxels: (B, V) or (V,) z-scored betas of one subject; None: from the targets.
            subject: Whose voxels they are; None: the only subject that the decoder knows.
            c: Semantic targets, text tokens (B, L, D).
            z: Initial targets, scaled latents (B, C, H, W).
            guidance: Guidance targets ``g02`` .. ``g12`` (or ``Linear-2`` ..), each (B, L, D); None guides nothing.
            kappa: Guidance scale; None: the settings'. 0 guides nothing.
            eta: Guided share of the steps; None: the settings'.
            generator: Of the start noise, then of the prior's seeds; one for all rows, or one for each. None: torch's.
            output_type: Pictures as PIL, as float arrays (B, H, W, 3), or as a tensor (B, 3, H, W), in [0,1].
            return_dict: Return an ``ImagePipelineOutput`` rather than a tuple.

        Raises:
            ConfigError: neither voxels nor c and z are given, or the voxels are no subject's that the decoder knows.
            DataError: shapes do not fit the networks, or a guidance target is missing.
        """
        given = c if voxels is None else voxels
        if given is None or (voxels is None) != (z is not None) or output_type not in ("pil", "np", "pt"):
            raise ConfigError(
                "A reconstruction needs voxels, or c and z.",
                expected="voxels; or c, z and (with guidance) guidance; output_type pil, np or pt",
                found=f"voxels {_shape(voxels)}, c {_shape(c)}, z {_shape(z)}, output_type {output_type}",
            )
        num = 1 if voxels is not None and voxels.ndim == 1 else len(given)
        sd = self._stable_diffusion
        generators = [*generator] if isinstance(generator, Sequence) else generator
        if isinstance(generators, list) and len(generators) != num:
            raise ConfigError("Generators and rows differ in number.", expected=num, found=len(generators))
        noise_BCHW = randn_tensor((num, *sd.latent_shape), generators, sd.device, torch.float32)
        found: dict[str, Any] = {"c": c, "z": z, "guidance": guidance or {}}
        if voxels is not None:
            found = self.decode_voxels(voxels, subject, _draw_seeds(generators, num))
        targets = {layer_name(name): values for name, values in found["guidance"].items()}
        kappa = 0.0 if not targets and kappa is None else kappa
        model = GuidedSampler(sd, self._guidance, self.sampler)
        with self.progress_bar(total=len(model.plan(kappa, eta).steps)) as bar:
            options = SampleOptions(noise_BCHW, observe=lambda _step: bar.update())
            requests = [NoiseRequest(row, 0, 0) for row in range(num)]
            result = model.sample(found["c"], found["z"], targets, requests, kappa, eta, options)
        images = grey_rows(result.images_BCHW, [each.row for each in result.failures])
        images = _converted(images, output_type, self.sampler)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode_voxels(
        self,
        voxels: torch.Tensor | npt.NDArray[np.float32],
        subject: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Any]:  # Any: keyword arguments of a call
        """Return what the decoder predicts of voxels, calibrated: keyword arguments c, z and guidance of a call.

        Args:
            voxels: (B, V) or (V,) z-scored betas of one subject.
            subject: Whose; None: the only subject that the decoder knows.
            seeds: One seed of the prior per row; None: 0, 1, 2 ...

        Raises:
            ConfigError: there is no decoder, it lacks c or z, or the voxels do not fit it.
        """
        if self.decoder is None:
            raise ConfigError(
                "Voxels need a trained decoder, and this pipeline has none.",
                todo="open a run folder of `nd train`, or set pipe.decoder = Decoder.from_pretrained(FOLDER)",
            )
        known = sorted(self.decoder.num_voxels)
        if subject is None and len(known) > 1:
            raise ConfigError("The decoder knows several subjects.", expected=f"subject= one of {known}")
        rows_BV = torch.as_tensor(voxels, dtype=torch.float32)
        rows_BV = rows_BV[None] if rows_BV.ndim == 1 else rows_BV
        if missing := {SEMANTIC, INITIAL} - {spec.name for spec in self.decoder.targets}:
            raise ConfigError(
                f"The decoder does not predict {', '.join(sorted(missing))}, which a reconstruction needs.",
                todo="train all targets: nd train RECIPE --all-targets, or decoder.heads=joint",
            )
        made = self.decoder.predict(rows_BV, subject or known[0], range(len(rows_BV)) if seeds is None else seeds)
        ready = {name: calibrated(values.cpu().numpy(), name, self.statistics) for name, values in made.items()}
        return _call_arguments({name: torch.from_numpy(values) for name, values in ready.items()})

    def embed(self, pictures: Sequence[Picture], captions: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the true targets of some pictures: keyword arguments c, z and guidance of a call.

        Args:
            pictures: PIL pictures, or uint8 arrays (H, W, 3); the largest square in the middle is taken.
            captions: What each shows; None: empty captions, so that c says nothing.
        """
        texts = captions if captions is not None else [""] * len(pictures)
        extractor = FrozenExtractor(self._stable_diffusion, self._clip, self.frozen, seed=0)
        rows = [
            extractor.extract(_square(picture)[None], [[text]], [row])
            for row, (picture, text) in enumerate(zip(pictures, texts, strict=True))
        ]
        return _call_arguments(
            {name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in rows[0]}
        )

    @property
    def _stable_diffusion(self) -> StableDiffusion:
        # what the folder's own file says and no more: keys that it leaves out mean other things to other classes
        defaults = self.scheduler.config.get("_use_default_values", ())
        schedule = {name: value for name, value in self.scheduler.config.items() if name not in defaults}
        return StableDiffusion(self.unet, self.vae, schedule, self.text_encoder, self.tokenizer)

    @property
    def _clip(self) -> ClipVision:
        return ClipVision(self.image_encoder)

    @property
    def _guidance(self) -> ClipGuidance:
        return ClipGuidance(self._clip, self.sampler.layer_scale, self.frozen.antialias, self.frozen.normalize)


def _of_folder(model: str | Path) -> _Parts:
    """Return what a Stable Diffusion folder, or one that ``save_pretrained`` wrote, says of the pipeline."""
    folder = resolve_folder(model)
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    is_own = index.get("_class_name") == NeuralDiffuserPipeline.__name__
    has_decoder, has_statistics = ((folder / DECODER / name).is_file() for name in (CONFIG, STATISTICS))
    return _Parts(
        model,
        folder / CLIP if is_own else index.get("guidance_model", Config.model_fields["guidance_model"].default),
        SamplerConfig.model_validate(index.get("sampler", {})),
        FrozenConfig.model_validate(index.get("frozen", {})),
        Decoder.load(folder / DECODER) if has_decoder else None,
        read_statistics(folder / DECODER) if has_statistics else {},
    )


def _of_run(run_dir: Path) -> _Parts:
    """Return what the recipe of a run says of the pipeline, with the run's decoder.

    Raises:
        CheckpointError: it has no decoder, or no statistics yet that its predictions are calibrated with.
    """
    values = yaml.safe_load((run_dir / RECIPE).read_text(encoding="utf-8"))
    config = Config.model_validate({name: value for name, value in values.items() if name in Config.model_fields})
    last = stage_dir(run_dir, max(config.training.stages))
    decoder = Decoder.load(model_dir(last, config.evaluation.checkpoint))
    layout, subject = Layout(run_dir, config.evaluation.protocol), config.training.target_subject
    folder = layout.decoded(recipe_point(config), subject) / STATISTICS_FOLDER
    if config.evaluation.z_calibration != "none" and not (folder / STATISTICS).is_file():
        raise CheckpointError(
            "The run has no statistics yet with which its decoder's predictions are calibrated.",
            where=str(folder / STATISTICS),
            todo=f"run `nd evaluate {run_dir / RECIPE}` first",
        )
    statistics = read_statistics(folder) if (folder / STATISTICS).is_file() else {}
    return _Parts(config.model, config.guidance_model, config.sampler, config.frozen, decoder, statistics)


def _load_scheduler(folder: Path) -> Any:  # Any: diffusers ships no types
    """Return the scheduler of a model folder, of the class that it names."""
    kind = read_json(folder / SCHEDULER_CONFIG).get("_class_name", "DDIMScheduler")
    return getattr(diffusers, kind).from_pretrained(folder)


def _shape(values: torch.Tensor | npt.NDArray[np.float32] | None) -> object:
    return None if values is None else tuple(values.shape)


def _draw_seeds(generator: list[torch.Generator] | torch.Generator | None, num: int) -> list[int]:
    """Return a seed per row, drawn from one generator or from each row's own."""
    generators = generator if isinstance(generator, list) else [generator] * num
    devices = [each.device if each is not None else "cpu" for each in generators]
    draws = zip(generators, devices, strict=True)
    return [int(torch.randint(2**31, (1,), generator=each, device=device)) for each, device in draws]


def _call_arguments(targets: Mapping[str, torch.Tensor]) -> dict[str, Any]:  # Any: keyword arguments
    """Return targets by name as the keyword arguments of a call."""
    guidance = {name: values for name, values in targets.items() if name not in (SEMANTIC, INITIAL)}
    return {"c": targets[SEMANTIC], "z": targets[INITIAL], "guidance": guidance}


def _square(picture: Picture) -> npt.NDArray[np.uint8]:
    """Return the largest square in the middle of a picture, uint8 (S, S, 3)."""
    image = ImageOps.exif_transpose(picture if isinstance(picture, Image.Image) else Image.fromarray(picture))
    side = min(image.size)
    return np.array(ImageOps.fit(image.convert("RGB"), (side, side)), dtype=np.uint8)


def _converted(images_BCHW: torch.Tensor, kind: str, config: SamplerConfig) -> Any:  # Any: as asked for
    """Return pictures of [0,1] as PIL, array or tensor."""
    if kind == "pt":
        return images_BCHW
    if kind == "np":
        return images_BCHW.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in to_uint8(images_BCHW, config.uint8)]
