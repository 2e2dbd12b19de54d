"""What differs from last time."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import InputError
from halfstep.settings import differences, require_same

leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2) | st.lists(st.integers(0, 2))
inner = st.recursive(leaves, lambda trees: st.dictionaries(st.sampled_from("xy"), trees, min_size=1))
settings = st.dictionaries(st.sampled_from("pqr"), inner, min_size=1)


def places(tree: Any, above: str = "") -> Iterator[str]:
    """Dotted names of all leaves."""
    if not isinstance(tree, dict):
        yield above
        return
    for name, value in tree.items():
        yield from places(value, f"{above}.{name}" if above else name)


def changed(tree: Any, place: str) -> Any:
    """A copy with another value at one place."""
    name, _, below = place.partition(".")
    return "other" if not place else {**tree, name: changed(tree[name], below)}


@given(settings)
def test_the_same_settings_do_not_differ(tree: dict[str, Any]) -> None:
    assert differences(tree, tree) == []
    assert differences({**tree, "gone": 1}, tree) == []


@given(settings, st.data())
def test_one_changed_setting_is_one_line(before: dict[str, Any], data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(sorted(places(before))))
    now = changed(before, place)
    assert [line.partition(":")[0] for line in differences(before, now)] == [place]
    assert differences(before, now, {place}) == differences(before, now, {place.partition(".")[0]}) == []


def test_what_differs_is_named_by_its_place() -> None:
    before = {"a": 1, "b": {"c": "x", "d": [1]}, "gone": 3}
    now = {"a": 2, "b": {"c": "y", "d": [1], "new": True}}
    assert differences(before, now) == ["a: was 1, is 2", "b.c: was 'x', is 'y'", "b.new: was None, is True"]
    assert differences(before, now, {"b.c", "a"}) == ["b.new: was None, is True"]
    assert differences(before, now, {"b", "a"}) == []
    with pytest.raises(InputError, match=r"^here: holds a run with other settings \(a: was 1, is 2\); do this$"):
        require_same("here", "run", before, now, may_differ={"b"}, advice="do this")
