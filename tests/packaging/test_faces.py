"""What the packages hand out, imported as a user does: in a folder that holds packed shards under their usual name."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT = re.compile(r"^[ >]*from ((?:nd_dist|shards|launch)[\w.]*) import ([\w, ]+)", re.M)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTED = sorted(
    {
        f"from {module} import {name.strip().split(' ')[0]}"
        for page in PAGES
        for module, names in IMPORT.findall(page.read_text())
        for name in names.split(",")
    }
)


@pytest.mark.parametrize("package", ["nd_dist", "shards"])
def test_every_name_of_a_face_can_be_imported(package: str) -> None:
    face = importlib.import_module(package)
    for name in face.__all__:
        assert getattr(face, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        face.Nonsense  # noqa: B018 - the look-up is what is tested


def test_documented_imports_work_in_a_folder_that_holds_packed_shards(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    lines = [*DOCUMENTED, *(f"from {package} import *" for package in ("nd_dist", "shards"))]
    assert any("ShardReader" in line for line in DOCUMENTED)
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}  # no PYTHONPATH
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_face_alone_imports_nothing_heavy() -> None:
    code = "import sys, nd_dist, shards; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
