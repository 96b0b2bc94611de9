from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nd_dist.diffusion.pictures import write_animation, write_strip
from nd_dist.pixels import to_uint8


def test_bytes_are_rounded_or_truncated() -> None:
    values = torch.tensor([0.0, 0.5, 0.999, 1.0, 0.0039]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 128, 255, 255, 1]
    assert to_uint8(values, "truncate")[0, 0, :, 0].tolist() == [0, 127, 254, 255, 0]
    assert to_uint8(values).shape == (1, 1, 5, 3)


def test_a_picture_that_is_not_finite_never_becomes_bytes() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), torch.nan))


def test_a_strip_has_a_row_per_sample_and_a_column_per_kept_step(tmp_path: Path) -> None:
    pictures = torch.zeros(5, 2, 3, 8, 8)
    pictures[2, 1] = 1.0
    write_strip(tmp_path / "strip.png", pictures, every=2)
    sheet = np.asarray(Image.open(tmp_path / "strip.png"))
    assert sheet.shape == (16, 24, 3)
    assert sheet[8:, 8:16].min() == 255
    assert sheet.sum() == 8 * 8 * 3 * 255


def test_an_animation_has_a_frame_per_step(tmp_path: Path) -> None:
    frames = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 8, 8)
    write_animation(tmp_path / "steps.gif", frames)
    with Image.open(tmp_path / "steps.gif") as animation:
        assert animation.n_frames == 4
    assert [path.name for path in tmp_path.iterdir()] == ["steps.gif"]
