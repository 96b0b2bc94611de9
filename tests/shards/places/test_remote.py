from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nd_dist.config import Config, RemoteConfig
from nd_dist.errors import ConfigError, DataError
from nd_dist.schema import Batch
from shards.format.codec import image_shard_path, trial_shard_path
from shards.format.index import Index
from shards.reading.reader import ShardReader
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream
from shards.upkeep.verify import verify
from tests.shards.support import flip_byte
from tests.support.file_server import FileServer
from tests.support.waiting import HANG_S, wait_until

ROOT = Path(__file__).parents[3]
SECRET = "hunter2-wJalrXUtnFEMI"


@pytest.fixture
def server(packed_dir: Path) -> Iterator[FileServer]:
    with FileServer(packed_dir, secret=SECRET) as server:
        yield server


@pytest.fixture
def remote(tmp_path: Path) -> RemoteConfig:
    return RemoteConfig(cache_dir=tmp_path / "cache")


def stream_of(reader: ShardReader, **changes: object) -> TrialStream:
    settings: dict[str, object] = {
        "subjects": (1, 2, 3),
        "targets": ("z", "c"),
        "samples_per_subject": 6,
        "seed": 5,
        **changes,
    }
    return TrialStream(reader, StreamConfig(**settings))  # type: ignore[arg-type]


def content_of(batch: Batch) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in (*batch.voxels.values(), *batch.targets.values())]


def steps(reader: ShardReader, count: int = 20, **changes: object) -> list[list[bytes]]:
    with stream_of(reader, **changes) as stream:
        return [content_of(batch) for batch in islice(stream, count)]


def shard_names(packed_dir: Path) -> set[str]:
    used = [shard for shard in Index.read(packed_dir).shards if shard.kind in ("trials", "z", "c")]
    return {Path(shard.path).name for shard in used}


def test_a_url_gives_the_folders_batches_and_every_shard_is_transferred_once(
    server: FileServer, remote: RemoteConfig, packed_dir: Path
) -> None:
    expected = steps(ShardReader(packed_dir))
    assert steps(ShardReader(server.url, remote)) == expected
    assert steps(ShardReader(server.url, remote), threads=3) == expected
    counts = server.count()
    assert counts.keys() <= shard_names(packed_dir)
    assert set(counts.values()) == {1}


def test_a_server_that_cuts_and_corrupts_every_shard_once_is_outlived(
    server: FileServer, remote: RemoteConfig, packed_dir: Path
) -> None:
    for name in shard_names(packed_dir):
        server.faults[name] = ["cut", "flip", "busy"]
    assert steps(ShardReader(server.url, remote), count=12) == steps(ShardReader(packed_dir), count=12)


def test_a_server_without_ranges_is_read_too(packed_dir: Path, remote: RemoteConfig) -> None:
    with FileServer(packed_dir, has_ranges=False) as server:
        for name in shard_names(packed_dir):
            server.faults[name] = ["cut"]
        reader = ShardReader(server.url, remote)
        ids = reader.images(1, "test")
        np.testing.assert_array_equal(reader.voxels(1, ids), ShardReader(packed_dir).voxels(1, ids))


