"""Several items at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import pytest
import torch

from fusion_bench_smile.workers import IN_FLIGHT_BYTES, done, in_parallel, workers_for


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_workers_that_share_the_threads(four_threads):
    together = threading.Barrier(2, timeout=30)  # breaks unless two items are in work at a time

    def work(item: int) -> tuple[int, int, bool]:
        together.wait()
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(in_parallel(lambda item: partial(work, item), range(6), 2)) == [(item, 2, False) for item in range(6)]
    assert torch.get_num_threads() == 4


def test_what_is_done_at_once_comes_in_order_too(four_threads):
    def begin(item: int) -> Future[tuple[int, bool]] | Callable[[], tuple[int, bool]]:
        here = threading.get_ident()
        return done((item, True)) if item % 3 else lambda: (item, threading.get_ident() == here)

    assert list(in_parallel(begin, range(9), 2)) == [(item, bool(item % 3)) for item in range(9)]


def test_a_failure_stops_the_rest_and_gives_the_threads_back(four_threads):
    done = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("item 1")
        done.append(item)

    with pytest.raises(ValueError, match="item 1"):
        list(in_parallel(lambda item: partial(work, item), range(1000), 1))
    assert len(done) < 1000
    assert torch.get_num_threads() == 4


def test_large_items_are_worked_on_one_at_a_time_with_all_threads(four_threads):
    assert workers_for(1) == 4
    assert workers_for(IN_FLIGHT_BYTES // 3) == 3
    assert workers_for(IN_FLIGHT_BYTES + 1) == 1
    assert list(in_parallel(lambda _: torch.get_num_threads, range(2), 1)) == [4, 4]
