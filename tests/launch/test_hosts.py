from pathlib import Path

import pytest

from launch.hosts import Host, limit_slots, num_slots, parse_hostfile, read_hostfile
from nd_dist.errors import ConfigError


def test_a_hostfile_lists_hosts_in_order_and_ignores_comments() -> None:
    text = "# cluster\nnode1 slots=4\n\nnode2   slots=2  # half\n"
    assert parse_hostfile(text, "hosts") == (Host("node1", 4), Host("node2", 2))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("node1\n", "NAME slots=N"),
        ("node1 slots=x\n", "line 1"),
        ("node1 slots=0\n", "no slots"),
        ("node1 slots=1\nnode1 slots=2\n", "line 2"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_names_the_line(text: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, "hosts")
    assert fragment in str(caught.value)


def test_a_missing_hostfile_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize("ranks", range(1, 7))
def test_limited_slots_add_up_to_the_ranks_and_fill_hosts_in_order(ranks: int) -> None:
    taken = limit_slots((Host("a", 2), Host("b", 3), Host("c", 1)), ranks)
    assert num_slots(taken) == ranks
    assert [host.name for host in taken] == ["a", "b", "c"][: len(taken)]


def test_more_ranks_than_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer slots"):
        limit_slots((Host("a", 2),), 3)
