from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nd_dist.errors import ConfigError
from shards.reading.order import Order, permutation, stream_items


def test_the_permutation_is_the_published_golden_vector() -> None:
    assert permutation(seed=1, subject=1, pass_index=0, length=10).tolist() == [8, 9, 6, 5, 3, 4, 7, 0, 1, 2]


@pytest.mark.parametrize("other", [(2, 1, 0), (1, 2, 0), (1, 1, 1)])
def test_seed_subject_and_pass_each_change_the_permutation(other: tuple[int, int, int]) -> None:
    assert permutation(1, 1, 0, 50).tolist() != permutation(*other, 50).tolist()


def test_large_seeds_are_accepted() -> None:
    assert sorted(permutation(2**63 - 1, 8, 10**6, 5).tolist()) == [0, 1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 90), st.integers(1, 90))
def test_any_window_of_a_stream_is_cut_from_whole_permuted_passes(
    seed: int, length: int, start: int, count: int
) -> None:
    passes = np.concatenate([permutation(seed, 3, index, length) for index in range((start + count) // length + 1)])
    assert stream_items(seed, 3, length, start, start + count).tolist() == passes[start : start + count].tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 70),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_the_global_batch_does_not_depend_on_the_world(
    seed: int, lengths: list[int], world: int, quotas: list[int]
) -> None:
    subjects = tuple(range(1, len(lengths) + 1))
    order = Order(seed, subjects, tuple(lengths), tuple(quotas[: len(lengths)]))
    num_rows = sum(order.quotas)
    for step in (0, 1, 7):
        whole = {}
        for part in order.slices(step, 0, 1):
            whole.update(
                {int(i): (part.subject, int(p)) for i, p in zip(part.sample_ids, part.positions, strict=True)}
            )
        shared = {}
        for rank in range(world):
            parts = order.slices(step, rank, world)
            assert [part.subject for part in parts] == list(subjects)
            assert sum(len(part.positions) for part in parts) == len(range(rank, num_rows, world))
            for part in parts:
                for sample_id, position in zip(part.sample_ids, part.positions, strict=True):
                    assert int(sample_id) not in shared, "every row belongs to one rank"
                    shared[int(sample_id)] = (part.subject, int(position))
        assert shared == whole
        assert sorted(whole) == list(range(num_rows))


def test_every_pass_of_every_subject_visits_each_trial_once() -> None:
    lengths, quota = (12, 7, 5), 4
    order = Order(5, (1, 2, 3), lengths, (quota,) * 3)
    seen: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for step in range(21):
        now: list[tuple[int, int, int]] = []
        for rank in range(3):
            for part in order.slices(step, rank, 3):
                now += zip(part.sample_ids, [part.subject] * 4, part.positions, strict=False)
        for _, subject, position in sorted(now):
            seen[int(subject)].append(int(position))
    for subject, length in zip((1, 2, 3), lengths, strict=True):
        for start in range(0, 84 - length + 1, length):
            assert sorted(seen[subject][start : start + length]) == list(range(length))


def test_a_subject_without_trials_is_refused() -> None:
    with pytest.raises(ConfigError, match="subject 2"):
        Order(0, (1, 2), (9, 0), (2, 2))
