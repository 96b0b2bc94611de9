"""`nd pack --dry-run`, `nd verify`, `nd verify --repair` and `nd export` as a user types them."""

import shutil
from pathlib import Path

import pytest

from nd_dist.frozen.folders import resolve_folder
from shards.format.index import Index
from tests.nd_dist.frozen.toy_folders import hash_files
from tests.shards.support import folder_bytes
from tests.support.command_line import nd, nd_process
from tests.support.file_server import FileServer

pytestmark = pytest.mark.launch
SMALL = [
    "phantom.num_subjects=3", "phantom.num_sessions=2", "phantom.trials_per_session=24", "phantom.num_shared=6",
    "phantom.num_voxels=60", "data.subjects=[1,2,3]", "data.targets=[z]", "data.int8_targets=[z]",
]  # fmt: skip


def words_of(folder: Path) -> list[str]:
    return [*SMALL, f"nsd_root={folder / 'nsd'}", f"shards_dir={folder / 'shards'}", f"run_dir={folder / 'run'}"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a phantom, and its shards as `nd pack` wrote them."""
    folder = tmp_path_factory.mktemp("packed")
    for words in (["phantom", str(folder / "nsd"), *SMALL], ["pack", "demo", *words_of(folder)]):
        result = nd(*words)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_dry_run_of_packing_says_shards_bytes_and_minutes(packed: Path, tmp_path: Path) -> None:
    words = [*words_of(packed), f"shards_dir={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}"]
    result = nd("pack", "demo", *words, "--dry-run", "--ranks", "2")
    assert result.returncode == 0, result.stderr
    num_shards = len(list((packed / "shards").rglob("*.tar")))
    assert f"{num_shards} shards, " in result.stdout
    assert " MB: 120 trials of 3 subjects" in result.stdout
    assert "not counted" not in result.stdout
    assert "minutes on 2 rank(s)" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_without_networks_is_refused_and_still_tells_the_rest(packed: Path) -> None:
    result = nd("pack", "demo", *words_of(packed), "model=no-such-model", "--dry-run")
    assert result.returncode == 3, result.stderr
    assert "would be refused: A model is neither a folder" in result.stdout
    assert "networks are not on this machine" in result.stdout
    assert "targets not counted" in result.stdout


def test_one_command_repairs_what_is_damaged_with_the_recipe_that_the_folder_keeps(
    packed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed / "shards", tmp_path / "moved"))
    (tmp_path / "nsd").symlink_to(packed / "nsd")  # a data set beside the shards is found
    shard = folder / "trials/subj02/nsd-s02-e01.tar"
    right = shard.read_bytes()
    shard.write_bytes(right[:700] + b"x" + right[701:])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar") if path != shard}
    broken = nd("verify", str(folder))
    assert broken.returncode == 3
    assert "trials/subj02/nsd-s02-e01.tar, sample s02_e01" in broken.stdout
    assert "nd verify --repair" in broken.stderr
    result = nd("verify", str(folder), "--repair")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "removed trials/subj02/nsd-s02-e01.tar" in result.stdout
    assert "matches its index" in result.stdout
    assert shard.read_bytes() == right
    assert {path: path.stat().st_mtime_ns for path in times} == times, "nothing else was packed again"
    assert "nothing was damaged" in nd("verify", str(folder), "--repair").stdout


def test_a_moved_folder_is_repaired_from_a_data_set_that_is_given(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "shards", tmp_path / "moved"))
    shard = folder / "trials/subj02/nsd-s02-e01.tar"
    right = shard.read_bytes()
    shard.unlink()
    before = folder_bytes(folder)
    result = nd("verify", str(folder), "--repair")
    assert result.returncode == 3
    assert "--repair nsd_root=FOLDER" in result.stderr
    assert "nothing was changed" in result.stderr
    assert folder_bytes(folder) == before
    result = nd("verify", str(folder), "--repair", f"nsd_root={packed / 'nsd'}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert shard.read_bytes() == right


def test_packing_that_is_refused_leaves_the_recipe_for_repairs(packed: Path) -> None:
    recipe = packed / "shards/.pack/recipe.yaml"
    before = recipe.read_text()
    refused = nd("pack", "demo", *words_of(packed), "data.normalization=mindeye1")
    assert refused.returncode == 3
    assert "packed with other settings" in refused.stderr
    assert recipe.read_text() == before


def test_words_that_reading_shards_does_not_need_are_refused(packed: Path, tmp_path: Path) -> None:
    result = nd("verify", str(packed / "shards"), "nsd_root=nsd")
    assert result.returncode == 2
    assert "add --repair" in result.stderr
    result = nd("export", str(packed / "shards"), str(tmp_path / "out"), "data.subjects=[1]")
    assert result.returncode == 2
    assert "remote.key=value" in result.stderr


@pytest.mark.parametrize("trouble", ["betas are gone", "betas are damaged", "networks are gone"])
def test_a_repair_that_cannot_pack_leaves_everything_as_it_was(packed: Path, tmp_path: Path, trouble: str) -> None:
    """One wrong record is better than no shard and no index."""
    folder = Path(shutil.copytree(packed / "shards", tmp_path / "moved"))
    nsd_root = Path(shutil.copytree(packed / "nsd", tmp_path / "other"))
    name = "features/z/nsd-z-s01-000.tar" if trouble == "networks are gone" else "trials/subj02/nsd-s02-e01.tar"
    content = bytearray((folder / name).read_bytes())
    content[900] ^= 4
    (folder / name).write_bytes(content)
    words = [f"nsd_root={nsd_root}"]
    for path in nsd_root.glob("nsddata_betas/ppdata/subj02/func1pt8mm/*/betas_session01*"):
        if trouble == "betas are gone":
            path.unlink()
        elif trouble == "betas are damaged":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if trouble == "networks are gone":
        words.append("model=/no/such/network")
    before = folder_bytes(folder)
    result = nd("verify", str(folder), "--repair", *words)
    assert result.returncode in (3, 4), result.stdout + result.stderr
    assert folder_bytes(folder) == before
    assert nd("verify", str(folder)).stdout.count("sample") == 1


@pytest.mark.parametrize(
    "gone", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
@pytest.mark.parametrize("command", ["pack", "evaluate"])
def test_a_model_that_lacks_a_file_is_refused_before_ranks_start(
    packed: Path, tmp_path: Path, command: str, gone: str
) -> None:
    model = shutil.copytree(resolve_folder("phantom/stable-diffusion"), tmp_path / "sd")
    (model / gone).unlink()
    result = nd(command, "demo", *words_of(packed), f"model={model}")
    assert result.returncode == 3
    assert Path(gone).name in result.stderr
    assert "Rank 0" not in result.stderr


def test_shards_that_record_the_hashes_of_the_networks_files_go_on_growing(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "shards", tmp_path / "shards"))
    made_by = Index.read(folder).features["z"].source
    sd, clip = (resolve_folder(f"phantom/{name}") for name in ("stable-diffusion", "clip-vision"))
    recorded = {f"{part}_sha256": hash_files(sd / part) for part in ("vae", "text_encoder", "tokenizer")}
    recorded["guidance_model_sha256"] = hash_files(clip)
    for receipt in (folder / ".pack").glob("*.tar.json"):
        text = receipt.read_text()
        for key, digest in recorded.items():
            text = text.replace(str(made_by[key]), digest)
        receipt.write_text(text)
    result = nd("pack", "demo", *words_of(packed), f"shards_dir={folder}", "data.targets=[z,c]")
    assert result.returncode == 0, result.stdout + result.stderr
    sources = [Index.read(folder).features[name].source for name in ("z", "c")]
    assert [source | recorded for source in sources] == sources


def test_a_server_cannot_be_repaired_and_nothing_is_touched(packed: Path, tmp_path: Path) -> None:
    with FileServer(packed / "shards") as server:
        result = nd("verify", server.url, "--repair")
        assert result.returncode == 2
        assert "nothing was changed" in result.stderr
        assert server.requests == []


def test_a_server_and_its_cache_can_be_said_wherever_a_url_can(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "buckets").mkdir()
    (tmp_path / "buckets/nsd").symlink_to(packed / "shards")
    keys = {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with FileServer(tmp_path / "buckets") as server:
        remote = [f"remote.s3_endpoint={server.url}", f"remote.cache_dir={tmp_path / 'cache'}"]
        result = nd_process("verify", "s3://nsd", *remote, TMPDIR=str(tmp_path), **keys)
        assert result.returncode == 0, result.stdout + result.stderr
        assert not (tmp_path / "cache").exists(), "the server is judged, not a cache"
        result = nd_process("export", "s3://nsd", str(tmp_path / "out"), *remote, "--subject", "1", **keys)
        assert result.returncode == 0, result.stdout + result.stderr
        assert list((tmp_path / "cache").glob("*.tar"))
        words = [f"run_dir={tmp_path / 'run'}", "shards_dir=s3://nsd", "data.subjects=[1,2,3]", *remote]
        before = len(server.requests)
        result = nd_process(
            "train", "demo", *words, "training.targets=[c]", "--subjects", "1", **keys
        )  # c was not packed
        assert "Target stores ['c'] are not in the shards" in result.stdout + result.stderr
        assert len(server.requests) > before


def test_shards_hold_no_path_of_the_machine_that_packed_them(packed: Path) -> None:
    tell_tales = [f"{folder}/".encode() for folder in (packed, Path.home(), Path.cwd())]
    files = [path for path in (packed / "shards").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if any(word in path.read_bytes() for word in tell_tales)] == []


def test_a_repair_without_a_recipe_says_what_to_run(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "shards", tmp_path / "moved"))
    (folder / ".pack/recipe.yaml").unlink()
    (folder / "trials/subj02/nsd-s02-e01.tar").unlink()
    result = nd("verify", str(folder), "--repair")
    assert result.returncode == 3
    assert "run `nd pack` with the same recipe" in result.stderr


def test_export_and_verify_take_a_url(packed: Path, tmp_path: Path) -> None:
    with FileServer(packed / "shards") as server:
        result = nd_process("export", server.url, str(tmp_path / "out"), "--subject", "1", TMPDIR=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "out/betas_all_subj01_fp32_renorm.hdf5").is_file()
        verified = nd_process("verify", server.url, TMPDIR=str(tmp_path))
        assert verified.returncode == 0, verified.stdout + verified.stderr
    refused = nd("verify", "https://me:hunter2@host/shards")
    assert refused.returncode == 2
    assert "hunter2" not in refused.stderr + refused.stdout
