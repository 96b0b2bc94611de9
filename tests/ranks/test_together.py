"""What ranks do together when rank 0 fails in it: two real processes, without DeepSpeed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ranks.launching import ROOT, environment, free_port
from tests.support.waiting import HANG_S

PROGRAM = """
from torch import distributed
from nd_dist.errors import CheckpointError
from nd_dist.training.ranks import on_main

distributed.init_process_group("gloo")
def fail():
    raise ERROR
try:
    on_main(fail)
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0])
print(on_main(lambda: "next"))
"""


@pytest.mark.launch
@pytest.mark.parametrize(
    ("error", "others"),
    [("CheckpointError('torn')", "CheckpointError torn"), ("KeyError('x')", "RankFailure Rank 0 failed")],
)
def test_an_error_of_rank_zero_ends_the_others_wait_and_nobody_hangs(error: str, others: str) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("ERROR", error)],
            cwd=ROOT, env=environment(RANK=str(rank), **shared), stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=HANG_S)[0].splitlines() for process in ranks]
    assert said[0][0].startswith(error.partition("(")[0])
    assert said[1][0].startswith(others)
    assert [lines[1] for lines in said] == ["next", "next"], "the ranks agree on what comes next"
