"""Claims as data, registered in a TOML file before the runs, and the verdicts on them.

A file holds a list ``claim``; each has a ``statement``, a ``test`` and what the test needs:

``lower``: of each pair in ``pairs`` the first has the lower ``quantity`` than the second;
``not_lower``: the first is not lower than the second by ``margin`` or more;
``equal``: the pair differ by less than ``margin``, or ``relative_margin`` of the larger mean;
``only``: lower in ``quantity``, but equal in ``other`` within ``margin``;
``rank``: two ``vectors`` that the study names have a positive rank correlation;
``value``: a number that the study names lies within ``at_least`` and ``at_most``.

``settings`` lists where a claim is tested; a study may know names for groups of them. A variant
"of the setting" is the one of the setting's own name. ``ours`` marks what the paper does not claim;
``question`` names the open question that a claim is part of the answer to.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import numpy
from numpy.typing import ArrayLike

from growkernels.experiments.statistics import (
    LEVEL,
    MINIMUM_RUNS,
    Effect,
    effect,
    estimate,
    holm,
    p_values,
    rank_correlation,
    within_margin,
)
from growkernels.experiments.table import differences, values

Verdict = Literal["holds", "does not hold", "cannot be told", "not enough runs"]

OF_SETTING = "of the setting"

RULE = (
    "Runs of one number share their seeds, so variants are compared by the paired differences of "
    "runs, whose mean stands with its 95 % interval (Student's t). A comparison counts where "
    "Student's t and the sign-flip permutation test both find it, each at 2.5 % in either "
    "direction. A claim holds if it holds in every setting that can test it. It does not hold if "
    "the opposite is found in one, by Holm's correction over the settings. Equal, or not lower, "
    "means: surely within the stated margin, by one-sided tests against it. No verdict on "
    f"accuracy or loss comes from fewer than {MINIMUM_RUNS} runs."
)


class Evidence(ABC):
    """What a study knows about its measurements."""

    @abstractmethod
    def runs(self, setting: str, variant: str, quantity: str) -> Mapping[int, float]:
        """Final values by run; empty for what does not exist."""

    @abstractmethod
    def value(self, name: str, setting: str) -> Value:
        """A number for the test ``value``."""

    def settings(self, names: Sequence[str]) -> Sequence[str]:
        """The settings that a claim names."""
        return names

    def obstacle(self, setting: str, first: str, second: str) -> str | None:
        """Why the two cannot be compared there, if they cannot."""
        return None

    def vectors(self, name: str, setting: str) -> tuple[ArrayLike, ArrayLike]:
        """Two vectors for the test ``rank``."""
        raise ValueError(f"A claim asks for vectors {name!r}, which this study does not have.")

    def words(self) -> Mapping[str, object]:
        """For the places in statements."""
        return {}


@dataclass(frozen=True)
class Value:
    """A number, as its quartiles where it was measured; ``tests`` says whether it may decide."""

    measured: str
    low: float
    high: float
    tests: bool = True


@dataclass(frozen=True)
class Finding:
    """What one setting says about a claim; no verdict means that it cannot test the claim."""

    setting: str
    measured: str
    verdict: Verdict | None
    effect: dict[str, Any] | None = None


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, or an open question, and what the settings say about it."""

    statement: str
    findings: Sequence[Finding] = field(default_factory=tuple)
    ours: bool = False
    question: str | None = None

    @property
    def verdict(self) -> Verdict:
        verdicts = [f.verdict for f in self.findings if f.verdict]
        if "does not hold" in verdicts:
            return "does not hold"
        if verdicts and all(v == "holds" for v in verdicts):
            return "holds"
        if verdicts and all(v == "not enough runs" for v in verdicts):
            return "not enough runs"
        return "cannot be told"

    def as_json(self) -> dict[str, Any]:
        return {
            "claim": self.statement,
            "measured": "; ".join(f"{f.setting}: {f.measured}" for f in self.findings),
            "verdict": self.verdict,
            "ours": self.ours,
            "question": self.question,
            "findings": [vars(f) for f in self.findings],
        }


@dataclass(frozen=True)
class _Test:
    """A finding before Holm's correction over the claim's settings."""

    setting: str
    measured: str
    holds: float = 1.0  # p-values
    fails: float = 1.0
    effect: Effect | None = None
    verdict: Verdict | None = None
    decided: bool = False  # the verdict stands as it is


def paid_for(variant: str) -> tuple[str, str, str] | None:
    """The parts of "FIXED for the RESOURCE of GROWN", if a variant is a control of that kind.

    It is a fixed network where its training has cost what the grown one's did, search and growth
    charged, in "operations" or "seconds": after the first epoch that is not cheaper.
    """
    fixed, _, rest = variant.partition(" for the ")
    resource, _, grown = rest.partition(" of ")
    return (fixed, resource, grown) if grown else None


def registered(path: Path) -> list[dict[str, Any]]:
    """The claims in a file."""
    claims: list[dict[str, Any]] = tomllib.loads(path.read_text())["claim"]
    return claims


