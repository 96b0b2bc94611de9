from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nd_dist.compute.threads import Behind, ahead


def test_the_next_item_is_made_while_one_is_used_and_no_further() -> None:
    made: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    with_next = ahead(items())
    assert next(with_next) == 0
    assert second.wait(60), "the next item waited to be asked for"
    assert made == [0, 1]
    assert list(with_next) == [1, 2, 3, 4]


def test_an_error_of_an_item_comes_where_it_is_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the disk is gone")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="the disk is gone"):
        next(found)


def test_work_behind_overlaps_and_is_done_in_order_when_the_block_ends() -> None:
    done: list[int] = []
    go_on = threading.Event()
    with Behind() as behind:
        behind.do(lambda: (go_on.wait(60), done.append(1)))  # type: ignore[func-returns-value]
        assert done == []
        go_on.set()
        behind.do(lambda: done.append(2))
    assert done == [1, 2]


def test_an_error_behind_is_raised_by_the_next_call_or_at_the_end_and_never_hides_another() -> None:
    def fail() -> None:
        raise ValueError("behind")

    with pytest.raises(ValueError, match="behind"), Behind() as behind:
        behind.do(fail)
        behind.do(lambda: None)
    with pytest.raises(ValueError, match="behind"), Behind() as behind:
        behind.do(fail)
    with pytest.raises(RuntimeError, match="in front"), Behind() as behind:
        behind.do(fail)
        raise RuntimeError("in front")
