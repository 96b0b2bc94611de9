"""Were these targets made by the networks that will use them? A pure comparison of two records.

A target's source is the fingerprint of the extractor that made it (see ``extractor.FrozenExtractor.fingerprint``).
Each role depends on some of its keys only: another VAE does not spoil guidance features.
"""

from __future__ import annotations

from collections.abc import Mapping

from nd_dist.errors import DataError
from nd_dist.schema import TARGETS, Role, role_of

MISSING = "not recorded"

RELEVANT_KEYS: Mapping[Role, tuple[str, ...]] = {
    "semantic": ("text_encoder_sha256", "tokenizer_sha256"),
    "initial": ("vae_sha256", "vae_encode", "picture_size"),
    "guidance": ("guidance_model_sha256", "guidance_layers", "guidance_size", "normalize", "antialias"),
}


def check_compatible(
    index_feature_sources: Mapping[str, Mapping[str, object]], fingerprint: Mapping[str, object]
) -> None:
    """Refuse targets that other networks or other settings made, before hours of sampling.

    Args:
        index_feature_sources: Store name -> source, as the index of the shards records it; targets are looked at.
        fingerprint: Fingerprint of the extractor that this run would use.

    Raises:
        DataError: a relevant key differs; the message names the target, the key and both values.
    """
    for name, source in sorted(index_feature_sources.items()):
        if name not in TARGETS:  # pictures are made by no network
            continue
        for key in RELEVANT_KEYS[role_of(name)]:
            stored, wanted = source.get(key, MISSING), fingerprint.get(key, MISSING)
            if stored != wanted:
                raise DataError(
                    f"Target {name} was made with another {key} than this run uses.",
                    where=f"target {name} of the shards",
                    expected=f"{key}={wanted!r} (this run: frozen.*, model, guidance_model)",
                    found=f"{key}={stored!r} (the shards)",
                    todo="use the settings and models the shards were packed with, or repack them",
                )
