"""The decoder: voxel encoders and the heads of all targets. Targets are data: one class, eight ``TargetSpec``s.

State-dict keys begin with ``voxels.`` (per-subject encoders, dropped when a model moves to another subject) or
``heads.`` (everything else).

Legend of shape suffixes: B samples, V voxels of one subject, H hidden width, L tokens, D token width, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch
from huggingface_hub import HfApi
from pydantic import ValidationError
from torch import nn

from nd_dist.checkpoint import FileRecord, read_tensors, write_tensors
from nd_dist.config import DecoderConfig
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.files import read_json, write_json, write_text
from nd_dist.frozen.folders import resolve_folder
from nd_dist.models.cards import model_card
from nd_dist.models.draws import Draws
from nd_dist.models.heads import LatentHead, LatentOutput, TokenHead, TokenOutput
from nd_dist.models.voxels import NormalizedEncoder, RidgeEncoder
from nd_dist.schema import TargetSpec
from nd_dist.seeds import unit_seed

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
SHARED = "shared"
VOXEL_PREFIX = "voxels."

HeadOutput = TokenOutput | LatentOutput


class Decoder(nn.Module):
    """Predicts every target of an image from one subject's voxels.

    heads=joint: one voxel encoder and shared space, all heads on it. heads=single: every target has its own encoder
    and space, as published.

    Args:
        config: Shapes and kinds.
        num_voxels: Subject -> number of voxels V.
        targets: The targets, in the order of the outputs.
        student: Whether the latent head has a student map (only with a teacher).

    Raises:
        ConfigError: no subject or no target is given, or a target's shape does not fit its head.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_voxels: Mapping[int, int],
        targets: Sequence[TargetSpec],
        student: bool = False,
    ) -> None:
        super().__init__()
        if not num_voxels or not targets:
            raise ConfigError("A decoder needs a subject and a target.", found=f"{dict(num_voxels)}, {list(targets)}")
        self.config, self.num_voxels, self.targets, self._student = config, dict(num_voxels), tuple(targets), student
        is_joint = config.heads == "joint"
        self.encodes_all_rows = False
        self.voxels = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        if is_joint:
            self.voxels[SHARED] = RidgeEncoder(num_voxels, config.hidden_size)
        for spec in self.targets:
            if not is_joint:
                self.voxels[spec.name] = _own_encoder(config, spec, num_voxels)
            is_latent = spec.role == "initial"
            self.heads[spec.name] = (
                LatentHead(config, spec, is_joint, student) if is_latent else TokenHead(config, spec)
            )

    def forward(
        self,
        voxels: Mapping[int, torch.Tensor],
        draws: Draws | None = None,
        latent_voxels: Mapping[int, torch.Tensor] | None = None,
        only: Collection[str] | None = None,
    ) -> dict[str, HeadOutput]:
        """Return every head's output.

        Args:
            voxels: Subject -> (B_s, V_s) z-scored betas; output rows follow the mapping's order. Where encoders are
                divided among the ranks of a training (``encodes_all_rows``) those of all; outputs are this rank's.
            draws: Random numbers of the B rows in training; none in evaluation (no dropout).
            latent_voxels: Other voxels for the latent head (it trains without MixCo); none: the same.
            only: Names of the targets to compute; none: all.
        """
        spaces: dict[tuple[str, bool], torch.Tensor] = {}
        outputs: dict[str, HeadOutput] = {}
        for spec in self.targets:
            if only is not None and spec.name not in only:
                continue
            is_latent = spec.role == "initial"
            key = (SHARED if self.config.heads == "joint" else spec.name, is_latent and latent_voxels is not None)
            if key not in spaces:
                chosen = latent_voxels if is_latent and latent_voxels is not None else voxels
                spaces[key] = self.voxels[key[0]](chosen, draws)
            outputs[spec.name] = self.heads[spec.name](spaces[key] if is_latent else spaces[key][:, None], draws)
        return outputs

    @property
    def draw_purposes(self) -> tuple[str, ...]:
        """Names of the draws of one number a sample that a training step makes."""
        heads = (head for head in self.heads.values() if isinstance(head, TokenHead))
        return tuple(purpose for head in heads if head.prior is not None for purpose in head.prior.purposes)

    def compile_heads(self) -> None:
        """Let torch compile the parts of the heads that are many small operations; names of weights stay."""
        for head in self.heads.values():
            if isinstance(head, LatentHead):
                head.upsampler.compile()
            elif isinstance(head, TokenHead):
                head.contrastive.compile()
                if head.prior is not None:
                    head.prior.network.compile()

    @torch.no_grad()
    def predict(
        self, voxels_BV: torch.Tensor, subject: int, seeds: Sequence[int], only: Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return every target's prediction (B, *shape), float32.

        Args:
            voxels_BV: (B, V) z-scored betas of one subject, averaged over repeats as the caller wishes.
            subject: Whose voxels they are.
            seeds: One seed per sample; all random numbers of its prediction derive from it, so that a prediction does
                not depend on its batch.
            only: Names of the targets to predict; none: all.

        Raises:
            ConfigError: the model has no encoder for the subject, or voxels or seeds do not fit.
        """
        self._check_voxels(voxels_BV, subject, len(seeds))
        weight = next(self.parameters())
        outputs = self({subject: voxels_BV.to(device=weight.device, dtype=weight.dtype)}, only=only)
        return {name: self._predicted(name, output, seeds).float() for name, output in outputs.items()}

    def _predicted(self, name: str, output: HeadOutput, seeds: Sequence[int]) -> torch.Tensor:
        """Return the prediction of one head: the latent, a sample of the prior, or the backbone without a prior."""
        if isinstance(output, LatentOutput):
            return output.latent_BCHW
        head = self.heads[name]
        assert isinstance(head, TokenHead)
        if head.prior is None:
            return output.backbone_BLD
        return head.prior.sample(output.backbone_BLD, [unit_seed(seed, "prior", name) for seed in seeds])

    def _check_voxels(self, voxels_BV: torch.Tensor, subject: int, num_seeds: int) -> None:
        """Raise a ConfigError where voxels, subject or seeds do not fit the model."""
        if subject not in self.num_voxels:
            raise ConfigError(
                "The model was not trained on this subject.", expected=sorted(self.num_voxels), found=subject
            )
        if tuple(voxels_BV.shape) != (num_seeds, self.num_voxels[subject]):
            raise ConfigError(
                "Voxels do not fit the model.",
                where=f"subject {subject}",
                expected=f"(seeds, voxels) = ({num_seeds}, {self.num_voxels[subject]})",
                found=tuple(voxels_BV.shape),
            )

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> str:
        """Write ``model.safetensors`` and ``config.json`` (last, with the weights' hash) and return that hash.

        Args:
            folder: Where to.
            state: State dict to write instead of the module's own (a trainer's consolidated weights).
        """
        record = write_tensors(folder / WEIGHTS, state if state is not None else self.state_dict())
        description = {
            "format": FORMAT,
            "decoder": self.config.model_dump(mode="json"),
            "num_voxels": {str(subject): count for subject, count in self.num_voxels.items()},
            "targets": [{"name": s.name, "role": s.role, "shape": list(s.shape)} for s in self.targets],
            "student": self._student,
            "weights": {"num_bytes": record.num_bytes, "sha256": record.sha256},
        }
        write_json(folder / CONFIG, description)
        return record.sha256

    def save_pretrained(self, folder: str | Path, evaluation: str = "") -> None:
        """Write the model and its card into a folder that ``from_pretrained`` reads.

        Args:
            folder: Where to.
            evaluation: What the card says of data, protocol and metrics (``nd_dist.evaluation_card(run_dir)``).
        """
        self.save(Path(folder))
        write_text(Path(folder) / CARD, model_card(self.num_voxels, self.targets, evaluation))

    @classmethod
    def from_pretrained(cls, model: str | Path) -> Self:
        """Return the decoder of a folder, or of a name in the local Hugging Face cache (`hf download NAME`).

        Raises:
            CheckpointError: as ``load``; nothing is downloaded.
        """
        return cls.load(resolve_folder(model))

    def push_to_hub(
        self, repo_id: str, evaluation: str = "", private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the model and its card to the Hugging Face Hub; return the address of the commit.

        Args:
            repo_id: ``NAME`` or ``ORGANISATION/NAME``; made where it does not exist.
            evaluation: As for ``save_pretrained``.
            private: Whether a new repository is private; None: as the organisation has it.
            token: Of the hub; None: that of `hf auth login`.
        """
        hub = HfApi(token=token)
        name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, evaluation)
            return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload decoder"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the decoder of a folder, on the CPU.

        Raises:
            CheckpointError: the folder is no model, or its weights do not fit its description.
        """
        description = _read_description(folder)
        decoder = cls._from_description(description, description["num_voxels"], folder)
        decoder._load_weights(_checked_weights(folder, description), folder)
        return decoder

    @classmethod
    def load_for_subjects(cls, folder: Path, num_voxels: Mapping[int, int]) -> Self:
        """Return the decoder of a folder with fresh voxel encoders for other subjects: how stage 2 starts.

        Every voxel encoder of the folder is dropped, also where a subject of it comes back.

        Raises:
            CheckpointError: as ``load``.
        """
        description = _read_description(folder)
        decoder = cls._from_description(description, num_voxels, folder)
        fresh = {name: value for name, value in decoder.state_dict().items() if name.startswith(VOXEL_PREFIX)}
        weights = _checked_weights(folder, description)
        kept = {name: value for name, value in weights.items() if not name.startswith(VOXEL_PREFIX)}
        decoder._load_weights({**fresh, **kept}, folder)
        return decoder

    @classmethod
    def merged(cls, folders: Sequence[Path]) -> Self:
        """Return one decoder of all targets from folders that were trained for some targets each (heads=single).

        Raises:
            CheckpointError: as ``load``, or the folders differ in subjects or network, or share a target.
        """
        parts = [cls.load(folder) for folder in folders]
        first, targets = parts[0], [spec for part in parts for spec in part.targets]
        for folder, part in zip(folders, parts, strict=True):
            if (part.config, part.num_voxels) != (first.config, first.num_voxels):
                raise CheckpointError(
                    "Decoders of different networks or subjects cannot become one.",
                    where=str(folder),
                    expected=f"{first.config}, voxels {first.num_voxels}",
                    found=f"{part.config}, voxels {part.num_voxels}",
                )
        if first.config.heads == "joint" or len({spec.name for spec in targets}) < len(targets):
            raise CheckpointError(
                "Only decoders with a network of its own for every target can become one.",
                where=", ".join(map(str, folders)),
                found=f"heads={first.config.heads}, targets {[spec.name for spec in targets]}",
            )
        decoder = cls(first.config, first.num_voxels, targets, any(part._student for part in parts))
        decoder._load_weights({name: value for part in parts for name, value in part.state_dict().items()}, folders[0])
        return decoder

    @classmethod
    def _from_description(cls, description: Mapping[str, object], num_voxels: object, folder: Path) -> Self:
        """Return a decoder with fresh weights from a checked ``config.json``."""
        try:
            config = DecoderConfig.model_validate(description["decoder"])
            voxels = {int(subject): int(count) for subject, count in dict(num_voxels).items()}  # type: ignore[call-overload]
            targets = [TargetSpec(t["name"], t["role"], tuple(t["shape"])) for t in description["targets"]]  # type: ignore[attr-defined]
            return cls(config, voxels, targets, bool(description["student"]))
        except (ValidationError, KeyError, TypeError) as error:
            raise CheckpointError("A model's config.json is damaged.", where=str(folder), found=str(error)) from error

    def _load_weights(self, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Load weights strictly, naming what does not fit."""
        own = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in weights.items()}
        if own != given:
            wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise CheckpointError(
                "The weights of a model do not fit its description.",
                where=f"{folder}: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}",
                expected=[own.get(name) for name in wrong[:5]],
                found=[given.get(name) for name in wrong[:5]],
            )
        self.load_state_dict(dict(weights))


