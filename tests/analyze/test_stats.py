"""Tests of groups: calibrated where there is no difference, silent where there are too few runs."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from halfstep.analyze import stats


def test_a_difference_is_found_and_none_is_not_invented() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, 12), rng.normal(3, 1, 12)
    test = stats.correct([stats.compare("m", "a", "b", x, y, paired=False)])[0]
    assert test.verdict == "different"
    assert test.p_welch == pytest.approx(scipy_stats.ttest_ind(x, y, equal_var=False).pvalue)
    assert test.interval[0] < test.hedges_g < test.interval[1]
    assert test.hedges_g == pytest.approx(3, abs=1)
    assert test.difference == pytest.approx(y.mean() - x.mean())
    rejected = sum(
        stats.compare("m", "a", "b", rng.normal(0, 1, 6), rng.normal(0, 1, 6), paired=False).p_permutation < 0.05
        for _ in range(60)
    )
    assert rejected <= 9  # 3 expected; more than 9 has a chance of 0.1%


def test_exact_permutation_of_small_groups() -> None:
    """Against a listing of all arrangements."""
    x, y = np.array([1.0, 2.5, 0.3, 1.7]), np.array([2.0, 4.0, 3.1, 2.2])

    def t(a: np.ndarray, b: np.ndarray) -> float:
        return abs(float(scipy_stats.ttest_ind(a, b, equal_var=False).statistic))

    observed = t(x, y)
    both = np.concatenate([x, y])
    differences = [t(both[list(chosen)], np.delete(both, chosen)) for chosen in itertools.combinations(range(8), 4)]
    expected = np.mean([d >= observed - 1e-12 for d in differences])
    assert stats.compare("m", "a", "b", x, y, paired=False).p_permutation == pytest.approx(expected)


def test_pairs_see_what_groups_cannot() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 10)
    shifted = base + rng.normal(1, 0.3, 10)
    assert stats.compare("m", "a", "b", base, shifted, paired=True).p_permutation < 0.01
    assert stats.compare("m", "a", "b", base, shifted, paired=False).p_permutation > 0.5


@pytest.mark.parametrize(("n_a", "n_b", "paired"), [(1, 9, False), (3, 3, False), (5, 5, True), (0, 4, False)])
def test_too_few_runs_get_words_instead_of_a_p_value(n_a: int, n_b: int, paired: bool) -> None:
    test = stats.compare("m", "a", "b", [1.0] * n_a, [2.0] * n_b, paired=paired)
    assert (test.p_permutation, test.p_welch, test.hedges_g) == (None, None, None)
    assert test.verdict == "not enough runs"
    assert test.not_enough.startswith("not enough runs: got")
    assert stats.smallest_p(n_a, n_b, paired=paired) >= 0.05 or min(n_a, n_b) < 2


def test_the_smallest_p_can_be_reached() -> None:
    assert stats.compare("m", "a", "b", [1, 2, 3, 4], [11, 12, 13, 14], paired=False).p_permutation == pytest.approx(
        stats.smallest_p(4, 4, paired=False)
    )
    pairs = stats.compare("m", "a", "b", np.arange(6.0), 2 * np.arange(6.0) + 1, paired=True)
    assert pairs.p_permutation == pytest.approx(stats.smallest_p(6, 6, paired=True))


def test_no_p_value_is_below_the_smallest_possible() -> None:
    """Values near one that differ a little: rounding must not tell equal arrangements apart."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        x = 0.99 + 0.002 * rng.standard_normal(12)
        y = x + 0.004 + 0.001 * rng.standard_normal(12)
        p = stats.compare("m", "a", "b", x, y, paired=True).p_permutation
        assert p >= stats.smallest_p(12, 12, paired=True)
        differences = y - x
        flips = np.array(list(itertools.product([1, -1], repeat=12)))
        exact = np.mean(np.abs((flips * differences).mean(axis=1)) >= abs(differences.mean()) * (1 - 1e-12))
        assert p == pytest.approx(exact)


def test_hopeless_after_correction_is_said() -> None:
    one = stats.compare("m", "a", "b", [1, 2, 3, 4], [11, 12, 13, 14], paired=False)
    assert stats.correct([one])[0].verdict == "different"
    many = stats.correct([one] * 11)
    assert {test.verdict for test in many} == {"not enough runs"}
    assert "not enough runs for 11 tests: the smallest corrected p possible is 0.31" in many[0].not_enough


def test_many_tests_can_still_find_a_difference() -> None:
    """Many groups, far apart: the permutations are enough for the correction."""
    rng = np.random.default_rng(0)
    count = 300
    resamples = stats.resamples_for(count)
    test = stats.compare("m", "a", "b", rng.normal(0, 1, 12), rng.normal(50, 1, 12), paired=False, resamples=resamples)
    assert {found.verdict for found in stats.correct([test] * count)} == {"different"}


