"""Clips of a video's frames against their definition."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from halfstep.data.base import contiguous_runs
from halfstep.encode.clips import LastClip, cut_clips


@given(st.sets(st.integers(0, 40)), st.integers(1, 7), st.sampled_from(get_args(LastClip)))
def test_clips_are_their_definition(numbers: set[int], length: int, last: LastClip) -> None:
    frames = [(number, f"frame {number}") for number in sorted(numbers)]
    expected = []
    for start, stop in contiguous_runs([number for number, _ in frames]):
        run = frames[start:stop]
        whole = len(run) // length * length
        expected += [run[i : i + length] for i in range(0, whole, length)]
        rest = run[whole:]
        if rest and last == "pad":
            rest = rest + [rest[-1]] * (length - len(rest))
        elif rest and last == "overlap" and whole:
            rest = run[-length:]
        if rest:
            expected.append(rest)
    assert list(cut_clips(iter(frames), length, last)) == expected