def _own_encoder(config: DecoderConfig, spec: TargetSpec, num_voxels: Mapping[int, int]) -> nn.Module:
    """Return the voxel encoder of one target of its own."""
    if spec.role == "initial":
        return NormalizedEncoder(num_voxels, config.hidden_size, config.initial_voxel_dropout, spec.name)
    return RidgeEncoder(num_voxels, config.hidden_size)


def _read_description(folder: Path) -> dict[str, object]:
    """Return the content of a model folder's ``config.json``."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            "There is no trained model.", where=str(folder), expected=f"{CONFIG} and {WEIGHTS}", todo="run `nd train`"
        )
    description: dict[str, object] = read_json(folder / CONFIG)
    if description.get("format") != FORMAT:
        raise CheckpointError(
            "A model has another format.", where=str(folder), expected=FORMAT, found=description.get("format")
        )
    return description


def _checked_weights(folder: Path, description: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Return the weights of a model folder after comparing them with the hash in its description."""
    weights = read_tensors(folder / WEIGHTS)
    if (record := FileRecord.of(folder / WEIGHTS)) != FileRecord(**description["weights"]):  # type: ignore[arg-type]
        raise CheckpointError(
            "A model's weights are not those that its config.json describes.",
            where=str(folder),
            expected=description["weights"],
            found=record,
            todo="run the training command again; it exports the model again",
        )
    return weights
