"""The tests behind every verdict on measured runs: registered before the runs, checked by a test.

Everything compares paired differences: runs of one number share their seeds. Student's t (n - 1
degrees of freedom) and the sign-flip permutation test have to agree: of two p-values the larger one
counts. Effects come with Student's and with the bootstrap's BCa interval.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from growkernels.experiments.run_folder import number

# Of false verdicts in each direction: "holds" and "does not hold" together are wrong in 5 %.
LEVEL = 0.025
# The smallest number of runs whose sign-flip permutations reach that level (one in 64).
MINIMUM_RUNS = 6
FLIPS = 9_999  # at most; exact where there are fewer
CONFIDENCE = 0.95
_ROWS = 500  # of differences whose sign patterns are in memory together

Floats = NDArray[numpy.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over ``count`` runs."""

    mean: float
    sem: float
    count: int

    def text(self, digits: int = 3) -> str:
        return f"{self.mean:.{digits}f} ± {self.sem:.{digits}f}"

    def as_json(self, quantity: str) -> dict[str, float | None]:
        """As summaries have it."""
        return {f"{quantity}_mean": number(self.mean), f"{quantity}_sem": number(self.sem)}


def estimate(values: ArrayLike) -> Estimate:
    """Mean and standard error of ``values`` [runs]; runs that diverged (not finite) are left out.

    The standard error of fewer than two runs is 0.
    """
    finite = torch.from_numpy(_finite(values))
    count = len(finite)
    if count == 0:
        return Estimate(math.nan, math.nan, 0)
    sem = finite.std().item() / count**0.5 if count > 1 else 0.0
    return Estimate(finite.mean().item(), sem, count)


@dataclass(frozen=True)
class Effect:
    """The mean of paired differences, with its 95 % intervals: Student's and BCa's."""

    mean: float
    low: float
    high: float
    bca_low: float
    bca_high: float
    count: int

    def text(self, digits: int = 3, unit: str = "") -> str:
        if self.count < 2:
            return f"{self.mean:+.{digits}f}{unit} ({self.count} run{'s' * (self.count != 1)})"
        return (
            f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]{unit} "
            f"({self.count} runs)"
        )

    def as_json(self) -> dict[str, Any]:
        return {**{k: number(v) for k, v in vars(self).items()}, "count": self.count}


def effect(differences: ArrayLike) -> Effect:
    """Of differences [runs]; those that are not finite are left out."""
    finite = _finite(differences)
    count = len(finite)
    mean = float(finite.mean()) if count else math.nan
    if count < 2:
        return Effect(mean, -math.inf, math.inf, -math.inf, math.inf, count)
    if numpy.ptp(finite) == 0:
        return Effect(mean, mean, mean, mean, mean, count)
    spread = float(stats.sem(finite)) * float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few values the interval may not exist
        bca = stats.bootstrap(
            (finite,), numpy.mean, confidence_level=CONFIDENCE, method="BCa", rng=0
        ).confidence_interval
    return Effect(mean, mean - spread, mean + spread, float(bca.low), float(bca.high), count)


def p_values(differences: ArrayLike) -> tuple[Floats, Floats]:
    """One-sided p-values of "the mean is below 0" and "above 0" for differences [..., runs].

    Of the two tests the larger p-value. 1 where the differences are all 0.
    """
    values = numpy.asarray(differences, dtype=numpy.float64)
    below, above = (
        numpy.fmax(_student(sign * values), _sign_flips(sign * values)) for sign in (1, -1)
    )
    return below, above


def _student(values: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal differences: infinite t, or 0 / 0
        p = stats.ttest_1samp(values, 0.0, axis=-1, alternative="less").pvalue
    return numpy.nan_to_num(numpy.asarray(p, dtype=numpy.float64), nan=1.0)


def _sign_flips(values: Floats) -> Floats:
    """The share of the sign patterns whose mean is as low: of all, or of FLIPS random ones.

    `scipy.stats.permutation_test` in one matrix product, hundreds of times as fast.
    """
    runs = values.shape[-1]
    exact = 2**runs <= FLIPS + 1
    if exact:
        bits = numpy.arange(2**runs)[:, None] >> numpy.arange(runs)
        signs = 1.0 - 2.0 * (bits & 1)
    else:
        signs = numpy.random.default_rng(0).choice((-1.0, 1.0), (FLIPS, runs))
    flat = values.reshape(-1, runs)
    # Sums that differ in rounding alone count as equal.
    bounds = flat.sum(axis=1) + 1e-12 * numpy.abs(flat).sum(axis=1)
    shares = numpy.empty(len(flat))
    for begin in range(0, len(flat), _ROWS):
        part = slice(begin, begin + _ROWS)
        hits = (flat[part] @ signs.T <= bounds[part, None]).sum(axis=1)
        shares[part] = hits / len(signs) if exact else (hits + 1) / (len(signs) + 1)
    return shares.reshape(values.shape[:-1])


def within_margin(differences: ArrayLike, margin: float) -> tuple[float, float]:
    """p-values of "the mean is surely inside ±margin" (two one-sided tests) and "outside"."""
    finite = _finite(differences)
    inside = max(float(p_values(finite + margin)[1]), float(p_values(finite - margin)[0]))
    outside = 2 * min(float(p_values(finite + margin)[0]), float(p_values(finite - margin)[1]))
    return inside, min(1.0, outside)


def holm(p: Sequence[float]) -> list[bool]:
    """Which hypotheses of a union can be rejected at LEVEL, by Holm's correction."""
    rejected = [False] * len(p)
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] > LEVEL / (len(p) - place):
            break
        rejected[index] = True
    return rejected


def rank_correlation(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """Spearman's rank correlation, and its p-values for "above 0" and "below 0" by permutations.

    NaN and ones for vectors that are constant or contain NaN.
    """
    a, b = (numpy.asarray(v, dtype=numpy.float64) for v in (first, second))
    if (
        not (numpy.isfinite(a).all() and numpy.isfinite(b).all())
        or min(numpy.ptp(a), numpy.ptp(b)) == 0
    ):
        return math.nan, 1.0, 1.0
    a, b = (stats.rankdata(v) for v in (a, b))

    def correlation(order: Floats, axis: int = -1) -> Floats:
        centred = order - order.mean(axis=axis, keepdims=True)
        norm = numpy.linalg.norm(b - b.mean()) * numpy.linalg.norm(centred, axis=axis)
        return numpy.asarray((centred * (b - b.mean())).sum(axis=axis) / norm)

    above, below = (
        stats.permutation_test(
            (a,), correlation, permutation_type="pairings", vectorized=True,
            n_resamples=FLIPS, alternative=side, axis=-1, rng=0,
        ).pvalue
        for side in ("greater", "less")
    )  # fmt: skip
    return float(correlation(a)), float(above), float(below)


def _finite(values: ArrayLike) -> Floats:
    array = numpy.asarray(values, dtype=numpy.float64)
    return array[numpy.isfinite(array)]
