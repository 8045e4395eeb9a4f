"""Means, standard errors and the rules by which a measured difference becomes a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Verdict = Literal["holds", "does not hold", "cannot be told"]

# A difference counts when it is larger than this many standard errors.
SIGNIFICANT = 2.0
# Two means count as equal when their difference is surely below this share of the larger mean.
EQUAL_WITHIN = 0.1

RULE = (
    "A mean counts as lower than another when the difference exceeds two standard errors of that "
    "difference (of the paired differences where both start from the same initial weights); as "
    "equal when the difference plus and minus two standard errors lies within 10 % of the larger "
    "mean. Otherwise it cannot be told. A claim holds if it holds in every setting that can test "
    "it, and does not hold if it fails in one."
)


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over ``count`` runs."""

    mean: float
    sem: float
    count: int

    def text(self, digits: int = 3) -> str:
        return f"{self.mean:.{digits}f} ± {self.sem:.{digits}f}"


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of ``values`` [runs]; runs that diverged (not finite) are left out.

    The standard error of fewer than two runs is 0.
    """
    finite = values.double()[values.isfinite()]
    count = finite.numel()
    if count == 0:
        return Estimate(float("nan"), float("nan"), 0)
    sem = finite.std().item() / count**0.5 if count > 1 else 0.0
    return Estimate(finite.mean().item(), sem, count)


def difference(first: Tensor, second: Tensor, paired: bool) -> Estimate:
    """first - second, from the differences of equal runs or of independent samples."""
    if paired:
        return estimate(first - second)
    a, b = estimate(first), estimate(second)
    return Estimate(a.mean - b.mean, (a.sem**2 + b.sem**2) ** 0.5, min(a.count, b.count))


def lower(gap: Estimate) -> Verdict:
    """Whether ``gap`` = first - second shows that first is lower."""
    if gap.count < 2 or not abs(gap.mean) > SIGNIFICANT * gap.sem:
        return "cannot be told"
    return "holds" if gap.mean < 0 else "does not hold"


def equal(gap: Estimate, scale: float) -> Verdict:
    """Whether ``gap`` shows equality within ``EQUAL_WITHIN`` of ``scale``."""
    margin, spread = EQUAL_WITHIN * scale, SIGNIFICANT * gap.sem
    if gap.count < 2:
        return "cannot be told"
    if abs(gap.mean) + spread <= margin:
        return "holds"
    return "does not hold" if abs(gap.mean) > spread else "cannot be told"


@dataclass(frozen=True)
class Finding:
    """What one setting says about a claim; no verdict means that it cannot test the claim."""

    setting: str
    measured: str
    verdict: Verdict | None


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and what the settings say about it."""

    statement: str
    findings: Sequence[Finding] = field(default_factory=tuple)

    @property
    def verdict(self) -> Verdict:
        verdicts = [f.verdict for f in self.findings if f.verdict]
        if "does not hold" in verdicts:
            return "does not hold"
        if verdicts and all(v == "holds" for v in verdicts):
            return "holds"
        return "cannot be told"

    def as_json(self) -> dict[str, object]:
        return {
            "claim": self.statement,
            "measured": "; ".join(f"{f.setting}: {f.measured}" for f in self.findings),
            "verdict": self.verdict,
            "findings": [vars(f) for f in self.findings],
        }


def gap_in_loss_only(setting: str, loss: Estimate, error: Estimate) -> Finding:
    """Whether first is lower in training loss while nothing shows in the test error [points]."""
    measured = (
        f"loss {loss.mean:+.3f} ± {loss.sem:.3f}, test error {error.mean:+.2f} ± {error.sem:.2f} "
        f"percentage points ({loss.count} runs)"
    )
    verdict: Verdict = "cannot be told"
    if lower(loss) == "holds":
        verdict = "holds" if lower(error) == "cannot be told" else "does not hold"
    return Finding(setting, measured, verdict)


def tally(claims: Sequence[Claim]) -> str:
    """How many claims came out how, as a sentence."""
    counts = [sum(c.verdict == v for c in claims) for v in get_args(Verdict)]
    return (
        f"Of {len(claims)} claims of the paper tested here, {counts[0]} hold in every setting that "
        f"can test them, {counts[1]} fail in at least one, and {counts[2]} cannot be told."
    )


def rank_correlation(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Spearman's rank correlation of two vectors, ties at their mean rank, and its p-value.

    The p-value is one-sided, for a correlation this large or larger by chance, from 20,000 random
    permutations (with a fixed seed). NaN for vectors that are constant or contain NaN.
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    ranks -= ranks.mean(1, keepdim=True)
    norm = (ranks[0].norm() * ranks[1].norm()).item()
    if norm == 0 or bool(first.isnan().any() or second.isnan().any()):
        return float("nan"), float("nan")
    found = (ranks[0] @ ranks[1]).item() / norm
    draws = torch.rand(20_000, len(first), generator=torch.Generator().manual_seed(0))
    by_chance = ranks[0][draws.argsort(1)] @ ranks[1] / norm
    return found, (by_chance >= found - 1e-9).double().mean().item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    values = values.double()
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) - 1) / 2
