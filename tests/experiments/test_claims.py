"""Claims as data: what each kind of test makes of measurements, and the files of the studies."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from growkernels.experiments.basis.study import BasisStudy
from growkernels.experiments.claims import (
    Claim,
    Evidence,
    Finding,
    Value,
    judge,
    registered,
    registration,
    tally,
)
from growkernels.experiments.scaling.study import ScalingStudy
from growkernels.experiments.sensli.cnn_study import CnnStudy
from growkernels.experiments.sensli.spirals_study import SpiralsStudy

NOISE = numpy.array([0.01, -0.02, 0.03, -0.01, 0.02, -0.03, 0.015, -0.015])


MEANS = {"low": 1.0, "same": 1.0, "high": 2.0, "few": 0.0}


class Made(Evidence):
    """Variants with given means, alike but for little noise; ``few`` has five runs."""

    def settings(self, names: Sequence[str]) -> Sequence[str]:
        return ["a", "b"] if list(names) == ["both"] else names

    def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
        if variant not in MEANS:
            return {}
        shift = 1.5 if (setting, variant) == ("b", "low") else 0.0
        noise = NOISE if variant != "same" else -NOISE
        values = MEANS[variant] + shift + (noise if quantity == "loss" else 0.1 * noise)
        return dict(enumerate(values[: 5 if variant == "few" else 8].tolist()))

    def obstacle(self, setting: str, first: str, second: str) -> str | None:
        return "no test" if setting == "closed" else None

    def value(self, name: str, setting: str) -> Value:
        low, high = {"small": (1, 2), "wide": (1, 20), "large": (30, 30)}[name]
        return Value(name, low, high)

    def vectors(self, name: str, setting: str) -> tuple[list[float], list[float]]:
        return list(range(9)), [v * (1 if name == "alike" else -1) for v in range(9)]

    def words(self) -> dict[str, object]:
        return {"number": 30}


def verdict(test: str, **claim: Any) -> str:
    return judge([{"statement": "s", "test": test, "quantity": "loss", **claim}], Made())[0].verdict


def test_means_are_those_of_the_runs_that_are_compared() -> None:
    class Half(Made):
        def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
            return {run: float(run) for run in range(6 if variant == "half" else 12)}

    claim = {"statement": "s", "test": "lower", "quantity": "loss", "pairs": [["half", "all"]]}
    (finding,) = judge([claim], Half())[0].findings
    assert finding.measured.startswith("half 2.500, all 2.500; difference +0.000")


@pytest.mark.parametrize(
    ("test", "claim", "expected"),
    [
        ("lower", {"pairs": [["low", "high"]]}, "holds"),
        ("lower", {"pairs": [["high", "low"]]}, "does not hold"),
        ("lower", {"pairs": [["low", "same"]]}, "cannot be told"),
        ("lower", {"pairs": [["few", "high"]]}, "not enough runs"),
        ("lower", {"pairs": [["none", "high"]]}, "not enough runs"),
        ("lower", {"pairs": [["low", "high"]], "settings": ["both"]}, "does not hold"),
        ("lower", {"pairs": [["low", "high"]], "settings": ["a", "closed"]}, "holds"),
        ("lower", {"pairs": [["low", "high"]], "settings": ["closed"]}, "cannot be told"),
        ("not_lower", {"pairs": [["low", "same"]], "margin": 0.5}, "holds"),
        ("not_lower", {"pairs": [["low", "high"]], "margin": 0.5}, "does not hold"),
        ("not_lower", {"pairs": [["low", "same"]], "margin": 0.0}, "cannot be told"),
        ("equal", {"pairs": [["low", "same"]], "margin": 0.1}, "holds"),
        ("equal", {"pairs": [["low", "same"]], "relative_margin": 0.1}, "holds"),
        ("equal", {"pairs": [["low", "same"]], "relative_margin": 0.001}, "cannot be told"),
        ("equal", {"pairs": [["low", "high"]], "relative_margin": 0.1}, "does not hold"),
        ("only", {"pairs": [["low", "high"]], "other": "error", "margin": 2.0}, "holds"),
        ("only", {"pairs": [["low", "high"]], "other": "error", "margin": 0.2}, "does not hold"),
        ("value", {"values": ["small"], "at_most": 5.0}, "holds"),
        ("value", {"values": ["wide"], "at_most": 5.0}, "cannot be told"),
        ("value", {"values": ["small", "large"], "at_least": 1.0, "at_most": 5.0}, "does not hold"),
        ("rank", {"vectors": ["alike"]}, "holds"),
        ("rank", {"vectors": ["opposite"]}, "does not hold"),
    ],
)
def test_verdicts_follow_from_the_measurements(
    test: str, claim: dict[str, Any], expected: str
) -> None:
    assert verdict(test, **claim) == expected


def test_a_refutation_is_corrected_for_the_number_of_settings() -> None:
    """What refutes a claim alone does not where it is one of many settings."""

    class Weak(Made):
        def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
            drawn = numpy.random.default_rng(0).normal(0.9, 1.0, 8)
            drawn = drawn if setting == "0" else numpy.tile([1.0, -1.0], 4)
            return dict(enumerate(drawn if variant == "first" else numpy.zeros(8)))

    claim = {"statement": "s", "test": "lower", "quantity": "loss", "pairs": [["first", "second"]]}
    alone, among = (
        judge([claim | {"settings": [str(i) for i in range(n)]}], Weak())[0] for n in (1, 12)
    )
    assert alone.verdict == "does not hold"
    assert among.verdict == "cannot be told"


def test_findings_carry_their_effects_and_statements_their_words() -> None:
    claim = {"statement": "{number} is best", "test": "lower", "quantity": "loss", "ours": True,
             "pairs": [["low", "high"]]}  # fmt: skip
    (judged,) = judge([claim], Made())
    stored = judged.as_json()
    assert (stored["claim"], stored["ours"]) == ("30 is best", True)
    (finding,) = stored["findings"]
    assert finding["effect"]["mean"] == pytest.approx(-1.0)
    assert finding["effect"]["count"] == 8
    assert (
        "low 1.000, high 2.000; difference -1.000 [-1.000, -1.000] (8 runs)" in finding["measured"]
    )


def test_a_tally_tells_the_paper_from_ours() -> None:
    claims = [
        Claim("a", [Finding("s", "m", "holds")]),
        Claim("b", [Finding("s", "m", "not enough runs"), Finding("s", "m", "cannot be told")]),
        Claim("c", [Finding("s", "m", "does not hold")], ours=True),
    ]
    told = "Of 2 claims of the paper: holds 1, cannot be told 1. Of 1 questions that it leaves open"
    assert tally(claims).startswith(told)


STUDIES = (BasisStudy, ScalingStudy, CnnStudy, SpiralsStudy)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.__name__)
def test_every_registered_claim_is_complete(study: type) -> None:
    kinds = {
        "lower": {"quantity", "pairs"},
        "not_lower": {"quantity", "pairs"},
        "equal": {"quantity", "pairs"},
        "only": {"quantity", "pairs", "other", "margin"},
        "rank": {"vectors"},
        "value": {"values"},
    }
    optional = {"statement", "test", "settings", "ours", "at_least", "at_most"}
    optional |= {"margin", "relative_margin", "question"}
    claims = registered(study.claims)
    assert len(claims) >= 8
    for claim in claims:
        needed = kinds[claim["test"]]
        assert needed <= claim.keys() <= needed | optional
        assert not claim.get("ours") or claim["question"].endswith("?")
        if claim["test"] in ("equal", "not_lower"):
            assert claim.get("margin", claim.get("relative_margin", 0)) > 0


def test_a_registration_names_content_and_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "claims.toml"
    file.write_text("claim = []\n")
    assert registration(file)["commit"] is None
    git("init", "-q")
    assert registration(file)["commit"] is None
    git("add", ".")
    git("commit", "-qm", "claims")
    named = registration(file)
    assert git("rev-parse", "HEAD").startswith(named["commit"])
    assert git("cat-file", "-p", named["blob"]) == "claim = []"
    file.write_text("claim = [{}]\n")
    assert registration(file)["commit"] is None
