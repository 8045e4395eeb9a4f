import pytest
import torch

from growkernels.experiments.statistics import (
    Claim,
    Estimate,
    Finding,
    difference,
    equal,
    estimate,
    lower,
    rank_correlation,
)


def test_estimate_is_mean_and_standard_error_of_finite_runs():
    result = estimate(torch.tensor([1.0, 2.0, 3.0, float("nan"), float("inf")]))
    assert result.mean == pytest.approx(2.0)
    assert result.sem == pytest.approx(1 / 3**0.5)
    assert result.count == 3
    assert estimate(torch.tensor([float("nan")])).count == 0


def test_pairing_removes_what_runs_share():
    shared = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 10
    first, second = shared + 1.0, shared + 0.01 * torch.arange(50)
    paired = difference(first, second, paired=True)
    unpaired = difference(first, second, paired=False)
    assert paired.mean == pytest.approx(unpaired.mean, abs=1e-5)
    assert paired.sem < 0.05 < unpaired.sem


def test_lower_needs_two_standard_errors():
    assert lower(Estimate(-0.21, 0.1, 30)) == "holds"
    assert lower(Estimate(-0.19, 0.1, 30)) == "cannot be told"
    assert lower(Estimate(0.21, 0.1, 30)) == "does not hold"
    assert lower(Estimate(-0.2, 0.0, 1)) == "cannot be told"
    assert lower(Estimate(float("nan"), float("nan"), 0)) == "cannot be told"


def test_equal_needs_a_tight_interval():
    assert equal(Estimate(0.01, 0.02, 30), scale=1.0) == "holds"
    assert equal(Estimate(0.01, 0.06, 30), scale=1.0) == "cannot be told"
    assert equal(Estimate(0.3, 0.06, 30), scale=1.0) == "does not hold"


def test_a_claim_follows_from_its_findings():
    def claim(*verdicts):
        return Claim("c", [Finding("s", "m", v) for v in verdicts]).verdict

    assert claim("holds", "holds", None) == "holds"
    assert claim("holds", "does not hold") == "does not hold"
    assert claim("holds", "cannot be told") == "cannot be told"
    assert claim(None) == claim() == "cannot be told"


def test_rank_correlation_is_spearmans():
    first = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    # Ranks 1 0 2 4 3: 1 - 6 * (1 + 1 + 0 + 1 + 1) / (5 * 24)
    second = torch.tensor([0.2, 0.1, 0.3, 7.0, 0.4])
    found, chance = rank_correlation(first, second)
    assert found == pytest.approx(0.8)
    assert chance == pytest.approx(8 / 120, abs=0.01)  # permutations with at most 4 in that sum
    assert rank_correlation(first, -first)[0] == pytest.approx(-1)
    tied = rank_correlation(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 3]))
    assert tied[0] == pytest.approx(0.75**0.5)
    assert rank_correlation(first, torch.ones(5))[0] != rank_correlation(first, torch.ones(5))[0]
