"""pytest plugin (``-p tests.support.fake_gpu.plugin``): loads the library before anything imports torch."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from tests.support.fake_gpu.build import library

assert "torch" not in sys.modules, "torch asks for CUDA's hooks once: the library has to be there before"
ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without the interpreter's own end, in which torch would take the pretended device apart."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(getattr(config, "pretended_gpu_status", 1)))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember how the session ended."""
    session.config.pretended_gpu_status = exitstatus  # type: ignore[attr-defined]
