"""A family's results: raw times per round, the figures derived from them, and the JSON file.

Only raw measurements are data; medians, ratios and rates are always computed from them. The file
repeats those figures under "summary" for people and other programs; reading ignores them.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import OURS
from benchmarks.environment import machine_slug
from benchmarks.sources import fingerprint

RESULTS = Path(__file__).resolve().parent / "results"
STALE = " (**stale**:"  # behind a machine's name
_SCHEMA = 1


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class VariantResult:
    """Seconds per call, one value per round; peak extra bytes of a call, None if not measured."""

    seconds: list[float]
    calls_per_timing: int
    peak_bytes: int | None


@dataclass(frozen=True)
class CaseResult:
    """One case as measured. `ceiling` holds FLOP/s or bytes/s per round, by `ceiling_kind`.

    `timing` says how: on a GPU whether inputs were in the cache depends on it.
    """

    name: str
    shape: str
    dtype: str
    layout: str
    direction: str
    flops: float
    bytes: float
    ceiling_kind: str | None
    ceiling: list[float]
    baseline: str | None
    variants: dict[str, VariantResult]
    timing: str = "wall clock"

    @property
    def opponents(self) -> list[str]:
        return [name for name in self.variants if name != OURS]

    def time(self, variant: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.variants[variant].seconds)

    def speedup(self, opponent: str) -> Spread:
        """The opponent's time over ours, paired within each round."""
        return self._ratio(opponent, OURS)

    def added_share(self, variant: str) -> Spread | None:
        """What `variant` adds to the baseline, as a share of the baseline's time in that round."""
        if self.baseline is None or variant == self.baseline:
            return None
        ratio = self._ratio(variant, self.baseline)
        return Spread(ratio.median - 1, ratio.lower - 1, ratio.upper - 1)

    def rate(self, variant: str) -> Spread:
        """FLOP/s, or bytes/s where memory is the ceiling."""
        work = self.bytes if self.ceiling_kind == "copy" else self.flops
        return Spread.of([work / seconds for seconds in self.variants[variant].seconds])

    def share_of_ceiling(self, variant: str) -> Spread | None:
        """The rate over the ceiling measured in the same round; None without a ceiling."""
        if self.ceiling_kind is None:
            return None
        work = self.bytes if self.ceiling_kind == "copy" else self.flops
        seconds = self.variants[variant].seconds
        pairs = zip(seconds, self.ceiling, strict=True)
        return Spread.of([work / time / ceiling for time, ceiling in pairs])

    def _ratio(self, numerator: str, denominator: str) -> Spread:
        pairs = zip(
            self.variants[numerator].seconds, self.variants[denominator].seconds, strict=True
        )
        return Spread.of([a / b for a, b in pairs])

    def summary(self) -> dict[str, dict[str, object]]:
        """The derived figures of every variant as plain values."""
        table: dict[str, dict[str, object]] = {}
        for name, variant in self.variants.items():
            share, added = self.share_of_ceiling(name), self.added_share(name)
            table[name] = {
                "seconds": asdict(self.time(name)),
                "speedup_of_ours": asdict(self.speedup(name)) if name != OURS else None,
                "giga_per_second": self.rate(name).median / 1e9,
                "share_of_ceiling": asdict(share) if share else None,
                "added_share_of_baseline": asdict(added) if added else None,
                "peak_mib": None if variant.peak_bytes is None else variant.peak_bytes / 2**20,
            }
        return table


@dataclass(frozen=True)
class FamilyResult:
    """All cases of one family on one machine."""

    family: str
    environment: dict[str, object]
    cases: list[CaseResult]

    @property
    def stale(self) -> bool:
        """Whether this checkout has other sources than were measured, or unknown ones were."""
        now = fingerprint(self.family, str(self.environment["device"]))
        return now is not None and now != self.environment.get("sources")

    @property
    def machine(self) -> str:
        """The machine's name, with a mark where the sources have changed since it was measured."""
        name = str(self.environment["machine"])
        if not self.stale:
            return name
        day = str(self.environment.get("time", "an unknown day"))[:10]
        return f"{name}{STALE} sources changed after {day})"

    def noise(self) -> str | None:
        """What one function timed against itself gave, in a sentence; None where it was not."""
        ratios = self.environment.get("noise_floor")
        if not isinstance(ratios, list):
            return None
        spread = Spread.of(ratios)
        return (
            f"Noise floor: one function against itself gave {spread.median:.3f}× "
            f"({spread.lower:.3f} to {spread.upper:.3f})"
        )

    def path(self, folder: Path = RESULTS) -> Path:
        return folder / f"{self.family}-{machine_slug(self.environment)}.json"

    def store(self, folder: Path = RESULTS) -> Path:
        """Write the JSON file, whole or not at all; returns its path."""
        cases = [{**asdict(case), "summary": case.summary()} for case in self.cases]
        content = {
            "schema": _SCHEMA,
            "family": self.family,
            "environment": self.environment,
            "cases": cases,
        }
        text = json.dumps(content, indent=1) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        path = self.path(folder)
        part = path.with_suffix(".part")
        part.write_text(text)
        os.replace(part, path)
        return path


def load(path: Path) -> FamilyResult:
    """Read a stored family; ValueError says in one sentence what is wrong with the file."""
    try:
        return parse(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable benchmark result ({type(error).__name__}: {error}); "
            "run the family again"
        ) from error


def parse(content: dict[str, Any]) -> FamilyResult:
    """The family in parsed JSON. Raises KeyError, TypeError or ValueError where it is none."""
    if content["schema"] != _SCHEMA:
        raise ValueError(f"schema {content['schema']} instead of {_SCHEMA}")
    cases = [_case(entry) for entry in content["cases"]]
    return FamilyResult(content["family"], content["environment"], cases)


def stored(family: str, folder: Path = RESULTS, device: str | None = None) -> list[FamilyResult]:
    """The family's results on every machine, in the order of the files' names.

    With `device`, "cpu" or "cuda", those measured there alone.
    """
    results = [load(path) for path in sorted(folder.glob("*.json"))]
    return [
        result
        for result in results
        if result.family == family and device in (None, result.environment["device"])
    ]


def _case(entry: dict[str, Any]) -> CaseResult:
    fields = {key: value for key, value in entry.items() if key not in ("summary", "variants")}
    variants = {name: VariantResult(**value) for name, value in entry["variants"].items()}
    case = CaseResult(**fields, variants=variants)
    rounds = len(case.variants[OURS].seconds)
    lengths = {len(variant.seconds) for variant in variants.values()}
    if lengths != {rounds} or rounds == 0 or (case.ceiling and len(case.ceiling) != rounds):
        raise ValueError(f"case {case.name!r} has variants with different numbers of rounds")
    return case
