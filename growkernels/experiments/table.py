"""One tidy table of measurements: a row per setting, variant, run and epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy
import pandas

from growkernels.experiments.statistics import Floats

KEYS = ("setting", "variant", "run", "epoch")


@dataclass(frozen=True)
class Table:
    """The columns KEYS, and one per measured quantity; ``setting`` is "" where there is one."""

    rows: pandas.DataFrame
    _curves: dict[tuple[str, str, str], pandas.DataFrame] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Table:
        """Of those records of metrics.jsonl that measured an epoch; null is NaN."""
        rows = [{"setting": "", **record} for record in records if "epoch" in record]
        frame = pandas.DataFrame(rows)
        quantities = [c for c in frame.columns if c not in KEYS]
        return cls(frame.astype(dict.fromkeys(quantities, "float64")))

    def curve(self, variant: str, quantity: str, setting: str = "") -> pandas.DataFrame:
        """Epochs by runs; without rows for a variant that was not trained."""
        key = (variant, quantity, setting)
        if key not in self._curves:  # claims, plots and summaries ask for the same ones
            rows = self._parts.get((setting, variant), self.rows.iloc[:0])
            self._curves[key] = rows.pivot(index="epoch", columns="run", values=quantity)
        return self._curves[key]

    @cached_property
    def _parts(self) -> dict[tuple[str, str], pandas.DataFrame]:
        """By setting and variant; to look for a few rows among millions takes a second."""
        return {
            (str(setting), str(variant)): rows
            for (setting, variant), rows in self.rows.groupby(["setting", "variant"], sort=False)
        }

    def final(
        self, variant: str, quantity: str, setting: str = "", epochs: int = 1
    ) -> dict[int, float]:
        """By run: the mean over the last ``epochs``."""
        last = self.curve(variant, quantity, setting).iloc[-epochs:]
        means = last.to_numpy().mean(axis=0) if len(last.columns) else []
        return {int(run): float(v) for run, v in zip(last.columns, means, strict=True)}


def values(of_runs: Mapping[int, float]) -> Floats:
    """The numbers alone, in the order of the runs."""
    return numpy.array([of_runs[run] for run in sorted(of_runs)], dtype=numpy.float64)


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> Floats:
    """first - second of the runs that both have."""
    both = sorted(first.keys() & second.keys())
    return numpy.array([first[run] - second[run] for run in both], dtype=numpy.float64)
