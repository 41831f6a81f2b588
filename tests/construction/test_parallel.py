"""Several work items at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import pytest
import torch

from fusion_bench_smile.construction.parallel import MAX_BYTES_IN_FLIGHT, completed, map_in_parallel, num_workers


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_workers_share_the_threads(four_threads):
    barrier = threading.Barrier(2, timeout=30)  # breaks unless two items are in progress at a time

    def work(item: int) -> tuple[int, int, bool]:
        barrier.wait()
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(map_in_parallel(lambda item: partial(work, item), range(6), 2)) == [
        (item, 2, False) for item in range(6)
    ]
    assert torch.get_num_threads() == 4


def test_completed_results_are_in_order_too(four_threads):
    def begin(item: int) -> Future[tuple[int, bool]] | Callable[[], tuple[int, bool]]:
        thread = threading.get_ident()
        return completed((item, True)) if item % 3 else lambda: (item, threading.get_ident() == thread)

    assert list(map_in_parallel(begin, range(9), 2)) == [(item, bool(item % 3)) for item in range(9)]


def test_a_failure_stops_the_other_items_and_restores_the_threads(four_threads):
    finished = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("item 1")
        finished.append(item)

    with pytest.raises(ValueError, match="item 1"):
        list(map_in_parallel(lambda item: partial(work, item), range(1000), 1))
    assert len(finished) < 1000
    assert torch.get_num_threads() == 4


def test_large_items_are_done_one_at_a_time_with_all_threads(four_threads):
    assert num_workers(1) == 4
    assert num_workers(MAX_BYTES_IN_FLIGHT // 3) == 3
    assert num_workers(MAX_BYTES_IN_FLIGHT + 1) == 1
    assert list(map_in_parallel(lambda _: torch.get_num_threads, range(2), 1)) == [4, 4]