def registration(path: Path) -> dict[str, Any]:
    """How to find the very file again: git's name of its content, and the last commit of it.

    No commit outside a checkout, or where the file was changed since.
    """
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    git = ["git", "-C", str(path.parent)]
    try:
        changed = subprocess.run(
            [*git, "status", "--porcelain", path.name], capture_output=True, text=True, check=True
        ).stdout
        commit = subprocess.run(
            [*git, "log", "-1", "--format=%h", "--abbrev=12", "--", path.name],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        changed = commit = ""
    name = f"{path.parent.name}/{path.name}"
    return {"file": name, "blob": blob, "commit": None if changed else commit or None}


def judge(specifications: Sequence[Mapping[str, Any]], evidence: Evidence) -> list[Claim]:
    """The verdict on every registered claim."""
    return [_judged(specification, evidence) for specification in specifications]


def _judged(claim: Mapping[str, Any], evidence: Evidence) -> Claim:
    tests = [
        test
        for setting in evidence.settings(claim.get("settings", [""]))
        for test in _tests(claim, evidence, setting)
    ]
    open_tests = [test for test in tests if not test.decided]
    failed = dict(zip(map(id, open_tests), holm([t.fails for t in open_tests]), strict=True))

    def verdict(test: _Test) -> Verdict | None:
        if test.decided:
            return test.verdict
        if failed[id(test)]:
            return "does not hold"
        return "holds" if test.holds <= LEVEL else "cannot be told"

    findings = [
        Finding(test.setting, test.measured, verdict(test), _as_json(test.effect)) for test in tests
    ]
    statement = claim["statement"].format_map(evidence.words())
    return Claim(statement, findings, claim.get("ours", False), claim.get("question"))


def _as_json(found: Effect | None) -> dict[str, Any] | None:
    return None if found is None else found.as_json()


def _tests(claim: Mapping[str, Any], evidence: Evidence, setting: str) -> list[_Test]:
    if claim["test"] == "value":
        return [_value(claim, evidence, setting, name) for name in claim["values"]]
    if claim["test"] == "rank":
        return [_rank(evidence, setting, name) for name in claim["vectors"]]
    return [_pair(claim, evidence, setting, *pair) for pair in claim["pairs"]]


def _value(claim: Mapping[str, Any], evidence: Evidence, setting: str, name: str) -> _Test:
    value = evidence.value(name, setting)
    low, high = claim.get("at_least", -numpy.inf), claim.get("at_most", numpy.inf)
    verdict: Verdict | None = "cannot be told"
    if low <= value.low and value.high <= high:
        verdict = "holds"
    elif value.high < low or value.low > high:
        verdict = "does not hold"
    label = setting or name
    return _Test(label, value.measured, verdict=verdict if value.tests else None, decided=True)


def _rank(evidence: Evidence, setting: str, name: str) -> _Test:
    first, second = evidence.vectors(name, setting)
    found, above, below = rank_correlation(first, second)
    count = len(numpy.asarray(first))
    measured = f"rank correlation {found:+.2f} over {count} (by chance: p = {above:.3f})"
    return _Test(setting or name, measured, above, below)


def _pair(
    claim: Mapping[str, Any], evidence: Evidence, setting: str, first: str, second: str
) -> _Test:
    pairs = claim["pairs"]
    label = setting if len(pairs) == 1 else f"{setting} {first} against {second}".strip()
    label = label or f"{first} against {second}"
    obstacle = evidence.obstacle(setting, first, second)
    if obstacle is not None:
        return _Test(label, obstacle, decided=True)
    quantity: str = claim["quantity"]
    gap, measured, found = _gap(evidence, setting, first, second, quantity)
    holds, fails = (float(p) for p in p_values(gap)) if len(gap) > 1 else (1.0, 1.0)
    margin = claim.get("margin", 0.0)
    if "relative_margin" in claim:
        of_both = (values(evidence.runs(setting, v, quantity)) for v in (first, second))
        margin = claim["relative_margin"] * max(abs(estimate(of).mean) for of in of_both)
    if len(gap) < 2:
        pass
    elif claim["test"] == "equal":
        holds, fails = within_margin(gap, margin)
        measured += f", margin {margin:.3g}"
    elif claim["test"] == "not_lower":
        below, above = p_values(gap + margin)
        holds, fails = float(above), float(below)
        measured += f", margin {margin:.3g}"
    elif claim["test"] == "only":
        other, text, _ = _gap(evidence, setting, first, second, claim["other"])
        measured = f"{quantity}: {measured}; {claim['other']}: {text}, margin {margin:.3g}"
        same, different = within_margin(other, margin)
        holds, fails = max(holds, same), min(1.0, 2 * min(fails, different))
    few = len(gap) < MINIMUM_RUNS
    verdict: Verdict | None = "not enough runs" if few else None
    return _Test(label, measured, holds, fails, found, verdict, decided=few)


def _gap(
    evidence: Evidence, setting: str, first: str, second: str, quantity: str
) -> tuple[Any, str, Effect]:
    """Finite paired differences, in words, and as an effect."""
    runs = [evidence.runs(setting, variant, quantity) for variant in (first, second)]
    gap = differences(*runs)
    gap = gap[numpy.isfinite(gap)]
    found = effect(gap)
    both = runs[0].keys() & runs[1].keys()  # a rule may choose on some of the runs
    a, b = (estimate(values({run: of[run] for run in both})) for of in runs)
    names = [setting if variant == OF_SETTING else variant for variant in (first, second)]
    measured = f"{names[0]} {a.mean:.3f}, {names[1]} {b.mean:.3f}; difference {found.text()}"
    return gap, measured, found


def tally(claims: Sequence[Claim]) -> str:
    """How many claims came out how, as sentences."""
    parts = []
    for ours, kind in ((False, "claims of the paper"), (True, "questions that it leaves open")):
        chosen = [claim for claim in claims if claim.ours == ours]
        counts = {v: sum(c.verdict == v for c in chosen) for v in get_args(Verdict)}
        told = {
            "holds": "holds" if not ours else "yes",
            "does not hold": "does not hold" if not ours else "no",
        }
        listed = ", ".join(f"{told.get(v, v)} {n}" for v, n in counts.items() if n)
        if chosen:
            parts.append(f"Of {len(chosen)} {kind}: {listed}.")
    return " ".join(parts)
