"""z's contrastive term with a teacher: augmentation, folder, a real training with and without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import ConvNextConfig, ConvNextModel

from nd_dist.errors import CheckpointError
from nd_dist.frozen.augment import PURPOSES, augment
from nd_dist.frozen.convnext_teacher import MEAN, PROJECTOR, STD, ConvNextTeacher
from nd_dist.models.decoder import Decoder
from nd_dist.models.draws import Draws
from tests.nd_dist.training.one_rank import losses, run
from tests.ranks.recipe import small_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ConvNeXt of the same build, in the layout of the real one; it makes 8 times smaller maps."""
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = ConvNextConfig(patch_size=4, num_stages=2, depths=[1, 1], hidden_sizes=[8, 16])
    ConvNextModel(config).save_pretrained(path)
    linears = {0: (512, 16), 3: (512, 512), 6: (512, 512)}
    weights = {f"layers.{i}.weight": torch.randn(shape) / shape[1] ** 0.5 for i, shape in linears.items()}
    weights |= {f"layers.{i}.bias": torch.zeros(512) for i in (0, 1, 3, 4)}
    weights |= {f"layers.{i}.weight": torch.ones(512) for i in (1, 4)}
    save_file({"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16), **weights}, path / PROJECTOR)
    return path


def pictures(num: int, size: int = 24) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1))


def draws(*samples: int, step: int = 3) -> tuple[dict[str, torch.Tensor], list[int]]:
    numbers = Draws.host_uniforms(5, step, PURPOSES, np.array(samples))
    return dict(zip(PURPOSES, numbers, strict=True)), [2, 0, 3, 1]


def test_rows_are_the_projected_positions_of_the_networks_last_map(folder: Path) -> None:
    teacher = ConvNextTeacher(folder)
    x = pictures(2, 32)
    maps = ConvNextModel.from_pretrained(folder)(
        (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    )
    rows = teacher.layers(teacher.norm(maps.last_hidden_state.permute(0, 2, 3, 1).reshape(2, 16, 16)))
    torch.testing.assert_close(teacher(x), rows)
    assert (teacher.downscale, teacher.width) == (8, 512)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_folder_without_a_whole_projector_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file({"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}, tmp_path / PROJECTOR)
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight"):
        ConvNextTeacher(tmp_path)


def test_an_augmentation_depends_on_step_and_sample_alone() -> None:
    batch = pictures(4)
    whole = augment(batch, *draws(0, 1, 2, 3))
    torch.testing.assert_close(augment(batch[2:], *draws(2, 3)), whole[2:])
    assert not torch.equal(augment(batch, *draws(0, 1, 2, 3, step=4)), whole)
    assert not torch.equal(augment(batch, *draws(4, 5, 6, 7)), whole)


def test_augmented_pictures_keep_shape_and_range_and_most_of_them_change() -> None:
    batch = pictures(64)
    changed = augment(batch, *draws(*range(64)))
    assert changed.shape == batch.shape
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1 + 1e-6
    assert float((changed - batch).abs().mean(dim=(1, 2, 3)).min()) > 0.005  # every crop moves pixels


def test_a_grey_picture_stays_grey_whatever_hue_and_saturation_do() -> None:
    grey = pictures(16)[:, :1].expand(-1, 3, -1, -1)
    changed = augment(grey, *draws(*range(16)))
    torch.testing.assert_close(changed[:, 0], changed[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(changed[:, 0], changed[:, 2], atol=1e-5, rtol=0)


def test_with_a_teacher_the_term_is_trained_and_the_student_is_saved(folder: Path, tmp_path: Path) -> None:
    config = small_recipe(tmp_path / "with", targets=("z",), steps=(3, 2), teacher=str(folder))
    events = run(config)
    assert "term_off" not in {event["event"] for event in events}
    terms = [event["terms"] for event in events if event["event"] == "train_step"]
    assert all(set(found) == {"z/l1", "z/contrastive"} for found in terms)
    model = Decoder.load(config.run_dir / "checkpoints" / "stage2" / "model")
    assert any(".student." in name for name in model.state_dict())

    plain = small_recipe(tmp_path / "without", targets=("z",), steps=(3, 2))
    off = run(plain)
    assert next(event for event in off if event["event"] == "term_off")["term"] == "z/contrastive"
    assert losses(off)[1, 0] < losses(events)[1, 0]  # the same draws, one term less
