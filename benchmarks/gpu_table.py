"""The README's table of results from GPUs: the cases that decide, against their best opponents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import markdown
from benchmarks.case import OURS
from benchmarks.results import CaseResult, stored
from benchmarks.table import COMMON, Table

_COLUMNS = (
    "family", "case", "shape", "dtype", "opponent", "speed-up", "growkernels", "rate",
    "of ceiling", "machine",
)  # fmt: skip
_NOTHING = "No result from a GPU is stored yet."


@dataclass(frozen=True)
class GpuRow:
    """A case of `family`, against the fastest of `opponents` (of all, where none are named)."""

    family: str
    case: str
    opponents: tuple[str, ...] = ()

    def cells(self, results: Path) -> list[list[str]]:
        """One row of text for every GPU on which the case was measured."""
        table = Table("gpu", self.family, _COLUMNS)
        return [
            row
            for result in stored(self.family, results, "cuda")
            for case in result.cases
            if case.name == self.case
            for row in table.cells([replace(result, cases=[self._against_the_fastest(case)])])
        ]

    def _against_the_fastest(self, case: CaseResult) -> CaseResult:
        chosen = self.opponents or case.opponents
        fastest = min(chosen, key=lambda opponent: case.time(opponent).median)
        return replace(case, variants={name: case.variants[name] for name in (fastest, OURS)})


@dataclass(frozen=True)
class GpuTable:
    """The table `name` of the `rows`, on every GPU."""

    name: str
    rows: tuple[GpuRow, ...]

    def markdown(self, results: Path) -> str:
        """The whole table in Markdown, or one line where no case was measured on a GPU yet."""
        rows = [cells for row in self.rows for cells in row.cells(results)]
        if not rows:
            return _NOTHING
        return markdown.table(_COLUMNS, rows, COMMON)


_COMPOSED = (
    "eager conv, 1x1, cat", "torch.compile conv, 1x1, cat", "eager reconstructed kernel",
    "torch.compile reconstructed kernel",
)  # fmt: skip
_BOTH_WAYS = tuple(f"stage {stage}, forward + backward" for stage in (1, 2, 3, 4))

GPU_TABLE = GpuTable(
    "gpu",
    (
        *(GpuRow("basis_conv", f"stage {stage}, forward", _COMPOSED) for stage in (1, 2)),
        *(GpuRow("basis_conv", case, _COMPOSED) for case in _BOTH_WAYS),
        *(GpuRow("basis_conv", case, ("eager dense",)) for case in _BOTH_WAYS),
        GpuRow("resnet18_step", "ResNet-18, eager", ("eager dense",)),
        GpuRow("resnet18_step", "ResNet-18, torch.compile", ("compiled dense",)),
        GpuRow("splitting", "hvp M=50432, n=1536, d=384, bfloat16", ("eager",)),
        GpuRow("splitting_eigs", "DeiT-S fc1, 1536 neurons, bfloat16"),
        GpuRow("virtual_grad", "linear_relu", ("eager loop",)),
        GpuRow("virtual_grad", "linear_relu small bfloat16", ("eager loop",)),
        GpuRow("virtual_grad", "linear_relu small float32", ("eager loop",)),
    ),
)
