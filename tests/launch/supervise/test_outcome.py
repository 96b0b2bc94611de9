from pathlib import Path
from typing import Any

import pytest

from launch.plans.hosts import Host
from launch.plans.plan import LaunchPlan
from launch.supervise.outcome import Outcome
from nd_dist.errors import DataError, NdDistError, RankFailure, Requeue, StorageError

LOGS = Path("logs")
PLAN = LaunchPlan((), {}, 4, hosts=(Host("node1", 2), Host("node2", 2)))
LEASED = LaunchPlan((), {}, 4, is_leased=True, hosts=PLAN.hosts)
ECHO = "RuntimeError: Connection closed by peer [10.0.0.2]:41000"


def failed(rank: int, kind: str, code: int, message: str) -> dict[str, Any]:
    host = "node1" if rank < 2 else "node2"
    return {"event": "rank_failed", "launch": "L", "rank": rank, "kind": kind, "exit_code": code, "host": host,
            "message": message}  # fmt: skip


def lost(rank: int, cause: str = "it was killed by SIGKILL") -> dict[str, Any]:
    return {"event": "rank_lost", "launch": "L", "rank": rank, "host": "node2", "cause": cause}


def started(rank: int) -> dict[str, Any]:
    return {"event": "rank_start", "launch": "L", "rank": rank}


def done(rank: int) -> dict[str, Any]:
    return {"event": "rank_done", "launch": "L", "rank": rank}


def outcome(*events: dict[str, Any], plan: LaunchPlan = PLAN, lost_host: str = "", logs: Path = LOGS) -> Outcome:
    made = Outcome("L", plan, logs)
    for event in [*(started(rank) for rank in range(4)), *events]:
        made.note(event)
    if lost_host:
        made.lose(lost_host)
    return made


def error_of(made: Outcome, stopped_by: str = "") -> NdDistError:
    with pytest.raises(NdDistError) as caught:
        made.judge(1, stopped_by)
    return caught.value


def test_a_launch_whose_ranks_all_say_so_is_done_whatever_the_exit_code() -> None:
    assert outcome(*(done(rank) for rank in range(4))).judge(137, "") == []


def test_leased_work_that_has_begun_goes_on_without_a_rank_and_before_that_it_fails() -> None:
    began = {"event": "unit_began", "rank": 0, "phase": "decode", "unit": "s01"}
    assert outcome(lost(3), plan=LEASED).has_failed
    assert outcome(plan=LEASED, lost_host="node2").has_failed
    assert not outcome(began, lost(3), plan=LEASED, lost_host="node2").has_failed
    assert "Rank 3 on node2: it was killed" in str(error_of(outcome(lost(3), plan=LEASED)))


def test_a_rank_that_is_killed_on_its_way_out_was_done() -> None:
    assert not outcome(done(3), lost(3)).has_failed


def test_ranks_that_did_not_start_in_time_are_named_by_host() -> None:
    made = Outcome("L", PLAN, LOGS)
    made.note(started(2))
    assert not made.has_failed
    made.start_s = 600
    assert made.has_failed
    error = error_of(made)
    assert "3 of 4 ranks never started within 600 s: rank(s) 0, 1 on node1; rank(s) 3 on node2" in str(error)
    assert "launch.start_s" in str(error)


def test_a_rank_that_failed_is_a_better_cause_than_those_that_never_started() -> None:
    made = Outcome("L", PLAN, LOGS)
    made.note(failed(0, "ValueError", 4, "ValueError: boom"))
    made.start_s = 600
    assert "Rank 0 on node1: ValueError: boom" in str(error_of(made))


def test_leased_work_is_done_when_one_rank_says_so_and_the_dead_are_named() -> None:
    made = outcome(done(0), done(1), lost(2), plan=LEASED, lost_host="node2")
    assert made.judge(1, "") == [2, 3]
    assert not made.has_failed
    assert made.open_ranks == []


def test_a_killed_rank_is_blamed_and_not_the_peers_that_noticed_first(tmp_path: Path) -> None:
    (tmp_path / "rank-0003.log").write_text("end of rank 3\n")
    error = error_of(outcome(failed(0, "RuntimeError", 4, ECHO), lost(3), logs=tmp_path))
    assert isinstance(error, RankFailure)
    assert "Rank 3 on node2: it was killed by SIGKILL" in str(error)
    assert "    | end of rank 3" in str(error)


