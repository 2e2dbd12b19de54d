"""Sets of numbers as intervals, against Python's own sets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from halfstep.stream.events import Identity
from halfstep.stream.seen import Numbers, Seen, Verdict

SMALL = st.integers(0, 25)


@given(st.lists(st.tuples(SMALL, st.integers(0, 4))), SMALL, st.none() | st.integers(0, 30))
def test_numbers(added: list[tuple[int, int]], first: int, count: int | None) -> None:
    numbers, oracle = Numbers(), set()
    for start, length in added:
        numbers.add_range(start, start + length)
        oracle |= set(range(start, start + length + 1))
    assert len(numbers) == len(oracle)
    assert all((number in numbers) == (number in oracle) for number in range(40))
    intervals = list(numbers.intervals())
    assert all(end + 1 < start for (_, end), (start, _) in pairwise(intervals))
    stop = first + count if count is not None else max(oracle, default=-1) + 1
    missing = [number for number in range(first, stop) if number not in oracle]
    assert [number for start, end in numbers.gaps(first, count) for number in range(start, end + 1)] == missing


@given(st.lists(st.tuples(st.sampled_from(["lease", "commit", "release", "refuse"]), st.integers(0, 3), st.booleans())))
def test_what_an_event_is(steps: list[tuple[str, int, bool]]) -> None:
    seen, state, crcs = Seen(), {}, {}
    for action, number, same in steps:
        identity = Identity("r", "s", "e", number)
        if action == "lease":
            crc = crcs.get(number, 7) if same else 8 + number
            verdict = seen.lease(identity, crc)
            if number not in state:
                assert verdict is Verdict.NEW
                state[number], crcs[number] = Verdict.LEASED, crc
            else:
                assert verdict is (state[number] if crc == crcs[number] else Verdict.OTHER)
        elif action == "commit" and number in state:
            seen.commit(identity, crcs[number])
            state[number] = Verdict.COMMITTED
        elif state.get(number) is Verdict.LEASED:
            seen.release(identity, crcs[number])
            if action == "refuse":
                seen.refuse(identity)
            del state[number], crcs[number]
    committed, leased, _ = ([*numbers(ranges)] for ranges in seen.states("r", "s", [(0, 1), (2, 2**62)]))
    assert committed == [number for number in range(4) if state.get(number) is Verdict.COMMITTED]
    assert leased == [number for number in range(4) if state.get(number) is Verdict.LEASED]


def numbers(ranges: list[tuple[int, int]]) -> Iterator[int]:
    for first, last in ranges:
        yield from range(first, last + 1)
