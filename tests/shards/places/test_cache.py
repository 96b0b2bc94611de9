from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nd_dist.errors import ConfigError, DataError
from shards.format.index import ShardInfo
from shards.places import cache
from shards.places.cache import NodeCache
from shards.places.transport import TransferError
from tests.support.waiting import HANG_S, wait_until


def make_file(number: int, size: int = 1000) -> tuple[ShardInfo, bytes]:
    """Return a made-up shard's entry in an index, and its bytes."""
    content = bytes((number + offset * 7) % 251 for offset in range(size))
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"trials/subj01/nsd-s01-e{number:02d}.tar"
    return ShardInfo(path=path, kind="trials", group="s01", samples=1, bytes=size, sha256=sha256), content


class Source:
    """Reads blocks of one file, counts them, and fails where it is told to."""

    def __init__(self, content: bytes, *failures: str) -> None:
        self.content, self.failures = content, list(failures)
        self.blocks: list[tuple[int, int]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, start: int, stop: int) -> bytes:
        self.blocks.append((start, stop))
        self.may_go_on.wait(HANG_S)
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "refused":
            raise TransferError("refused")
        block = bytearray(self.content[start : (start + stop) // 2 if failure == "cut" else stop])
        if failure == "flip":
            block[0] ^= 1
        return bytes(block)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", 300)


def make_cache(folder: Path, max_bytes: int = 10**6) -> NodeCache:
    return NodeCache(folder / "cache", max_bytes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir() if path.is_file())


def test_a_file_is_downloaded_once_and_found_again_by_another_process(tmp_path: Path) -> None:
    file, content = make_file(1)
    source = Source(content)
    assert make_cache(tmp_path).get(file, source, "url").read_bytes() == content
    assert source.blocks == [(0, 300), (300, 600), (600, 900), (900, 1000)]
    assert make_cache(tmp_path).get(file, Source(b"", "refused"), "url").read_bytes() == content


def test_many_threads_that_want_one_file_transfer_it_once(tmp_path: Path) -> None:
    file, content = make_file(1)
    source = Source(content)
    source.pause_s = 0.01
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: make_cache(tmp_path).get(file, source, "url"), range(8)))
    assert {path.read_bytes() for path in paths} == {content}
    assert len(source.blocks) == 4


@pytest.mark.parametrize("failures", [["cut"], ["", "cut", "cut"], ["cut", "", "cut", "", "cut"]])
def test_a_block_that_arrives_in_part_goes_on_where_it_ended(tmp_path: Path, failures: list[str]) -> None:
    file, content = make_file(1)
    source = Source(content, *failures)
    assert make_cache(tmp_path).get(file, source, "url").read_bytes() == content
    assert len(source.blocks) <= 4 + len(failures)
    assert names(tmp_path) == [f"{file.sha256[:16]}-nsd-s01-e01.tar"]


def test_a_transfer_that_is_given_up_keeps_what_arrived_for_the_next_one(tmp_path: Path) -> None:
    file, content = make_file(1)
    with pytest.raises(DataError, match="refused"):
        make_cache(tmp_path).get(file, Source(content, "", "", "refused"), "url")
    source = Source(content)
    assert make_cache(tmp_path).get(file, source, "url").read_bytes() == content
    assert source.blocks == [(600, 900), (900, 1000)]


def test_a_download_of_a_process_that_died_is_continued(tmp_path: Path) -> None:
    file, content = make_file(1)
    node = make_cache(tmp_path)
    (tmp_path / "cache" / f"{file.sha256[:16]}-nsd-s01-e01.tar.{file.bytes}.part").write_bytes(content[:700])
    source = Source(content)
    assert node.get(file, source, "url").read_bytes() == content
    assert source.blocks == [(700, 1000)]


def test_a_half_download_with_wrong_bytes_costs_one_more_try_and_is_never_seen(tmp_path: Path) -> None:
    file, content = make_file(1)
    node = make_cache(tmp_path)
    (tmp_path / "cache" / f"{file.sha256[:16]}-nsd-s01-e01.tar.{file.bytes}.part").write_bytes(b"x" * 700)
    source = Source(content)
    assert node.get(file, source, "url").read_bytes() == content
    assert source.blocks[0] == (700, 1000)
    assert source.blocks[1] == (0, 300)


def test_wrong_bytes_from_the_server_never_get_a_name_and_end_in_an_error(tmp_path: Path) -> None:
    file, content = make_file(1)
    wrong = Source(b"y" * len(content))
    with pytest.raises(DataError, match="hash of what arrived") as caught:
        make_cache(tmp_path).get(file, wrong, "https://host/shards")
    assert "https://host/shards/trials/subj01/nsd-s01-e01.tar" in str(caught.value)
    assert names(tmp_path) == []
    once = Source(content, "flip")
    assert make_cache(tmp_path).get(file, once, "url").read_bytes() == content


def test_a_file_that_stays_wrong_is_fetched_a_few_times(tmp_path: Path) -> None:
    file, content = make_file(1)
    wrong = Source(content, *["flip"] * 99)
    with pytest.raises(DataError, match=f"{cache.TRIES} tries"):
        make_cache(tmp_path).get(file, wrong, "url")
    assert len(wrong.blocks) == 4 * cache.TRIES


def test_files_of_another_user_in_the_cache_are_read(tmp_path: Path, another_user: int) -> None:
    file, content = make_file(1)
    path = make_cache(tmp_path).get(file, Source(content), "url")
    (tmp_path / "cache").chmod(0o755)
    os.seteuid(another_user)
    try:
        assert make_cache(tmp_path).get(file, Source(b"", "refused"), "url") == path
    finally:
        os.seteuid(0)


