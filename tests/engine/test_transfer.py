"""Buffers of a ring are one's own for as long as they are held."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.engine import HostCopy, Ring

COUNT = 3


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, COUNT - 1)), max_size=40))
def test_no_two_copies_share_memory_and_none_is_changed_by_another(steps: list[tuple[bool, int, int]]) -> None:
    """Copies of many sizes are taken and given back in any order; each keeps its values until it is given back, and
    has none after that."""
    ring = Ring(COUNT, torch.device("cpu"))
    held: list[tuple[HostCopy, torch.Tensor]] = []
    for number, (takes, size, which) in enumerate(steps):
        if takes and len(held) < COUNT:
            values = torch.full((size,), number, dtype=torch.float64 if number % 2 else torch.float16)
            held.append((ring.download(values), values))
        elif held:
            copy, _ = held.pop(which % len(held))
            copy.release()
            with pytest.raises(RuntimeError, match="was given back"):
                copy.wait()
        assert all(torch.equal(copy.wait(), values) for copy, values in held)
        addresses = [copy.wait().untyped_storage().data_ptr() for copy, _ in held]
        assert len(set(addresses)) == len(addresses)


def test_leaving_the_context_gives_the_buffer_back() -> None:
    ring = Ring(1, torch.device("cpu"))
    with ring.download(torch.ones(4)) as copy:
        assert copy.wait().sum() == 4
    with pytest.raises(RuntimeError, match="was given back"):
        copy.wait()
    assert ring.download(torch.zeros(4)).wait().sum() == 0
