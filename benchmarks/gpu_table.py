"""The README's table of results from GPUs: the cases that decide, against their best opponents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.case import OURS
from benchmarks.results import CaseResult, stored
from benchmarks.table import Table

_COLUMNS = (
    "family", "case", "shape", "dtype", "opponent", "speed-up", "growkernels", "rate",
    "of ceiling", "machine",
)  # fmt: skip
_NOTHING = "No result from a GPU is stored yet."


@dataclass(frozen=True)
class GpuTable:
    """The table `name` of the `cases` (family -> names of its GPU_CASES), on every GPU."""

    name: str
    cases: Mapping[str, tuple[str, ...]]

    def markdown(self, results: Path) -> str:
        """The whole table in Markdown, or one line where no case was measured on a GPU yet."""
        rows = [row for family in self.cases for row in self._rows(family, results)]
        if not rows:
            return _NOTHING
        heading = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
        return "\n".join(f"| {' | '.join(row)} |" for row in [*heading, *rows])

    def _rows(self, family: str, results: Path) -> list[list[str]]:
        table = Table(self.name, family, _COLUMNS)
        return [
            row
            for result in stored(family, results, "cuda")
            for row in table.cells([replace(result, cases=self._best(family, result.cases))])
        ]

    def _best(self, family: str, cases: list[CaseResult]) -> list[CaseResult]:
        """The wanted cases, in their order here, with the fastest opponent alone."""
        by_name = {case.name: case for case in cases}
        wanted = [by_name[name] for name in self.cases[family] if name in by_name]
        return [_against_the_fastest(case) for case in wanted]


def _against_the_fastest(case: CaseResult) -> CaseResult:
    fastest = min(case.opponents, key=lambda opponent: case.time(opponent).median)
    return replace(case, variants={name: case.variants[name] for name in (fastest, OURS)})


GPU_TABLE = GpuTable("gpu", {})
