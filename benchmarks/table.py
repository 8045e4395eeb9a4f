"""Tables of stored results: one row for each machine, case and opponent, columns as declared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import markdown
from benchmarks.case import OURS
from benchmarks.peak_memory import RESOLUTION_BYTES
from benchmarks.results import CaseResult, FamilyResult, Spread

Cell = Callable[[FamilyResult, CaseResult, str], str]

_NOTHING = "–"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def _percent(spread: Spread | None) -> str:
    return _NOTHING if spread is None else f"{100 * spread.median:.3g} %"


def _percent_with_quartiles(spread: Spread | None) -> str:
    if spread is None:
        return _NOTHING
    return f"{_percent(spread)} ({100 * spread.lower:.3g} to {100 * spread.upper:.3g})"


def _speedup(family: FamilyResult, case: CaseResult, opponent: str) -> str:
    spread = case.speedup(opponent)
    return f"{spread.median:.2f}× ({spread.lower:.2f} to {spread.upper:.2f})"


def _memory(case: CaseResult, variant: str) -> str:
    peak = case.variants[variant].peak_bytes
    if peak is None:
        return _NOTHING
    if peak < RESOLUTION_BYTES:
        return "< 0.5 MiB"
    return f"{peak / 2**20:.3g} MiB" if peak < 1000 * 2**20 else f"{peak / 2**30:.3g} GiB"


def _rate(case: CaseResult) -> str:
    unit = "B/s" if case.ceiling_kind == "copy" else "FLOP/s"
    giga = case.rate(OURS).median / 1e9
    return f"{giga:.3g} G{unit}" if giga < 1e3 else f"{giga / 1e3:.3g} T{unit}"


# Heading -> how to fill it. Ratios are medians over rounds, with the quartiles in brackets.
COLUMNS: dict[str, Cell] = {
    "family": lambda family, case, opponent: f"`{family.family}`",
    "case": lambda family, case, opponent: case.name,
    "shape": lambda family, case, opponent: case.shape,
    "dtype": lambda family, case, opponent: case.dtype,
    "layout": lambda family, case, opponent: case.layout,
    "direction": lambda family, case, opponent: case.direction,
    "opponent": lambda family, case, opponent: opponent,
    "speed-up": _speedup,
    "growkernels": lambda family, case, opponent: _seconds(case.time(OURS).median),
    "opponent's time": lambda family, case, opponent: _seconds(case.time(opponent).median),
    "rate": lambda family, case, opponent: _rate(case),
    "of ceiling": lambda family, case, opponent: _percent(case.share_of_ceiling(OURS)),
    "growkernels adds": lambda family, case, opponent: _percent_with_quartiles(
        case.added_share(OURS)
    ),
    "opponent adds": lambda family, case, opponent: _percent_with_quartiles(
        case.added_share(opponent)
    ),
    "peak memory": lambda family, case, opponent: _memory(case, OURS),
    "opponent's memory": lambda family, case, opponent: _memory(case, opponent),
    "machine": lambda family, case, opponent: family.machine,
}
# Columns that are said once where they are the same in all rows.
COMMON = ("dtype", "layout", "machine")
_COMPANIONS_OF_A_SPEEDUP = ("opponent", "shape", "machine")


@dataclass(frozen=True)
class Table:
    """The table `name` of the results of `family`; `columns` are keys of COLUMNS.

    Raises ValueError for an unknown column, and for a speed-up without opponent, shape and machine.
    """

    name: str
    family: str
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        for column in self.columns:
            if column not in COLUMNS:
                raise ValueError(
                    f"table {self.name!r} has no such column {column!r}; known are {list(COLUMNS)}"
                )
        missing = [name for name in _COMPANIONS_OF_A_SPEEDUP if name not in self.columns]
        if "speed-up" in self.columns and missing:
            raise ValueError(
                f"table {self.name!r} shows a speed-up without {' and '.join(missing)}; add them"
            )

    def cells(self, results: Sequence[FamilyResult]) -> list[list[str]]:
        """The rows as text, without the heading."""
        return [
            [COLUMNS[column](result, case, opponent) for column in self.columns]
            for result in results
            for case in result.cases
            for opponent in case.opponents
        ]

    def markdown(self, results: Sequence[FamilyResult]) -> str:
        """The whole table in Markdown."""
        return markdown.table(self.columns, self.cells(results), COMMON)

    def plain(self, results: Sequence[FamilyResult]) -> str:
        """The whole table aligned for a terminal."""
        rows = [list(self.columns), *self.cells(results)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
