"""Tests of groups: calibrated where there is no difference, silent where there are too few runs."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as scipy_stats

from halfstep.analyze import stats
from halfstep.analyze.permutation import smallest_p, spread_permutation_p
from halfstep.analyze.stats import Columns, GroupTest


def compare(x: Sequence[float], y: Sequence[float], *, paired: bool, resamples: int = stats.RESAMPLES) -> GroupTest:
    """One quantity of two groups."""
    values = np.array([*x, *y], float).reshape(-1, 1)
    columns = Columns(("m",), values, (len(x), len(y)), paired, np.zeros(1))
    return stats.compare_two("a", "b", columns, resamples=resamples)[0]


def test_a_difference_is_found_and_none_is_not_invented() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, 12), rng.normal(3, 1, 12)
    test = stats.correct([compare(x, y, paired=False)])[0]
    assert test.verdict == "different"
    assert test.p_welch == pytest.approx(scipy_stats.ttest_ind(x, y, equal_var=False).pvalue)
    assert test.interval[0] < test.hedges_g < test.interval[1]
    assert test.hedges_g == pytest.approx(3, abs=1)
    assert test.difference == pytest.approx(y.mean() - x.mean())
    rejected = sum(
        compare(rng.normal(0, 1, 6), rng.normal(0, 1, 6), paired=False).p_permutation < 0.05 for _ in range(60)
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
    assert compare(x, y, paired=False).p_permutation == pytest.approx(expected)


def test_pairs_see_what_groups_cannot() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 10)
    shifted = base + rng.normal(1, 0.3, 10)
    assert compare(base, shifted, paired=True).p_permutation < 0.01
    assert compare(base, shifted, paired=False).p_permutation > 0.5


@pytest.mark.parametrize(("n_a", "n_b", "paired"), [(1, 9, False), (3, 3, False), (5, 5, True), (0, 4, False)])
def test_too_few_runs_get_words_instead_of_a_p_value(n_a: int, n_b: int, paired: bool) -> None:
    test = compare([1.0] * n_a, [2.0] * n_b, paired=paired)
    assert (test.p_permutation, test.p_welch, test.hedges_g) == (None, None, None)
    assert test.verdict == "not enough runs"
    assert test.not_enough.startswith("not enough runs: got" if min(n_a, n_b) else "not enough runs: it has no value")
    assert smallest_p((n_a, n_b), paired=paired) >= 0.05 or min(n_a, n_b) < 2


def test_the_smallest_p_can_be_reached() -> None:
    assert compare([1, 2, 3, 4], [11, 12, 13, 14], paired=False).p_permutation == pytest.approx(
        smallest_p((4, 4), paired=False)
    )
    pairs = compare(np.arange(6.0), 2 * np.arange(6.0) + 1, paired=True)
    assert pairs.p_permutation == pytest.approx(smallest_p((6, 6), paired=True))


def test_no_p_value_is_below_the_smallest_possible() -> None:
    """Values near one that differ a little: rounding must not tell equal arrangements apart."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        x = 0.99 + 0.002 * rng.standard_normal(12)
        y = x + 0.004 + 0.001 * rng.standard_normal(12)
        p = compare(x, y, paired=True).p_permutation
        assert p >= smallest_p((12, 12), paired=True)
        differences = y - x
        flips = np.array(list(itertools.product([1, -1], repeat=12)))
        exact = np.mean(np.abs((flips * differences).mean(axis=1)) >= abs(differences.mean()) * (1 - 1e-12))
        assert p == pytest.approx(exact)


def test_hopeless_after_correction_is_said() -> None:
    one = compare([1, 2, 3, 4], [11, 12, 13, 14], paired=False)
    assert stats.correct([one])[0].verdict == "different"
    many = stats.correct([one] * 11)
    assert {test.verdict for test in many} == {"not enough runs"}
    assert "not enough runs for 11 tests: the smallest corrected p possible is 0.31" in many[0].not_enough


def test_many_tests_can_still_find_a_difference() -> None:
    """Many groups, far apart: the permutations are enough for the correction."""
    rng = np.random.default_rng(0)
    count = 300
    resamples = stats.resamples_for(count)
    test = compare(rng.normal(0, 1, 12), rng.normal(50, 1, 12), paired=False, resamples=resamples)
    assert {found.verdict for found in stats.correct([test] * count)} == {"different"}


