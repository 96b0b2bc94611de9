from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder as VaeDecoder

from nd_dist.models.upsampler import Upsampler


@pytest.mark.parametrize(
    ("channels_in", "channels", "groups"), [(64, (64, 128, 256), 32), (8, (8, 12, 20), 4), (6, (6, 6), 2)]
)
def test_the_upsampler_computes_what_diffusers_decoder_computes(
    channels_in: int, channels: tuple[int, ...], groups: int
) -> None:
    torch.manual_seed(0)
    theirs = VaeDecoder(
        in_channels=channels_in,
        out_channels=4,
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=groups,
    ).double()
    ours = Upsampler(channels_in, 4, channels).double()
    ours.load_state_dict(theirs.state_dict())
    maps = torch.randn(2, channels_in, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(maps), theirs(maps), rtol=1e-10, atol=1e-10)
