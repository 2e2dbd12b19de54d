"""The engine's parts, each against what a plain loop or plain arithmetic says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.engine import ByteQueue, Closed, Flow, Lanes, Ledger, Ring, Stage, stop_request
from halfstep.engine.ledger import Balance

CPU = torch.device("cpu")
LONG_S = 60.0  # for waits that end by an event


class Add(Stage[int, int]):
    def work(self, item: int) -> Iterable[int]:
        return [item + 1]


class Gather(Stage[int, tuple[int, ...]]):
    """Items in groups of `size`; what is left goes on at the end."""

    def __init__(self, size: int, due: bool = False) -> None:
        self.most, self.due, self.group = size, due, []

    def work(self, item: int) -> Iterable[tuple[int, ...]]:
        self.group.append(item)
        if len(self.group) == self.most:
            yield from self.flush()

    def deadline(self) -> float | None:
        return time.monotonic() if self.due and self.group else None

    def flush(self) -> Iterable[tuple[int, ...]]:
        group, self.group = tuple(self.group), []
        return [group] if group else []


class Keep(Stage[object, None]):
    def __init__(self) -> None:
        self.kept: list[object] = []
        self.came = threading.Event()

    def work(self, item: object) -> Iterable[None]:
        self.kept.append(item)
        self.came.set()
        return ()


class Break(Stage[int, int]):
    def __init__(self, at: int) -> None:
        self.at = at

    def work(self, item: int) -> Iterable[int]:
        if item == self.at:
            raise ArithmeticError(f"at {item}")
        return [item]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_items_pass_all_stages_in_order(items: list[int], size: int) -> None:
    keep = Keep()
    with Flow(Add(), Gather(size), keep) as flow:
        for item in items:
            flow.put(item)
    expected = [item + 1 for item in items]
    assert keep.kept == [tuple(expected[i : i + size]) for i in range(0, len(items), size)]


def test_what_was_gathered_goes_on_at_its_deadline() -> None:
    keep = Keep()
    with Flow(Gather(100, due=True), keep) as flow:
        flow.put(1)
        assert keep.came.wait(LONG_S)  # though no other item came
        assert keep.kept == [(1,)]


def test_a_stage_that_would_wait_for_ever_ends_with_the_rest() -> None:
    class Forever(Gather):
        def deadline(self) -> float | None:
            return float("inf") if self.group else None

    keep = Keep()
    with Flow(Forever(100), keep) as flow:
        flow.put(1)
    assert keep.kept == [(1,)]


@pytest.mark.parametrize("at", [0, 3, 19])
def test_after_an_error_nothing_more_is_worked_on_and_it_is_raised(at: int) -> None:
    keep = Keep()
    with pytest.raises(ArithmeticError, match=f"at {at}"), Flow(Break(at), keep) as flow:
        for item in range(20):
            flow.put(item)
    assert keep.kept == list(range(len(keep.kept)))
    assert len(keep.kept) <= at


def test_an_exception_lets_go_of_what_waits_and_ends_the_threads() -> None:
    before, keep = threading.active_count(), Keep()
    with pytest.raises(KeyboardInterrupt), Flow(Gather(10), keep) as flow:
        flow.put(1)
        raise KeyboardInterrupt
    assert keep.kept == []
    assert threading.active_count() == before


@given(st.lists(st.integers(0, 12), max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_queue_that_drops_keeps_the_newest_that_fit_and_names_the_others(sizes: list[int]) -> None:
    dropped: list[int] = []
    queue: ByteQueue[int] = ByteQueue(20, dropped.append)
    for number, size in enumerate(sizes):
        assert queue.put(number, size)
        assert queue.held <= 20
    queue.close()
    left = []
    with pytest.raises(Closed):
        while True:
            left.append(queue.get())
    assert dropped + left == list(range(len(sizes)))
    for first in dropped[-1:]:  # it made room for one that did not fit beside it
        assert any(sum(sizes[first : last + 1]) > 20 for last in range(first + 1, len(sizes)))


def test_a_queue_that_blocks_loses_nothing_between_threads() -> None:
    queue: ByteQueue[int] = ByteQueue(10)
    most: list[int] = []

    def produce() -> None:
        for number in range(500):
            queue.put(number, number % 7)
            most.append(queue.held)
        queue.close()

    thread = threading.Thread(target=produce)
    thread.start()
    got = []
    with pytest.raises(Closed):
        while True:
            got.append(queue.get(LONG_S))
    thread.join()
    assert got == list(range(500))
    assert max(most) <= 10
    with pytest.raises(Closed):
        queue.put(1, 1)


def test_an_item_that_is_larger_than_the_queue_goes_in_alone() -> None:
    queue: ByteQueue[str] = ByteQueue(10)
    assert queue.put("large", 100)
    assert not queue.put("small", 1, timeout_s=0)
    assert queue.get() == "large"
    assert queue.put("small", 1, timeout_s=0)
    with pytest.raises(TimeoutError):
        ByteQueue[str](1).get(timeout_s=0)


def test_each_lane_has_its_own_function_and_one_core() -> None:
    threads, both = torch.get_num_threads(), threading.Barrier(2)

    def lane(name: str) -> object:
        def work(item: int) -> tuple[str, int, int]:
            both.wait(LONG_S)  # so that both lanes are at work
            return name, item, torch.get_num_threads()

        return work

    with Lanes.open([lane("a"), lane("b")], "test") as lanes:
        results = [future.result() for future in [lanes.submit(item) for item in range(6)]]
    assert [item for _, item, _ in results] == list(range(6))
    assert {name for name, _, _ in results} == {"a", "b"}
    assert {cores for _, _, cores in results} == {1}
    assert torch.get_num_threads() == threads


def test_a_ring_makes_its_buffers_once_and_waits_for_a_free_one() -> None:
    ring = Ring(2, CPU)
    first = ring.download(torch.arange(6.0).view(2, 3).T)
    second = ring.download(torch.arange(4, dtype=torch.float64))
    addresses = {first.wait().data_ptr(), second.wait().data_ptr()}
    waiting: Future[torch.Tensor] = Future()
    thread = threading.Thread(target=lambda: waiting.set_result(ring.download(torch.ones(3)).wait()))
    thread.start()
    assert torch.equal(first.wait(), torch.arange(6.0).view(2, 3).T)
    assert not waiting.done()
    first.release()
    first.release()  # does nothing more
    assert waiting.result(LONG_S).data_ptr() in addresses
    thread.join()
    assert torch.equal(second.wait(), torch.arange(4, dtype=torch.float64))


@given(st.lists(st.tuples(st.sampled_from("tgskrd"), st.integers(1, 5)), max_size=40))
def test_the_books_add_up(events: list[tuple[str, int]]) -> None:
    told: list[str] = []
    ledger: Ledger[str] = Ledger(told.append)
    for kind, items in events:
        match kind:
            case "t":
                ledger.take(items)
            case "g" | "k":
                ledger.give(items, retried=kind == "k")
            case "s":
                ledger.skip(items)
            case "r":
                ledger.refuse(f"r{items}")
            case "d":
                ledger.drop(f"d{items}")
    count = {kind: sum(items for other, items in events if other == kind) for kind in "tgskrd"}
    balance = ledger.balance
    assert (balance.came, balance.out, balance.retried) == (count["t"], count["g"] + count["k"], count["k"])
    assert balance.came == balance.out + balance.skipped + balance.refused + balance.dropped + balance.leased
    assert told == [f"{kind}{items}" for kind, items in events if kind in "rd"]
    double = Balance.total([balance, balance])
    assert (double.came, double.leased) == (2 * balance.came, 2 * balance.leased)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_a_second_ctrl_c_stops(number: signal.Signals) -> None:
    with stop_request() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
