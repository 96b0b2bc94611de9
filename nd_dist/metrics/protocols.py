"""Named metric protocols as frozen values: what each published evaluation really computed, so that numbers compare.

A protocol says how pictures are sized, which SSIM, which weights, which distractors and how repeats are reduced; all
of that is applied. What its authors also did when they *made* the reconstructions (``Practice``) is recorded beside it
and listed as a departure where this evaluation does otherwise. Values read in the released code; see each ``source``.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from nd_dist.errors import ConfigError
from nd_dist.metrics.identification import Distractors
from nd_dist.metrics.pixel import SsimKind
from nd_dist.pixels import Backend, Resize
from nd_dist.plugins import registered

RepeatRule = Literal["mean_of_scores", "first", "mean_correlation"]
BrainInput = Literal["mean_voxels", "mean_outputs", "single_trial", "unknown"]


@dataclass(frozen=True)
class JudgeSettings:
    """Input of the field's judges, which repositories set differently (part of a protocol).

    Args:
        alexnet, inception, efficientnet, clip, swav: Side in pixels of each network's input.
        backend: Resize on tensors or through Pillow.
        antialias: Antialiasing of the tensor resize.
        efficientnet_weights: ImageNet weights V1 or V2 of EfficientNet-B1: two different "EffNet-B".
    """

    alexnet: int
    inception: int
    efficientnet: int
    clip: int
    swav: int
    backend: Backend
    antialias: bool
    efficientnet_weights: Literal["V1", "V2"]


@dataclass(frozen=True)
class Practice:
    """How the authors made and chose reconstructions; not part of the metric, but part of their number.

    Args:
        brain_input: Voxels averaged over repeats, model outputs averaged, or one random trial.
        samples: Reconstructions made per image; 0 where the protocol leaves that open.
        choice: How one of them was chosen or how they were reduced.
        blending: What was mixed into the reconstruction before scoring.
    """

    brain_input: BrainInput
    samples: int
    choice: str = "as here"
    blending: str = "none"


@dataclass(frozen=True)
class Protocol:
    """One way to compute the field's table.

    Args:
        name: Value of ``evaluation.protocol``; stands beside every number.
        source: Where it was read.
        recon_first, original_first: Resize of each set before anything else, judges included (size None: none).
        recon_pixels: Then the reconstructions, for PixCorr and SSIM; size None takes the original's size.
        original_pixels: The same for the originals; size None leaves them as they are.
        ssim: True two-dimensional SSIM, or the column-wise one of scikit-image up to 0.19.
        judges: Input sizes, backend and weights of the metric networks.
        distractors: Whose features the two-way identification compares against.
        repeats: How several reconstructions of an image become one number.
        clamp: Whether reconstructions are clamped to [0,1] (floats that were handed in; a PNG's are within).
        num_test_images: Test images of NSD in that protocol (1000; 982 in the 37-session release); 0: open.
        practice: How the authors made the reconstructions.
    """

    name: str
    source: str
    recon_first: Resize
    original_first: Resize
    recon_pixels: Resize
    original_pixels: Resize
    ssim: SsimKind
    judges: JudgeSettings
    distractors: Distractors
    repeats: RepeatRule
    num_test_images: int
    practice: Practice
    clamp: bool = True

    def describe(self) -> dict[str, Any]:
        """Return the protocol as a JSON value."""
        return dataclasses.asdict(self)

    def settings(self) -> dict[str, Any]:
        """Return the part that decides numbers of PNGs, as a JSON value: all but texts and the authors' practice."""
        words = ("name", "source", "practice", "num_test_images", "clamp")
        return {key: value for key, value in self.describe().items() if key not in words}

    def departures(self, num_images: int, num_repeats: int) -> list[str]:
        """Return what this evaluation does otherwise than the protocol's authors, one sentence each."""
        practice = self.practice
        found = []
        if practice.brain_input != "mean_voxels":
            found.append(
                f"brain input: {practice.brain_input.replace('_', ' ')} there; here voxels averaged over repeats"
            )
        if practice.blending != "none":
            found.append(f"blending there: {practice.blending}; here none")
        used = 1 if self.repeats == "first" else num_repeats
        if practice.samples not in (0, used) or practice.choice != "as here":
            chosen = f" ({practice.choice})" if practice.choice != "as here" else ""
            found.append(f"samples per image there: {practice.samples}{chosen}; here {used} of {num_repeats}")
        if self.num_test_images not in (0, num_images):
            found.append(f"test images there: {self.num_test_images}; here {num_images}")
        return found


def _tensor(size: int | None, antialias: bool) -> Resize:
    return Resize(size, "tensor", antialias)


def _field(backend: Backend, antialias: bool, weights: Literal["V1", "V2"], **sizes: int) -> JudgeSettings:
    return JudgeSettings(backend=backend, antialias=antialias, efficientnet_weights=weights, **sizes)


_MINDEYE_JUDGES = _field("tensor", False, "V2", alexnet=256, inception=342, efficientnet=255, clip=224, swav=224)
_DIFFUSER_JUDGES = _field("pil", True, "V1", alexnet=224, inception=224, efficientnet=224, clip=224, swav=224)

_MINDEYE2 = Protocol(
    name="mindeye2",
    source="MedARC-AI/MindEyeV2, final_evaluations notebook (scikit-image 0.22, torchvision 0.16: no antialias)",
    recon_first=_tensor(256, False),
    original_first=_tensor(256, False),
    recon_pixels=_tensor(425, False),
    original_pixels=_tensor(425, False),
    ssim="2d",
    judges=_MINDEYE_JUDGES,
    distractors="real",
    repeats="first",
    num_test_images=1000,
    practice=Practice("mean_outputs", 1, blending="0.75 x reconstruction + 0.25 x blurry reconstruction"),
    clamp=False,
)

_BRAIN_DIFFUSER = Protocol(
    name="brain-diffuser",
    source="ozcelikfu/brain-diffuser, eval_extract_features.py and evaluate_reconstruction.py (scikit-image 0.17.2)",
    recon_first=Resize(None, "pil"),
    original_first=Resize(None, "pil"),
    recon_pixels=Resize(425, "pil", filter="bicubic"),
    original_pixels=Resize(425, "pil", filter="bicubic"),  # NSD's are 425 already and stay untouched
    ssim="columns",
    judges=_DIFFUSER_JUDGES,
    distractors="real",
    repeats="first",
    num_test_images=982,
    practice=Practice("mean_voxels", 1),
)

_ND = Protocol(
    name="nd",
    source="this project: originals untouched, reconstructions brought to their size (antialiased), all repeats count",
    recon_first=_tensor(None, True),
    original_first=_tensor(None, True),
    recon_pixels=_tensor(None, True),
    original_pixels=_tensor(None, True),
    ssim="2d",
    judges=_field("tensor", True, "V2", alexnet=224, inception=299, efficientnet=240, clip=224, swav=224),
    distractors="real",
    repeats="mean_of_scores",
    num_test_images=0,
    practice=Practice("mean_voxels", 0),
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _ND,
        dataclasses.replace(
            _MINDEYE2,
            name="paper",
            source="NeuralDiffuser releases no metric code: MindEye2's sizes and weights on 1000 images, five repeats",
            repeats="mean_of_scores",
            practice=Practice("mean_voxels", 5),
        ),
        _MINDEYE2,
        dataclasses.replace(
            _MINDEYE2,
            name="mindeye1",
            source="MedARC-AI/fMRI-reconstruction-NSD, Reconstruction_Metrics (scikit-image 0.20, torchvision 0.15)",
            num_test_images=982,
            practice=Practice("mean_voxels", 16, "the best picked by the pipeline"),
            clamp=True,
        ),
        dataclasses.replace(
            _MINDEYE2,
            name="mindbridge",
            source="littlepure2333/MindBridge, cal_metrics: MindEye1's without the first resize (SSIM: 2-D assumed)",
            recon_first=_tensor(None, False),
            original_first=_tensor(None, False),
            num_test_images=982,
            practice=Practice("mean_voxels", 8, "the best picked by the pipeline"),
            clamp=True,
        ),
        _BRAIN_DIFFUSER,
        dataclasses.replace(
            _BRAIN_DIFFUSER,
            name="dynadiff",
            source="facebookresearch/dynadiff, evaluation of 2025-05 (scikit-image 0.24, PIL transforms)",
            original_first=Resize(512, "pil"),
            ssim="2d",
            distractors="reconstruction",
            num_test_images=1000,
            practice=Practice("single_trial", 1, blending="faces blurred"),
        ),
        dataclasses.replace(
            _BRAIN_DIFFUSER,
            name="takagi",
            source="yu-takagi/StableDiffusionReconstruction, identification.py; it has no PixCorr or SSIM (ours: 2-D)",
            ssim="2d",
            distractors="reconstruction",
            repeats="mean_correlation",
            practice=Practice("mean_voxels", 5),
        ),
    )
}


def protocol_named(name: str) -> Protocol:
    """Return a protocol by name, of ``PROTOCOLS`` or of another package, which may build its own on one of these.

    Raises:
        ConfigError: no protocol has that name.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    added: dict[str, Protocol] = {protocol.name: protocol for protocol in registered("protocols").values()}
    if name in added:
        return added[name]
    known = [*PROTOCOLS, *added]
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        "The metric protocol does not exist.",
        where="evaluation.protocol",
        expected=f"one of {', '.join(known)}",
        found=name,
        todo=f"use evaluation.protocol={near[0]}" if near else "",
    )