def test_credentials_for_http_come_from_netrc(
    server: FileServer, remote: RemoteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ShardReader(server.url, remote)
    assert {request.authorization for request in server.requests} == {""}
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    _ = ShardReader(server.url, remote).trials
    assert server.requests[-1].authorization == "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()


@pytest.mark.slow
def test_bytes_that_stay_wrong_are_an_error_of_the_stream_that_names_the_shard(
    server: FileServer, remote: RemoteConfig
) -> None:
    name = Path(trial_shard_path(1, 2)).name
    server.faults[name] = ["flip"] * 99
    with pytest.raises(DataError, match=name), stream_of(ShardReader(server.url, remote)) as stream:
        for _ in islice(stream, 30):
            pass
    assert not list((remote.cache_dir or Path()).glob(f"*{name}"))


def test_a_cached_copy_that_goes_bad_is_fetched_again(
    server: FileServer, remote: RemoteConfig, packed_dir: Path
) -> None:
    reader = ShardReader(server.url, remote)
    ids = reader.images(1, "test")
    right = reader.targets("z", ids)
    name = Path(image_shard_path("z", "shared", 0)).name
    [copy] = (remote.cache_dir or Path()).glob(f"*{name}")
    flip_byte(copy, int(reader.store("z")[ids[0]]["offset"]) + 3)
    np.testing.assert_array_equal(ShardReader(server.url, remote).targets("z", ids), right)
    assert server.count()[name] == 2


def test_a_small_cache_serves_many_shards_and_keeps_its_size(server: FileServer, tmp_path: Path) -> None:
    remote = RemoteConfig(cache_dir=tmp_path / "cache", cache_gb=60_000 / 1e9)
    local = steps(ShardReader(server.folder), count=6)
    assert steps(ShardReader(server.url, remote), count=6) == local
    sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert sum(sizes) <= 60_000


def test_verify_proves_a_copy_on_a_server(server: FileServer, remote: RemoteConfig) -> None:
    assert verify(server.url, remote=remote) == []
    server.faults["nsd-s02-e02.tar"] = ["forbidden"] * 99
    again = RemoteConfig(cache_dir=(remote.cache_dir or Path()) / "second")
    [problem] = verify(server.url, remote=again)
    assert problem.shard == trial_shard_path(2, 2)
    assert "403" in problem.what


def test_a_missing_index_and_a_server_that_is_gone_are_errors(server: FileServer, remote: RemoteConfig) -> None:
    with pytest.raises(DataError, match="404"):
        ShardReader(f"{server.url}/nothing", remote)
    with FileServer(server.folder) as closed:
        url = closed.url
    with pytest.raises(DataError, match="cannot be read from the server"):
        ShardReader(url, remote)


def start_fill(server: FileServer, cache_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.shards.places.fill_program", server.url, str(cache_dir)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_jobs_that_fill_one_cache_transfer_every_shard_once(server: FileServer, tmp_path: Path) -> None:
    server.bytes_per_s = 400_000
    jobs = [start_fill(server, tmp_path / "cache") for _ in range(2)]
    results = [job.communicate(timeout=HANG_S) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert set(server.count().values()) == {1}


def test_a_job_killed_while_it_fills_the_cache_leaves_what_the_next_one_continues(
    server: FileServer, tmp_path: Path
) -> None:
    server.bytes_per_s = 100_000
    job = start_fill(server, tmp_path / "cache")
    wait_until(lambda: list(tmp_path.glob("cache/*.part")) or job.poll() is not None, pause_s=0.002)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    whole = list(tmp_path.glob("cache/*.tar"))
    server.bytes_per_s = 0
    next_job = start_fill(server, tmp_path / "cache")
    output, errors = next_job.communicate(timeout=HANG_S)
    assert next_job.returncode == 0, errors
    alone = start_fill(server, tmp_path / "other")
    assert alone.communicate(timeout=HANG_S)[0] == output
    assert all(path.exists() for path in whole)
    assert not list(tmp_path.glob("cache/*.part"))


@pytest.mark.parametrize(
    "url", [f"https://user:{SECRET}@host/shards", f"https://host/shards?X-Amz-Signature={SECRET}", "ftp://host/x"]
)
def test_a_url_with_credentials_or_of_another_protocol_is_refused_without_repeating_them(url: str) -> None:
    from launch.recipe import load_settings

    with pytest.raises(ConfigError, match="shards_dir") as caught:
        load_settings(Config, None, [f"shards_dir={url}"])
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_packing_into_a_url_is_refused_and_folders_stay_folders() -> None:
    config = Config.model_validate({"shards_dir": "https://host/shards/"})
    assert config.shards_dir == "https://host/shards"
    with pytest.raises(ConfigError, match="local folder"):
        _ = config.shards_folder
    assert Config.model_validate({"shards_dir": "a/b"}).shards_folder == Path("a/b")
    dumped = config.model_dump(mode="json")
    assert Config.model_validate(dumped) == config


def test_what_a_server_says_is_repeated_nowhere(server: FileServer, remote: RemoteConfig) -> None:
    server.faults["index.json"] = ["forbidden"] * 9
    with pytest.raises(DataError) as caught:
        ShardReader(server.url, remote)
    assert "403" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


class TestS3:
    """The same folder behind an S3-compatible endpoint."""

    @pytest.fixture(autouse=True)
    def credentials(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pytest.importorskip("s3fs", reason="needs the extra remote")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    @pytest.fixture
    def bucket(self, packed_dir: Path, tmp_path: Path) -> Iterator[FileServer]:
        (tmp_path / "buckets").mkdir()
        (tmp_path / "buckets/nsd").symlink_to(packed_dir)
        with FileServer(tmp_path / "buckets", secret=SECRET) as server:
            yield server

    def test_batches_are_the_folders_and_requests_are_signed(
        self, bucket: FileServer, remote: RemoteConfig, packed_dir: Path
    ) -> None:
        remote = remote.model_copy(update={"s3_endpoint": bucket.url})
        assert steps(ShardReader("s3://nsd", remote)) == steps(ShardReader(packed_dir))
        assert set(bucket.count().values()) == {1}
        assert all(request.authorization.startswith("AWS4-HMAC-SHA256") for request in bucket.requests)
        assert not any(SECRET in request.authorization for request in bucket.requests)

    def test_a_cut_and_a_flipped_answer_are_outlived(
        self, bucket: FileServer, remote: RemoteConfig, packed_dir: Path
    ) -> None:
        remote = remote.model_copy(update={"s3_endpoint": bucket.url})
        for name in shard_names(packed_dir):
            bucket.faults[name] = ["cut", "flip"]
        assert steps(ShardReader("s3://nsd", remote), count=3) == steps(ShardReader(packed_dir), count=3)

    def test_refusals_and_missing_credentials_show_no_secret(
        self, bucket: FileServer, remote: RemoteConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remote = remote.model_copy(update={"s3_endpoint": bucket.url})
        bucket.faults["index.json"] = ["forbidden"] * 1000  # always: an answer that is cut is asked for again
        with pytest.raises(DataError) as caught:
            ShardReader("s3://nsd", remote)
        text = "".join(traceback.format_exception(caught.value))
        assert SECRET not in text
        assert "AKIA" not in text


def test_without_s3fs_the_error_says_what_to_install(remote: RemoteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    with pytest.raises(ConfigError, match=r"nd-dist\[remote\]"):
        ShardReader("s3://bucket/shards", remote)


def test_a_cache_that_belongs_to_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from shards.places.remote import RemoteStore

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if os.getuid():
        pytest.skip("needs the right to give a folder away")
    folder = tmp_path / f"nd_dist-cache-{os.getuid()}"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(DataError, match="another user"):
        RemoteStore.connect("http://127.0.0.1:9/shards", RemoteConfig())
