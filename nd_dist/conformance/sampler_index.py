"""Which sampler cases a folder holds: from its index files, and from the names of files that no index lists.

An index entry says what a case was made with; what it leaves out is read from the file's name
``s{sample}_k{kappa}_e{eta}_sag{scale}_{f64|f32}.npz``, and then from the published settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nd_dist.config import SamplerConfig
from nd_dist.errors import DataError
from nd_dist.files import read_json

INDEX_PATTERN = "*index*.json"
INPUTS = "inputs.npz"
_NUMBER = r"([0-9.]+(?:[eE][+-]?[0-9]+)?)"
_NAME = re.compile(rf"^s(\d+)_k{_NUMBER}_e{_NUMBER}_sag{_NUMBER}_(f\d+)")
_ALIASES = {"sag_scale": "sag", "cfg_scale": "cfg", "steps": "num_steps"}
_FACTS = ("final_abs_mean", "guided_steps")


@dataclass(frozen=True)
class SamplerCase:
    """What one case was made with.

    Args:
        file: Name of the case's file.
        sample: Row of the inputs.
        kappa: Guidance scale.
        eta: Guided share of the steps.
        config: Everything else that the sampler is told.
        dtype: ``f64`` or ``f32``.
        inputs: Name of the file with the inputs.
        facts: Numbers about the result that the index holds itself.
        unknown: Keys of the entry that nobody reads.
    """

    file: str
    sample: int
    kappa: float
    eta: float
    config: SamplerConfig
    dtype: str
    inputs: str
    facts: Mapping[str, float]
    unknown: tuple[str, ...] = ()


def listed_entries(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file name, entry) of every case: the indices' own, then files that only their name describes.

    Raises:
        DataError: an index is no list of entries with a file name.
    """
    seen = set()
    for index in sorted(folder.glob(INDEX_PATTERN)):
        for entry in _entries(index):
            seen.add(entry["file"])
            yield entry["file"], entry
    for path in sorted(folder.glob("*.npz")):
        if path.name not in seen and _NAME.match(path.name):
            yield path.name, {"file": path.name}


def _entries(index: Path) -> list[Mapping[str, Any]]:
    content = read_json(index)
    entries = content.get("cases") if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) and "file" in entry for entry in entries):
        raise DataError(
            "An index of sampler cases is not a list of cases.",
            where=str(index),
            expected='[{"file": "NAME.npz", "sample": 0, "kappa": 0, "eta": 0, "sag": 0.75, "cfg": 7.5, ...}, ...]',
            found=type(content).__name__,
        )
    return entries


def read_case(entry: Mapping[str, Any]) -> SamplerCase:
    """Return a case's settings from its entry and its name.

    Raises:
        DataError: neither says the sample, kappa, eta, SAG scale or dtype.
    """
    known = {_ALIASES.get(key, key): value for key, value in entry.items()}
    if match := _NAME.match(str(known["file"])):
        known = {**dict(zip(("sample", "kappa", "eta", "sag", "dtype"), match.groups(), strict=True)), **known}
    if lacking := [key for key in ("sample", "kappa", "eta", "sag", "dtype") if key not in known]:
        raise DataError(
            "A sampler case does not say what it was made with.",
            where=str(known["file"]),
            expected=f"{', '.join(lacking)} in the index, or s0_k0_e0_sag0.75_f64.npz as its name",
            found=", ".join(sorted(entry)),
        )
    settings = {"sag_scale": float(known.pop("sag")), "cfg_scale": float(known.pop("cfg", SamplerConfig().cfg_scale))}
    settings |= {key: known.pop(key) for key in ("num_steps", "strength") if key in known}
    facts = {key: float(known.pop(key)) for key in _FACTS if key in known}
    return SamplerCase(
        file=str(known.pop("file")),
        sample=int(known.pop("sample")),
        kappa=float(known.pop("kappa")),
        eta=float(known.pop("eta")),
        config=SamplerConfig.model_validate(settings),
        dtype=str(known.pop("dtype")),
        inputs=str(known.pop("inputs", INPUTS)),
        facts=facts,
        unknown=tuple(sorted(known)),
    )
