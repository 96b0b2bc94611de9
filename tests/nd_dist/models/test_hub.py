"""A decoder goes to the Hugging Face Hub and comes back: a small server speaks the hub's upload protocol."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nd_dist.errors import CheckpointError
from nd_dist.models.decoder import Decoder
from tests.nd_dist.models.test_decoder import decoder
from tests.support.hub import Hub

NAME = "lab/decoder"


def test_a_pushed_decoder_is_found_by_its_name_once_it_is_in_the_cache(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    address = model.push_to_hub(NAME, "## Metrics\n\nPixCorr .5\n", token="hf_secret")
    assert address.endswith(f"/{NAME}/commit/1")
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}
    assert hub.files["README.md"].endswith(b"## Metrics\n\nPixCorr .5\n")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        Decoder.from_pretrained(NAME)
    snapshot = tmp_path / "models--lab--decoder" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name, content in hub.files.items():
        (snapshot / name).write_bytes(content)
    again = Decoder.from_pretrained(NAME)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
