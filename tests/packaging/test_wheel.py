"""The wheel holds exactly the three packages, and `nd` runs from another folder without the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():  # a copy: building in the checkout would leave build folders there
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(out_dir),
        str(source),
    ]  # sdist, wheel of it
    subprocess.run(command, check=True, capture_output=True)
    return next(out_dir.glob("*.whl"))


def test_the_wheel_contains_exactly_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nd_dist", "launch", "shards"}


def test_the_constraints_without_torch_are_the_tested_ones() -> None:
    tested, beside = (
        [line for line in (ROOT / "constraints" / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("tested.txt", "beside-torch.txt")
    )
    assert [line.partition("==")[0] for line in tested] == ["-c beside-torch.txt", "torch"]
    assert not {line.partition("==")[0] for line in beside} & {"torch", "torchvision", "triton"}
    assert len(beside) > 80
    assert not any(line.startswith("nvidia") for line in beside)


def test_the_wheel_contains_recipes_licence_and_type_markers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in ("launch/recipes/demo.yaml", "launch/recipes/paper.yaml", "nd_dist/py.typed"):
        assert name in names
    for licence in ("LICENSE", "LICENSES.md"):
        assert any(name.endswith(f"licenses/{licence}") for name in names)


def test_nd_runs_from_the_unpacked_wheel_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['nd', '--version']; "
        "from launch.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("nd_dist ")
