from pathlib import Path

import pytest

from launch.plans.tools import find_tools


def test_programs_that_cannot_be_run_count_as_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("mpirun", "ompi_info"):
        program = tmp_path / "bin" / name
        program.write_bytes(b"\x7fELF of another processor")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    tools = find_tools()
    assert (tools.mpirun, tools.openmpi) == ("", "")
    (tmp_path / "bin" / "mpirun").unlink()
    (tmp_path / "bin" / "mpirun").symlink_to(tmp_path / "nowhere")
    assert find_tools().openmpi == ""