def fill(node: NodeCache, numbers: Iterator[int] | range | list[int]) -> list[Path]:
    return [node.get(file, Source(content), "url") for file, content in map(make_file, numbers)]


def test_the_least_recently_used_goes_first_and_the_size_is_kept(tmp_path: Path) -> None:
    node = make_cache(tmp_path, max_bytes=3500)
    paths = fill(node, range(3))
    for age, path in zip((30, 20, 10), paths, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    fill(node, [0])  # used again
    fill(node, [3])
    assert [path.exists() for path in paths] == [True, False, True]
    fill(node, range(4, 30))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file()) <= 3500


def test_an_evicted_file_that_is_open_stays_readable(tmp_path: Path) -> None:
    node = make_cache(tmp_path, max_bytes=1500)
    [path] = fill(node, [0])
    with open(path, "rb") as stream:
        fill(node, [1])
        assert not path.exists()
        assert stream.read() == make_file(0)[1]


def start_a_slow_download(node: NodeCache, file: ShardInfo, content: bytes) -> tuple[Source, threading.Thread]:
    """Return once a thread asks for the first block, which it gets when it ``may_go_on``."""
    slow = Source(content)
    slow.may_go_on.clear()
    thread = threading.Thread(target=lambda: node.get(file, slow, "url"))
    thread.start()
    wait_until(lambda: slow.blocks)
    return slow, thread


def test_abandoned_downloads_are_evicted_and_running_ones_are_not(tmp_path: Path) -> None:
    node = make_cache(tmp_path, max_bytes=2500)
    file, content = make_file(7)
    part = tmp_path / "cache" / f"{file.sha256[:16]}-nsd-s01-e07.tar.{file.bytes}.part"
    part.write_bytes(content[:10])
    os.utime(part, (0, 0))
    fill(node, [0, 1])
    assert not part.exists(), "its promised 1000 bytes did not fit beside the others"
    slow, thread = start_a_slow_download(node, file, content)
    with pytest.raises(DataError, match="downloads under way"):
        big, big_content = make_file(8, 2000)
        node.get(big, Source(big_content), "url")
    slow.may_go_on.set()
    thread.join()
    assert node.get(file, Source(b""), "url").read_bytes() == content


def test_a_file_that_is_busy_elsewhere_is_left_to_the_other(tmp_path: Path) -> None:
    node = make_cache(tmp_path)
    file, content = make_file(1)
    slow, thread = start_a_slow_download(node, file, content)
    assert not node.get_unless_busy(file, Source(b""), "url")
    slow.may_go_on.set()
    thread.join()
    assert node.get_unless_busy(file, Source(b""), "url")


def test_a_file_larger_than_the_cache_says_what_to_set(tmp_path: Path) -> None:
    file, content = make_file(1)
    with pytest.raises(ConfigError, match="remote.cache_gb"):
        make_cache(tmp_path, max_bytes=999).get(file, Source(content), "url")


def test_a_file_of_another_size_under_the_right_name_is_replaced(tmp_path: Path) -> None:
    node = make_cache(tmp_path)
    [path] = fill(node, [1])
    path.write_bytes(b"short")
    assert fill(node, [1])[0].read_bytes() == make_file(1)[1]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="could not be written"):
        make_cache(tmp_path)


def test_a_full_disk_evicts_what_it_can_then_says_so_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    node = NodeCache(small_disk / "cache", 10**9)
    files = [make_file(number, 90_000) for number in range(4)]
    paths = [node.get(file, Source(content), "url") for file, content in files[:2]]
    third = node.get(files[2][0], Source(files[2][1]), "url")
    assert [path.exists() for path in paths] == [False, True], "the disk had no room for three"
    assert third.read_bytes() == files[2][1]
    (small_disk / "other").write_bytes(bytes(80_000))
    for path in (small_disk / "cache").iterdir():
        if path.is_file():
            path.unlink()
    (small_disk / "more").write_bytes(bytes(150_000))
    with pytest.raises(DataError, match="disk of the cache is full"):
        node.get(files[3][0], Source(files[3][1]), "url")
    (small_disk / "more").unlink()
    assert node.get(files[3][0], Source(files[3][1]), "url").read_bytes() == files[3][1]


def test_a_disk_that_fills_while_a_block_is_written_is_an_error_without_a_half_file(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = NodeCache(small_disk / "cache", 10**9)
    file, content = make_file(1, 200_000)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 50_000)

    def fill_meanwhile(start: int, stop: int) -> bytes:
        if start == 100_000:
            (small_disk / "other").write_bytes(bytes(120_000))
        return content[start:stop]

    with pytest.raises(DataError, match="No space left"):
        node.get(file, fill_meanwhile, "url")
    assert [path for path in (small_disk / "cache").iterdir() if path.is_file()] == []


def test_a_process_that_was_forked_during_a_download_does_not_keep_its_lock(tmp_path: Path) -> None:
    path, (reads, writes) = tmp_path / "lock", os.pipe()
    with cache._locked(path) as is_mine:
        assert is_mine
        if (child := os.fork()) == 0:
            os.close(writes)
            os.read(reads, 1)  # lives until its parent closes the other end
            os._exit(0)
    with cache._locked(path, wait=False) as is_mine:
        assert is_mine
    os.close(writes)
    os.waitpid(child, 0)
    os.close(reads)
