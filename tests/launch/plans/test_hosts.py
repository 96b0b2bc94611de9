import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plans.hostfile import expand_nodelist, hostfile_text, parse_hostfile, read_hostfile
from launch.plans.hosts import Host, filter_hosts, limit_slots, num_slots
from nd_dist.errors import ConfigError


def test_a_hostfile_lists_hosts_in_order_and_ignores_comments() -> None:
    text = "# cluster\r\nnode1 slots=4\r\n\r\nnode2   slots=2  # half\r\n"
    assert parse_hostfile(text, "hosts") == (Host("node1", 4), Host("node2", 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1 slots=2 max_slots=4\nnode2 slots = 1 max-slots=1\n", (Host("node1", 2), Host("node2", 1))),  # Open MPI
        ("node1:2\nnode2\n", (Host("node1", 2), Host("node2", 1))),  # MPICH
        ("a1\na1\nb2\na1\nb2\n", (Host("a1", 3), Host("b2", 2))),  # PBS
        ("me@node1 slots=2\nnode2:1 user=me\n", (Host("node1", 2, user="me"), Host("node2", 1, user="me"))),
        ("node[1-2] slots=8\n", (Host("node1", 8), Host("node2", 8))),
        ("r[0-1]n[0-1]:4\n", (Host("r0n0", 4), Host("r0n1", 4), Host("r1n0", 4), Host("r1n1", 4))),
        ("[fd00::1] slots=2\nfd00::2 slots=1\n[fd00:0::3]:4\n",
         (Host("fd00::1", 2), Host("fd00::2", 1), Host("fd00::3", 4))),
        ("10.0.0.1 slots=1\n", (Host("10.0.0.1", 1),)),
    ],
)  # fmt: skip
def test_hostfiles_of_every_launcher_are_read(text: str, expected: tuple[Host, ...]) -> None:
    assert parse_hostfile(text, "hosts") == expected


def test_deepspeed_reads_the_hostfile_that_is_written_for_it() -> None:
    hosts = (Host("node1", 2, user="me"), Host("fd00::1", 3))
    code = (
        "import json, sys\nfrom deepspeed.launcher.runner import _parse_hostfile\n"
        "print(json.dumps(_parse_hostfile(sys.argv[1].splitlines())))\n"
    )
    words = [sys.executable, "-c", code, hostfile_text(hosts)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert json.loads(answer) == {"me@node1": 2, "fd00::1": 3}


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("node1 cpus=2\n", "NAME slots=N"),
        ("node1: slots=2\n", "line 1"),
        ("node1:2 slots=2\n", "line 1"),
        ("node[a-b] slots=2\n", "line 1"),
        ("node1 two\n", "line 1"),
        ("node1,node2 2\n", "line 1"),
        ("[fd00::1\n", "line 1"),
        ("node1\nnode1 slots=2\n", "line 2"),
        ("node1 slots=2\nnode1\n", "line 2"),
        ("me@node1\nyou@node1\n", "line 2"),
        ("node1 slots=x\n", "line 1"),
        ("node1 slots=\n", "line 1"),
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


POOL = (Host("node1", 2), Host("node2", 4), Host("node3", 1))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("", "", POOL),
        ("node2", "", (Host("node2", 4),)),
        ("node3@node1", "", (Host("node1", 2), Host("node3", 1))),
        ("node2:1,3", "", (Host("node2", 2, (1, 3)),)),
        ("node2:0@node2:1", "", (Host("node2", 2),)),
        ("fd00::1", "", (Host("fd00::1", 2),)),
        ("fd00::1:1", "", (Host("fd00::1", 1, (1,)),)),
        ("", "node1", (Host("node2", 4), Host("node3", 1))),
        ("", "node2:0@node3", (Host("node1", 2), Host("node2", 3, (1, 2, 3)))),
    ],
)
def test_filters_follow_deepspeeds_grammar(include: str, exclude: str, expected: tuple[Host, ...]) -> None:
    named = (*POOL, Host("fd00::1", 2)) if "fd00" in include else POOL
    assert filter_hosts(named, include, exclude) == expected


def test_filters_leave_what_deepspeed_would_leave() -> None:
    filters = [("node2:1,3", ""), ("node3@node1", ""), ("", "node2:0@node3")]
    code = (
        "import json, sys\nfrom deepspeed.launcher.runner import parse_inclusion_exclusion\n"
        "pool = {'node1': 2, 'node2': 4, 'node3': 1}\n"
        "print(json.dumps([parse_inclusion_exclusion(pool, *filter) for filter in json.loads(sys.argv[1])]))\n"
    )
    words = [sys.executable, "-c", code, json.dumps(filters)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    ours = [{host.name: list(host.device_ids) for host in filter_hosts(POOL, *words)} for words in filters]
    assert ours == json.loads(answer)


@pytest.mark.parametrize(
    ("include", "exclude", "fragment"),
    [
        ("node9", "", "node9"),
        ("node1:2", "", "slots [2]"),
        ("node1:a", "", "node1:a"),
        ("node1@", "", "empty name"),
        ("node1", "node2", "exclude each other"),
        ("", "node1@node2@node3", "leaves no host"),
    ],
)
def test_a_wrong_filter_says_what_is_wrong(include: str, exclude: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        filter_hosts(POOL, include, exclude)
    assert fragment in str(caught.value)


def test_limited_slots_keep_chosen_gpus() -> None:
    assert limit_slots((Host("a", 3, (1, 2, 5)), Host("b", 1)), 2) == (Host("a", 2, (1, 2)),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1", ("node1",)),
        ("gpu[01-03,7],login", ("gpu01", "gpu02", "gpu03", "gpu7", "login")),
        ("r[1-2]-n", ("r1-n", "r2-n")),
        ("a[098-101]", ("a098", "a099", "a100", "a101")),
        ("rack[0-1]node[0-1],x", ("rack0node0", "rack0node1", "rack1node0", "rack1node1", "x")),
    ],
)
def test_slurms_node_lists_are_expanded(text: str, expected: tuple[str, ...]) -> None:
    assert expand_nodelist(text) == expected


@pytest.mark.parametrize("text", ["", "gpu[", "gpu[a-b]"])
def test_a_node_list_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        expand_nodelist(text)


@pytest.mark.parametrize(
    "line",
    [
        "us er@node1 slots=1",
        "-x@node1 slots=1",
        "fe80::1%eth0 slots=1",
        "a,b slots=1",
        "$(x) slots=1",
        "-o slots=1",
        "a slots=-1",
    ],
)
def test_names_that_a_launcher_would_read_as_something_else_are_refused(line: str) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        parse_hostfile(line + "\n", "hosts")