def test_a_test_that_others_make_room_for_is_not_called_hopeless() -> None:
    """Holm steps down: beside tests with many runs, one with few can be found."""
    rng = np.random.default_rng(0)
    strong = compare(rng.normal(0, 1, 12), rng.normal(9, 1, 12), paired=False)
    small = compare([1.0, 2, 3, 4, 5], [31.0, 32, 33, 34, 35], paired=False)
    found = stats.correct([*[strong] * 6, small])[-1]
    assert smallest_p((5, 5), paired=False) * 7 > 0.05
    assert (found.verdict, found.not_enough) == ("different", None)


def test_unequal_groups_of_unequal_spread_are_not_taken_for_different() -> None:
    """The permutation of plain means would reject one in four here."""
    rng = np.random.default_rng(0)
    rejected = sum(
        compare(rng.normal(0, 3, 5), rng.normal(0, 1, 30), paired=False, resamples=999).p < 0.05 for _ in range(100)
    )
    assert rejected <= 12  # 5 expected


def test_corrections_against_their_definitions() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert stats.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert stats.correct([]) == []


def test_equal_values_are_no_difference() -> None:
    test = stats.correct([compare([2.0] * 5, [2.0] * 5, paired=False)])[0]
    assert (test.p_permutation, test.p_welch, test.hedges_g, test.verdict) == (1.0, None, None, "no difference shown")


def test_hedges_g_by_hand() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])
    pooled = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    assert compare(x, y, paired=False).hedges_g == pytest.approx(2 / pooled * (1 - 3 / (4 * 6 - 1)))
    assert compare(x, x, paired=False).hedges_g == 0


def test_many_quantities_at_once_are_what_each_gives_alone() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal([0, 100, 3], [1, 5, 0.01], (17, 3))
    together = stats.compare_two("a", "b", Columns(("p", "q", "r"), values, (8, 9), False, np.zeros(3)))
    for k, test in enumerate(together):
        alone = compare(values[:8, k], values[8:, k], paired=False)
        assert test.p_permutation == alone.p_permutation
        assert test.interval == pytest.approx(alone.interval)
        assert test.hedges_g == pytest.approx(alone.hedges_g)


def of_all(values: np.ndarray, sizes: tuple[int, ...], *, paired: bool = False) -> stats.OmnibusTest:
    columns = Columns(("m",), values.reshape(-1, 1), sizes, paired, np.zeros(1))
    return stats.compare_all(columns)[0]


def test_all_groups_at_once_against_other_tests() -> None:
    """Welch's F by scipy, and its permutation p near it where the values are normal."""
    rng = np.random.default_rng(0)
    sizes = (12, 20, 15, 9)
    values = np.concatenate([rng.normal(0.4 * g, 1 + 0.2 * g, n) for g, n in enumerate(sizes)])
    test = of_all(values, sizes)
    groups = np.split(values, np.cumsum(sizes)[:-1])
    assert test.p_welch == pytest.approx(scipy_stats.f_oneway(*groups, equal_var=False).pvalue)
    assert test.p_permutation == pytest.approx(test.p_welch, rel=0.25, abs=0.003)
    between = sum(n * (g.mean() - values.mean()) ** 2 for n, g in zip(sizes, groups, strict=True))
    assert test.explained == pytest.approx(between / np.square(values - values.mean()).sum())
    same = np.concatenate([rng.normal(0, 1, 12)] * 3)
    assert of_all(same, (12, 12, 12)).p_permutation == 1


def test_all_groups_with_the_same_seeds_are_compared_within_seeds() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 9)
    values = np.concatenate([base + rng.normal(shift, 0.3, 9) for shift in (0, 0, 1)])
    assert of_all(values, (9, 9, 9), paired=True).p_permutation < 0.001
    assert of_all(values, (9, 9, 9), paired=False).p_permutation > 0.5


