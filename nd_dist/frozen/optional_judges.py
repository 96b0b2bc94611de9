"""Judges that only some papers use: LPIPS of a pair, and the features that FID and KID are made of.

Both are torchmetrics' networks with local weights; where weights or packages are missing, the metric is absent and
``absent_metrics`` says why. Legend: B pictures, C = 3 channels, H height, W width, D feature values.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nd_dist.errors import CheckpointError
from nd_dist.files import sha256_file
from nd_dist.frozen.judges import Judge, NetworkJudge, PairJudge, Preparation, has_phantom_judges
from nd_dist.pixels import Resize

LPIPS_WEIGHTS = "alexnet.safetensors"  # the very AlexNet of the two-way columns; torchmetrics brings LPIPS' own layers
FID_WEIGHTS = "inception_fid.safetensors"
FID_FEATURES = 2048
DISTRIBUTION = "inception_fid"

_NEEDS = {
    "lpips": (LPIPS_WEIGHTS, "torchvision"),
    "fid": (FID_WEIGHTS, "torch_fidelity"),
    "kid": (FID_WEIGHTS, "torch_fidelity"),
}


FIELD = ("alexnet_2", "alexnet_5", "inception", "clip", "effnet_b", "swav")


def absent_metrics(folder: Path | None) -> dict[str, str]:
    """Return metric -> why it cannot be computed with the weights in ``folder`` and the installed packages."""
    found = {}
    if folder is None or has_phantom_judges(folder):
        found = dict.fromkeys(FIELD, "no folder of metric networks was given (evaluation.judges_dir)")
    for metric, (weights, package) in _NEEDS.items():
        if folder is None:
            found[metric] = "no folder of metric networks was given (evaluation.judges_dir)"
        elif not (folder / weights).is_file():
            found[metric] = f"its weights are missing: {weights} in evaluation.judges_dir"
        elif importlib.util.find_spec(package) is None:
            found[metric] = f"the package {package} is not installed (extra `judges`)"
    return found


@dataclass(frozen=True)
class Lpips:
    """LPIPS with AlexNet, as torchmetrics computes it, one value a pair.

    Args:
        network: torchmetrics' LPIPS module.
        identity: Weights' hash.
        device: Where it runs.
    """

    network: Any  # torchmetrics has no types
    identity: str
    device: torch.device
    name: str = "lpips"

    @torch.inference_mode()
    def distances(self, recons_BCHW: Tensor, originals_BCHW: Tensor) -> Tensor:
        """Return LPIPS (B,) float64 of pixels in [0,1].

        Source: Zhang et al. (2018), version 0.1.
        """
        pair = [pixels.to(self.device).float() for pixels in (recons_BCHW, originals_BCHW)]
        distances_B: Tensor = self.network(pair[0], pair[1], normalize=True).flatten().double().cpu()
        return distances_B


def load_pair_judges(folder: Path, device: torch.device) -> list[PairJudge]:
    """Return LPIPS, or nothing where ``absent_metrics`` says that it is absent.

    Raises:
        CheckpointError: the weights are not AlexNet's.
    """
    if "lpips" in absent_metrics(folder):
        return []
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(pretrained=True, net="alex", pnet_rand=True, use_dropout=True)
    state = load_file(folder / LPIPS_WEIGHTS)
    renamed = {
        name: f"features.{name.rpartition('.')[0].rpartition('.')[2]}.{name.rpartition('.')[2]}"
        for name in network.net.state_dict()
    }  # slice2.3.weight -> features.3.weight
    if missing := sorted(set(renamed.values()) - set(state)):
        raise CheckpointError(
            "The weights of LPIPS do not fit AlexNet.", where=str(folder / LPIPS_WEIGHTS), expected=missing[:3]
        )
    network.net.load_state_dict({name: state[source] for name, source in renamed.items()})
    identity = f"{LPIPS_WEIGHTS}:{sha256_file(folder / LPIPS_WEIGHTS)[:16]}:torchmetrics-alex"
    return [Lpips(network.to(device).eval().requires_grad_(False), identity, device)]


def load_distribution_judge(folder: Path, device: torch.device) -> list[Judge]:
    """Return the Inception of FID and KID (its 2048 features), or nothing where they are absent.

    It is not torchvision's Inception-v3: weights and input scaling are those of the original TensorFlow graph.
    """
    if "fid" in absent_metrics(folder):
        return []
    from torchmetrics.image.fid import NoTrainInceptionV3

    with tempfile.TemporaryDirectory() as staging:  # the class only reads torch's own format, from a path
        torch.save(load_file(folder / FID_WEIGHTS), Path(staging) / "weights.pth")
        network = NoTrainInceptionV3(
            "inception-v3-compat", [str(FID_FEATURES)], feature_extractor_weights_path=f"{staging}/weights.pth"
        )
    network = network.to(device)

    def features(pixels_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = network((pixels_BCHW.clamp(0, 1) * 255).round().to(torch.uint8))
        return features_BD

    identity = f"{FID_WEIGHTS}:{sha256_file(folder / FID_WEIGHTS)[:16]}:{FID_FEATURES}"
    return [NetworkJudge(DISTRIBUTION, "distribution", identity, features, Preparation(Resize(None), "none", device))]
