"""When groups separate: energy distances and their tests."""

import itertools

import numpy as np
import pytest

from halfstep.analyze import energy
from halfstep.analyze.energy import Separation


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def test_energy_distance_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(g, 1, (n, 3)) for g, n in enumerate((5, 7, 4))]

    def of_two(x: np.ndarray, y: np.ndarray) -> float:
        between = np.mean([np.linalg.norm(a - b) for a in x for b in y])
        within = [np.mean([np.linalg.norm(a - b) for a, b in itertools.permutations(points, 2)]) for points in (x, y)]
        return float(2 * between - sum(within))

    assert energy.energy_distance(distances(np.vstack(groups[:2])), (5, 7)) == pytest.approx(of_two(*groups[:2]))
    expected = np.mean([of_two(x, y) for x, y in itertools.combinations(groups, 2)])
    assert energy.energy_distance(distances(np.vstack(groups)), (5, 7, 4)) == pytest.approx(expected)


@pytest.mark.parametrize("groups", [2, 4])
def test_separation_is_found_where_it_begins(groups: int) -> None:
    """Runs that begin as the same noise: no distance at first, none found where there is none."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (8, 4))
    levels = []
    for shift in (0.0, 0.0, 0.5, 2.0, 4.0):
        wobble = 0.2 * rng.normal(0, 1, (groups, 8, 4)) if shift == 0 and levels else np.zeros((groups, 8, 4))
        levels.append(distances(np.vstack([noise + wobble[g] + shift * g for g in range(groups)])))
    sizes = (8,) * groups
    found, alone, corrected = energy.energy_tests(np.array(levels), sizes, paired=True)
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert (np.diff(found[1:]) > 0).all()
    assert (corrected >= alone).all()
    assert corrected[0] > 0.5
    assert corrected[1] > 0.05
    assert (corrected[2:] < 0.05).all()
    assert energy.energy_tests(np.array(levels), sizes, paired=False)[2][-1] < 0.01
    few = energy.energy_tests(np.array(levels)[:, :6, :6], (3, 3), paired=False)
    assert few[1] is None
    assert few[2] is None


def test_all_arrangements_of_few_runs_are_tried() -> None:
    """Against a listing of all of them."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 1, (4, 2)), rng.normal(1, 1, (4, 2))])
    plain = distances(points)

    def within(order: list[int]) -> float:
        return sum(plain[np.ix_(part, part)].sum() / 4 for part in (order[:4], order[4:]))

    given = within(list(range(8)))
    listed = [[*c, *(i for i in range(8) if i not in c)] for c in itertools.combinations(range(8), 4)]
    expected = np.mean([within(order) <= given * (1 + 1e-12) for order in listed])
    assert energy.energy_tests(plain[None], (4, 4), paired=False)[1][0] == pytest.approx(expected)


def test_separations_are_corrected_over_pairs_too() -> None:
    levels = [Separation("a", "b", 1.0, 1.0, 0.01, 0.02), Separation("a", "b", 0.0, 1.0, 0.001, 0.6)]
    few = [Separation("a", "c", 1.0, 1.0, None, None)]
    both = energy.correct_over_pairs([levels, levels, few])
    assert [level.p_corrected for level in both] == [0.04, 1.0, 0.04, 1.0, None]


def test_pairs_too_many_for_their_runs_get_no_p_value() -> None:
    """Ten seeds in common have 1024 arrangements, of which two say the same: too few for 45 pairs."""
    level = Separation("a", "b", 0.0, 9.0, 0.002, 0.002, 2 / 1024)
    assert {found.p_corrected for found in energy.correct_over_pairs([[level]] * 45)} == {None}
    assert {found.p_corrected for found in energy.correct_over_pairs([[level]] * 20)} == {0.04}


def test_the_level_of_separation_holds_to_the_end() -> None:
    def level(sigma: float, p: float | None) -> Separation:
        return Separation("a", "b", sigma, 1.0, p, p)

    levels = [level(1.0, 0.01), level(0.7, 0.2), level(0.4, 0.01), level(0.0, 0.02)]
    assert energy.separates_at(levels) == 0.4
    assert energy.separates_at([*levels, level(0.0, 0.3)]) is None
    assert energy.separates_at([level(1.0, None)]) is None
