"""Builds the sprites of ``shards/phantom/data`` (npz and json) from two npm archives; a maintainer runs it once.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && npm pack emojibase-data@17.0.0
    python -m tools.build_sprites lobehub-fluent-emoji-3d-1.1.0.tgz emojibase-data-17.0.0.tgz

The first archive holds the pictures (256x256 RGBA), the second names and groups them. ``data/selection.json`` says
what is kept: things of the world, but no signs, symbols, clocks, flags, faces, hands and people, no weapons, no second
versions of a kept thing, nothing very thin.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from nd_dist.files import atomic_path, read_json, write_json
from shards.phantom.sprites import DATA_DIR

SPRITE_SIZE = 48
"""Pixels on each side of a packed sprite."""


@dataclass(frozen=True)
class Selection:
    """What ``data/selection.json`` says.

    Args:
        super_class: Unicode subgroup -> super-class of the phantom; other subgroups are left out.
        only: Subgroup -> the labels that are kept of it; other subgroups keep all that is not left out.
        left_out: Labels that are left out.
        new_name: Label -> a shorter or plainer name; the others keep their label in lower case.
    """

    super_class: dict[str, str]
    only: dict[str, list[str]]
    left_out: list[str]
    new_name: dict[str, str]

    def choose(self, labels: list[dict[str, object]], subgroups: dict[str, str]) -> list[tuple[str, str, str]]:
        """Return (file stem, name, super-class) of every thing that is kept, in Unicode order.

        Args:
            labels: emojibase's ``en/data.json``: ``label``, ``hexcode``, ``subgroup``.
            subgroups: emojibase's ``subgroups``: id -> key.
        """
        chosen = []
        for entry in labels:
            key, label = subgroups.get(str(entry.get("subgroup")), ""), str(entry["label"])
            if key in self.super_class and label in self.only.get(key, [label]) and label not in self.left_out:
                name = self.new_name.get(label, label.lower().replace("-", " "))
                chosen.append((str(entry["hexcode"]).lower(), name, self.super_class[key]))
        return chosen


def shrink(webp: bytes) -> npt.NDArray[np.uint8]:
    """Return one sprite: cropped to its opaque part, scaled to fit, centred; (48, 48, 4) RGBA."""
    image = Image.open(io.BytesIO(webp)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox())
    scale = SPRITE_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(small, ((SPRITE_SIZE - width) // 2, (SPRITE_SIZE - height) // 2))
    pixels = np.asarray(canvas).copy()
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def build(pictures_tgz: Path, names_tgz: Path, out_dir: Path) -> int:
    """Write ``sprites.npz`` (``rgba``: (N, 48, 48, 4) uint8) and ``sprites.json`` to ``out_dir``; return N."""
    with tarfile.open(names_tgz) as archive:
        labels = json.load(_member(archive, "package/en/data.json"))
        subgroups = json.load(_member(archive, "package/meta/groups.json"))["subgroups"]
    with tarfile.open(pictures_tgz) as archive:
        files = {Path(member.name).stem: member for member in archive if member.name.endswith(".webp")}
        sprites, things = [], []
        selection = Selection(**read_json(DATA_DIR / "selection.json"))
        for stem, name, super_class in selection.choose(labels, subgroups):
            file = next((form for form in (stem, stem.removesuffix("-fe0f"), f"{stem}-fe0f") if form in files), None)
            if file is not None:
                sprites.append(shrink(_member(archive, files[file].name).read()))
                things.append({"name": name, "super_class": super_class, "source": f"assets/{file}.webp"})
    with atomic_path(out_dir / "sprites.npz") as part, open(part, "wb") as stream:
        np.savez_compressed(stream, rgba=np.stack(sprites))
    write_json(out_dir / "sprites.json", {"source": "@lobehub/fluent-emoji-3d 1.1.0", "things": things})
    return len(things)


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedIOBase:
    """Return an open file of an archive."""
    stream = archive.extractfile(name)
    if stream is None:
        raise FileNotFoundError(f"{name} is not a file of {archive.name!r}")
    return stream  # type: ignore[return-value]  # typeshed: IO[bytes]; it is a BufferedReader


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), DATA_DIR)
