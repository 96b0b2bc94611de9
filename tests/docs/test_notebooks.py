"""The notebooks run from the first cell to the last, in an empty folder, and say what their text says."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.documents import DOCS


@pytest.mark.launch
def test_the_notebook_goes_from_shards_to_a_score_above_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(DOCS / "notebooks" / "from-shards-to-a-score.ipynb", as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    found = {name: (float(score), float(chance)) for name, score, chance in re.findall(SCORE, printed)}
    assert found["without"][0] > found["without"][1] + 0.2
    assert found["with"][0] > found["without"][0], "guidance helps, as the text shows"


SCORE = re.compile(r"PixCorr (\w+) +guidance: (-?[\d.]+) +chance: (-?[\d.]+)")
