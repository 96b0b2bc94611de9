from pathlib import Path

from nd_dist.events import EventLog, events_path, read_events


def test_events_are_one_json_object_a_line_with_time_command_and_rank(tmp_path: Path) -> None:
    log = EventLog(tmp_path, 3, "train")
    log.write("train_step", stage=1, step=7, loss=float("nan"))
    log.progress("stage 1", 2, 10)
    first, second = read_events(tmp_path / "events" / "rank-0003.jsonl")
    assert (first["event"], first["stage"], first["step"], first["loss"]) == ("train_step", 1, 7, "nan")
    assert (first["command"], first["rank"]) == ("train", 3)
    assert (second["event"], second["done"], second["total"]) == ("progress", 2, 10)


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path, 0, "pack")
    log.write("one")
    with open(events_path(tmp_path, 0), "ab") as stream:
        stream.write(b'{"event": "tw')
    assert [event["event"] for event in read_events(events_path(tmp_path, 0))] == ["one"]


def test_a_line_that_a_full_disk_tore_is_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path, 0, "pack")
    log.write("one")
    with open(events_path(tmp_path, 0), "ab") as stream:
        stream.write(b'{"event": "tw\n')
    log.write("three")
    assert [event["event"] for event in read_events(events_path(tmp_path, 0))] == ["one", "three"]


def test_a_missing_event_file_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(events_path(tmp_path, 0))) == []


def test_the_file_is_opened_once_and_lines_of_two_writers_stay_whole(tmp_path: Path) -> None:
    first, second = EventLog(tmp_path, 0, "train"), EventLog(tmp_path, 0, "train")  # a rank and its guard
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(50):
        first.write("one", number=number)
        second.write("two", number=number)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    found = [(event["event"], event["number"]) for event in read_events(events_path(tmp_path, 0))]
    assert found == [(name, number) for number in range(50) for name in ("one", "two")]
