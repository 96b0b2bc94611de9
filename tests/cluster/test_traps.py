"""The trap that needs hosts: what pdsh makes of words on their way to a rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launch.plans.plan import plain_word, text_of_word
from tests.cluster.hosts import Cluster
from tests.cluster.jobs import hostfile

SCRIPT = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(sys.argv[2:]))
"""
HOSTILE = ["$HOME", "%h", "", "two words", "it's"]
CHANGED = ["$HOME", "%h", "", "after the empty word"]


def test_trap_8_pdsh_changes_words_but_not_the_words_that_nd_sends(healthy: Cluster, tmp_path: Path) -> None:
    folder = healthy.folder / tmp_path.name
    folder.mkdir()
    (folder / "words.py").write_text(SCRIPT)
    hosts = hostfile(folder, "node1 slots=1", "node2 slots=1")
    out = folder / "out"
    out.mkdir()
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--launcher", "pdsh"]
    where = ["--master_addr", healthy.address("node1"), "--no_local_rank", str(folder / "words.py"), str(out)]
    words = [*(plain_word(word) for word in HOSTILE), *CHANGED]
    result = healthy.run("node1", [*runner, *where, *words], cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    for rank, host in enumerate(("node1", "node2")):
        words = json.loads((out / str(rank)).read_text())
        assert [text_of_word(word) for word in words[: len(HOSTILE)]] == HOSTILE
        # $HOME and %h are filled in; the empty word is gone and so is everything behind it: pdsh takes it for the end
        assert words[len(HOSTILE) :] == ["/root", host]