def test_a_killed_rank_of_leased_work_is_named_with_its_host_and_the_unit_it_had_taken() -> None:
    took = {"event": "unit_began", "rank": 3, "phase": "reconstruct", "unit": "s01-p1-i7"}
    error = error_of(outcome(took, *(lost(rank) for rank in range(3, -1, -1)), plan=LEASED))
    assert "Rank 3 on node2 in unit s01-p1-i7: it was killed by SIGKILL" in str(error)


def test_an_error_that_nd_dist_names_keeps_its_class_and_comes_first() -> None:
    error = error_of(outcome(lost(3), failed(1, "DataError", 3, "A shard is damaged.")))
    assert isinstance(error, DataError)
    assert "Rank 1 on node1: A shard is damaged." in str(error)


def test_a_crash_is_blamed_before_a_rank_that_hung_because_of_it() -> None:
    error = error_of(outcome(failed(2, "ValueError", 4, "ValueError: boom"), failed(0, "RuntimeError", 4, ECHO)))
    assert error.exit_code == 4
    assert "Rank 2 on node2: ValueError: boom" in str(error)


def test_a_silent_rank_is_blamed_where_the_others_only_timed_out() -> None:
    made = outcome(*(failed(rank, "RuntimeError", 4, "RuntimeError: Timed out waiting 8000ms") for rank in (0, 1, 3)))
    error = error_of(made)
    assert "Rank 2 on node2 went silent" in str(error)
    assert "rank 0 on node1 then met" in str(error)


def test_a_lost_host_is_named_with_its_ranks_and_how_to_go_on_without_it() -> None:
    made = outcome(failed(0, "RuntimeError", 4, ECHO), lost_host="node2")
    assert made.has_failed
    assert made.open_ranks == [1]
    error = error_of(made)
    assert "Host node2 with rank(s) 2, 3 does not respond" in str(error)
    assert "--exclude node2" in str(error)


def test_a_host_that_leaves_after_its_ranks_were_done_is_no_failure() -> None:
    assert not outcome(done(2), done(3), lost_host="node2").has_failed


def test_a_full_disk_is_exit_code_4_with_rank_host_and_log(tmp_path: Path) -> None:
    (tmp_path / "rank-0003.log").write_text("end of rank 3\n")
    full = failed(3, "StorageError", 4, "No space left")
    error = error_of(outcome(failed(0, "RuntimeError", 4, ECHO), full, logs=tmp_path))
    assert (type(error), error.exit_code) == (StorageError, 4)
    assert "Rank 3 on node2: No space left" in str(error)
    assert "rank-0003.log" in str(error)
    assert "end of" not in str(error), "the cause is known: no tail of a log with a traceback"


def test_a_rank_that_only_loses_its_peer_while_it_saves_is_not_taken_for_the_one_with_the_full_disk() -> None:
    in_the_barrier = failed(0, "StorageError", 4, f"A checkpoint could not be written.\n  found: {ECHO}")
    error = error_of(outcome(in_the_barrier, failed(3, "StorageError", 4, "No space left")))
    assert "Rank 3 on node2: No space left" in str(error)
    assert "Rank 3 on node2: it was killed" in str(error_of(outcome(in_the_barrier, lost(3))))


def test_a_stop_is_a_requeue_whatever_the_ranks_met_on_the_way_out() -> None:
    error = error_of(outcome(failed(0, "Requeue", 5, "saved"), lost(3)), stopped_by="SIGTERM")
    assert isinstance(error, Requeue)
    assert "SIGTERM" in str(error)


def test_ranks_that_a_scheduler_stopped_by_themselves_are_a_requeue() -> None:
    assert error_of(outcome(*(failed(rank, "Requeue", 5, "saved") for rank in range(4)))).exit_code == 5


def test_events_of_other_launches_are_left_out() -> None:
    made = outcome({**lost(3), "launch": "older"})
    assert not made.has_failed