def test_a_test_that_others_make_room_for_is_not_called_hopeless() -> None:
    """Holm steps down: beside tests with many runs, one with few can be found."""
    rng = np.random.default_rng(0)
    strong = stats.compare("m", "a", "b", rng.normal(0, 1, 12), rng.normal(9, 1, 12), paired=False)
    small = stats.compare("m", "a", "b", [1.0, 2, 3, 4, 5], [31.0, 32, 33, 34, 35], paired=False)
    found = stats.correct([*[strong] * 6, small])[-1]
    assert stats.smallest_p(5, 5, paired=False) * 7 > 0.05
    assert (found.verdict, found.not_enough) == ("different", None)


def test_unequal_groups_of_unequal_spread_are_not_taken_for_different() -> None:
    """The permutation of plain means would reject one in four here."""
    rng = np.random.default_rng(0)
    rejected = sum(
        stats.compare("m", "a", "b", rng.normal(0, 3, 5), rng.normal(0, 1, 30), paired=False, resamples=999).p < 0.05
        for _ in range(100)
    )
    assert rejected <= 12  # 5 expected


def test_separations_are_corrected_over_pairs_too() -> None:
    levels = [stats.Separation("a", "b", 1.0, 1.0, 0.01, 0.02), stats.Separation("a", "b", 0.0, 1.0, 0.001, 0.6)]
    few = [stats.Separation("a", "c", 1.0, 1.0, None, None)]
    both = stats.correct_over_pairs([levels, levels, few])
    assert [level.p_corrected for level in both] == [0.04, 1.0, 0.04, 1.0, None]


def test_corrections_against_their_definitions() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert stats.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert stats.holm(np.array([])).size == 0
    assert stats.correct([]) == []


def test_equal_values_are_no_difference() -> None:
    test = stats.correct([stats.compare("m", "a", "b", [2.0] * 5, [2.0] * 5, paired=False)])[0]
    assert (test.p_permutation, test.p_welch, test.hedges_g, test.verdict) == (1.0, None, None, "no difference shown")


def test_hedges_g_by_hand() -> None:
    x, y = np.array([1.0, 2, 3]), np.array([3.0, 4, 5])
    assert stats.hedges_g(x, y) == pytest.approx(2 / 1 * (1 - 3 / (4 * 4 - 1)))
    assert stats.hedges_g(x, x) == 0


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def test_energy_distance_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (5, 3)), rng.normal(1, 1, (7, 3))
    in_b = np.array([False] * 5 + [True] * 7)
    between = np.mean([np.linalg.norm(a - b) for a in x for b in y])
    within = [np.mean([np.linalg.norm(a - b) for a, b in itertools.permutations(points, 2)]) for points in (x, y)]
    expected = 2 * between - sum(within)
    assert stats.energy_distance(distances(np.vstack([x, y])), in_b) == pytest.approx(expected)


def test_separation_is_found_where_it_begins() -> None:
    """Pairs that begin as the same noise: no distance at first, none found where there is none."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (8, 4))
    levels = []
    for shift in (0.0, 0.0, 0.5, 2.0, 4.0):
        wobble = 0.2 * rng.normal(0, 1, (2, 8, 4)) if shift == 0 and levels else np.zeros((2, 8, 4))
        levels.append(distances(np.vstack([noise + wobble[0], noise + wobble[1] + shift])))
    in_b = np.array([False] * 8 + [True] * 8)
    energy, alone, corrected = stats.energy_tests(np.array(levels), in_b, paired=True)
    assert energy[0] == pytest.approx(0, abs=1e-9)
    assert (np.diff(energy[1:]) > 0).all()
    assert (corrected >= alone).all()
    assert corrected[0] > 0.5
    assert corrected[1] > 0.05
    assert (corrected[2:] < 0.05).all()
    unpaired = stats.energy_tests(np.array(levels), in_b, paired=False)[2]
    assert unpaired[-1] < 0.01
    few = stats.energy_tests(np.array(levels)[:, :6, :6], np.array([False] * 3 + [True] * 3), paired=False)
    assert few[1] is None
    assert few[2] is None


def test_the_level_of_separation_holds_to_the_end() -> None:
    def level(sigma: float, p: float | None) -> stats.Separation:
        return stats.Separation("a", "b", sigma, 1.0, p, p)

    levels = [level(1.0, 0.01), level(0.7, 0.2), level(0.4, 0.01), level(0.0, 0.02)]
    assert stats.separates_at(levels) == 0.4
    assert stats.separates_at([*levels, level(0.0, 0.3)]) is None
    assert stats.separates_at([level(1.0, None)]) is None


def test_dispersion_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    values, hits = [], 0
    for _ in range(200):
        value, interval = stats.dispersion(rng.normal(0, 2, (6, 3)))
        values.append(value**2)
        hits += interval[0] <= 2 * math.sqrt(3) <= interval[1]
    assert np.mean(values) == pytest.approx(12, rel=0.1)
    assert hits > 160  # of 200, at 95%
    assert stats.dispersion(np.zeros((1, 3)))[1] is None
    assert stats.dispersion(rng.normal(0, 1, (3, 3)))[1] is None
    spread = stats.distances_to_center(rng.normal(0, 2, (500, 3)))
    assert np.mean(spread**2) == pytest.approx(12, rel=0.15)
