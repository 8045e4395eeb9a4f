"""The statistics behind the verdicts: false ones, power, and agreement with known values."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
from scipy import stats

from growkernels.experiments.statistics import (
    LEVEL,
    MINIMUM_RUNS,
    effect,
    estimate,
    holm,
    p_values,
    rank_correlation,
    within_margin,
)

NULLS = 10_000
# What 10,000 draws with probability LEVEL exceed once in a thousand times.
AT_MOST = LEVEL + 3.1 * (LEVEL * (1 - LEVEL) / NULLS) ** 0.5


@pytest.mark.parametrize("runs", [MINIMUM_RUNS, 10])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_false_verdicts_are_as_rare_as_stated(runs: int, kind: str) -> None:
    draw = getattr(numpy.random.default_rng(7), kind)
    below, above = p_values(draw(size=(NULLS, runs)))
    for p in (below, above):
        assert (p <= LEVEL).mean() <= AT_MOST
    assert not ((below <= LEVEL) & (above <= LEVEL)).any()
    # A claim of five settings, in none of which there is anything.
    refuted = [any(holm(list(p))) for p in above.reshape(-1, 5)]
    assert numpy.mean(refuted) <= LEVEL + 3.1 * (LEVEL / len(refuted)) ** 0.5


def test_ten_runs_find_an_effect_of_one_and_a_fifth_standard_deviations() -> None:
    found, _ = p_values(numpy.random.default_rng(8).normal(-1.2, size=(2000, 10)))
    assert (found <= LEVEL).mean() > 0.85


def test_fewer_runs_than_the_smallest_number_can_find_nothing() -> None:
    for runs, able in ((MINIMUM_RUNS, True), (MINIMUM_RUNS - 1, False)):
        below, above = p_values(numpy.linspace(-3.1, -2.9, runs))
        assert (below <= LEVEL) == able
        assert above > 0.5


def test_the_larger_of_two_p_values_counts() -> None:
    values = numpy.array([-0.3, -1.2, 0.4, -0.9, -0.8, -0.1, -1.5])
    student = stats.ttest_1samp(values, 0, alternative="less").pvalue
    flips = [
        numpy.dot(values, signs) <= values.sum() + 1e-12
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    below, above = p_values(values)
    assert below == pytest.approx(max(student, numpy.mean(flips)))
    assert above > 0.9


def test_many_runs_are_flipped_at_random() -> None:
    values = numpy.random.default_rng(4).normal(-0.3, 1.0, 30)
    theirs = stats.permutation_test(
        (values,), numpy.mean, permutation_type="samples", alternative="less", rng=1
    ).pvalue
    student = stats.ttest_1samp(values, 0, alternative="less").pvalue
    assert p_values(values)[0] == pytest.approx(max(theirs, student), abs=0.01)


def test_equal_runs_decide_and_zeros_do_not() -> None:
    assert p_values(numpy.zeros(8))[0] == p_values(numpy.zeros(8))[1] == 1
    assert p_values(numpy.full(8, -1.0))[0] == pytest.approx(1 / 256)


def test_equality_needs_differences_well_inside_the_margin() -> None:
    values = numpy.random.default_rng(3).normal(0.0, 0.1, 20)
    inside, outside = within_margin(values, 0.5)
    assert inside <= LEVEL < outside
    assert within_margin(values, 0.02)[0] > LEVEL
    inside, outside = within_margin(values + 0.7, 0.5)
    assert outside <= LEVEL < inside


def test_an_effect_has_students_and_a_bootstrap_interval() -> None:
    values = [1.0, 2.0, 4.0, math.nan, 3.5, 2.5, 2.0]
    found = effect(values)
    low, high = stats.ttest_1samp([v for v in values if v == v], 0).confidence_interval(0.95)
    assert (found.low, found.high, found.count) == (pytest.approx(low), pytest.approx(high), 6)
    assert found.low < found.bca_low < found.mean < found.bca_high < found.high
    assert effect([1.0]).as_json()["low"] is None
    assert effect([]).count == 0
    assert effect([2.0, 2.0]).low == 2.0


def test_holm_corrects_for_the_number_of_settings() -> None:
    assert holm([0.02]) == [True]
    assert holm([0.02, 0.5]) == [False, False]
    assert holm([0.01, 0.02]) == [True, True]
    assert holm([]) == []


def test_estimate_is_mean_and_standard_error_of_finite_runs() -> None:
    result = estimate([1.0, 2.0, 3.0, math.nan, math.inf])
    assert (result.mean, result.count) == (2.0, 3)
    assert result.sem == pytest.approx(1 / 3**0.5)
    assert estimate([math.nan]).count == 0


def test_rank_correlation_is_spearmans() -> None:
    first = numpy.array([10.0, 20.0, 30.0, 40.0, 50.0])
    # Ranks 1 0 2 4 3: 1 - 6 * (1 + 1 + 0 + 1 + 1) / (5 * 24)
    found, above, below = rank_correlation(first, [0.2, 0.1, 0.3, 7.0, 0.4])
    assert found == pytest.approx(0.8)
    assert above == pytest.approx(8 / 120)  # permutations with at most 4 in that sum
    assert below > 0.9
    assert rank_correlation(first, -first)[0] == pytest.approx(-1)
    assert rank_correlation([1.0, 1, 2], [1.0, 2, 3])[0] == pytest.approx(0.75**0.5)
    assert math.isnan(rank_correlation(first, numpy.ones(5))[0])
