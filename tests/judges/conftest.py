"""The field's judges, where torchvision is installed: `python -m pytest tests/judges` in an environment that has it.

torchvision's wheel from PyPI is built for CUDA. Beside a CPU torch it cannot be imported (nor can what imports it)
until the two operators that it expects are declared, which this does before anything else is imported.
"""

import importlib.util

import pytest
import torch

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

if HAS_TORCHVISION and not torch.cuda.is_available():
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + SCHEMA)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="torchvision is not installed (extra judges)")
    for item in items:
        if not HAS_TORCHVISION and "tests/judges" in str(item.path):
            item.add_marker(skip)