def test_pairs_follow_where_all_groups_differ() -> None:
    """Of four quantities one differs, in one of three groups: the two pairs with this group are found, and corrected
    for the choice of the quantity."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (36, 4))
    values[24:, 2] += 5
    sizes, names = (12, 12, 12), ("p", "q", "r", "s")
    omnibus = stats.correct(stats.compare_all(Columns(names, values, sizes, False, np.zeros(4))))
    assert [test.verdict for test in omnibus] == [*["no difference shown"] * 2, "different", "no difference shown"]
    pairs = []
    for a, b in itertools.combinations(range(3), 2):
        chosen = np.concatenate([values[12 * a : 12 * a + 12, 2:3], values[12 * b : 12 * b + 12, 2:3]])
        pairs += stats.compare_two(str(a), str(b), Columns(("r",), chosen, (12, 12), False, np.zeros(1)))
    corrected = stats.correct_within({"r": pairs}, omnibus)
    assert [test.verdict for test in corrected] == ["no difference shown", "different", "different"]
    plain = stats.correct(pairs)
    for one, other in zip(corrected, plain, strict=True):
        assert one.p_holm == pytest.approx(min(1, max(4 * other.p_holm, omnibus[2].p_holm)))


def test_what_rounding_could_have_made_gets_no_verdict() -> None:
    x, y = np.arange(8.0), np.arange(8.0) + 20

    def verdict(resolution: float) -> str:
        columns = Columns(("m",), np.concatenate([x, y]).reshape(-1, 1), (8, 8), False, np.array([resolution]))
        return stats.correct(stats.compare_two("a", "b", columns))[0].verdict

    assert verdict(19.9) == "different"
    assert verdict(20.1) == "not resolved"
    assert verdict(math.inf) == "not resolved"


@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (5, 15)])
def test_spreads_of_groups_that_are_alike_are_found_alike(sizes: tuple[int, ...]) -> None:
    """Few points in two clouds, where distances to a fitted center vary together: 5% are expected and less in a
    thousand at 0.005, where arranging the distances finds ten times that."""
    rng = np.random.default_rng(0)
    chances = []
    for _ in range(300):
        points = rng.normal(0, 1, (sum(sizes), 4)) + 6 * rng.integers(0, 2, (sum(sizes), 1))
        chances.append(spread_permutation_p(points @ points.T, sizes, paired=False, resamples=499))
    assert 5 <= sum(p < 0.05 for p in chances) <= 25  # 15 expected
    assert sum(p < 0.005 for p in chances) <= 6  # 1.5 expected


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("apart", [0.0, 5.0, 50.0])
def test_wider_groups_are_found(paired: bool, apart: float) -> None:
    """However far the groups' centers lie from one another, two of them or five."""
    rng = np.random.default_rng(0)
    for groups, runs in ((2, 12), (5, 8)):
        sizes = (runs,) * groups
        points = np.concatenate([rng.normal(apart * g, 1.0 + 4.0 * (g == 1), (runs, 4)) for g in range(groups)])
        assert spread_permutation_p(points @ points.T, sizes, paired=paired, resamples=999) < 0.05


@pytest.mark.parametrize("paired", [False, True])
def test_pairs_among_many_groups(paired: bool) -> None:
    """Eight runs a group, too few for 190 pairs on their own: the groups that lie apart are told apart, and no
    others are."""
    rng = np.random.default_rng(0)
    sizes = (8,) * 20
    seeds = rng.normal(0, 3, 8)
    values = np.concatenate([(seeds if paired else 0) + rng.normal(9 * (g == 4), 1, 8) for g in range(20)])
    columns = Columns(("m",), values.reshape(-1, 1), sizes, paired, np.zeros(1))
    names = [str(g) for g in range(20)]
    tests = stats.correct(stats.compare_pairs(names, columns, resamples=stats.resamples_for(190)))
    found = {(test.a, test.b) for test in tests if test.verdict == "different"}
    assert found == {(str(min(4, g)), str(max(4, g))) for g in range(20) if g != 4}


def test_pairs_of_alike_groups_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    below = []
    for _ in range(60):
        columns = Columns(("m",), rng.normal(0, 1, (32, 1)), (8, 8, 8, 8), False, np.zeros(1))
        below += [test.p < 0.05 for test in stats.compare_pairs(list("abcd"), columns, resamples=499)]
    assert 0.01 < np.mean(below) < 0.08
