"""The README's table of headlines: a few figures out of all stored results, over several cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from benchmarks.results import FamilyResult, stored


@dataclass(frozen=True)
class Headline:
    """One row per opponent: the geometric mean of its median ratios over `cases` of `family`."""

    what: str
    shape: str
    family: str
    cases: tuple[str, ...]
    opponents: tuple[str, ...]

    def rows(self, results: Path) -> list[list[str]]:
        """The rows of every machine. Raises FileNotFoundError or ValueError for missing results."""
        families = stored(self.family, results)
        if not families:
            raise FileNotFoundError(
                f"no results of {self.family!r} are stored in {results}; "
                f"run 'growkernels bench {self.family}' first"
            )
        return [
            [
                self.what, self.shape, opponent, f"{self._mean(family, opponent):.2f}×",
                str(family.environment["machine"]),
            ]
            for family in families
            for opponent in self.opponents
        ]  # fmt: skip

    def _mean(self, family: FamilyResult, opponent: str) -> float:
        by_name = {case.name: case for case in family.cases}
        missing = [
            name
            for name in self.cases
            if name not in by_name or opponent not in by_name[name].opponents
        ]
        if missing:
            raise ValueError(
                f"the headline {self.what!r} needs {opponent!r} in the cases {missing} of "
                f"{self.family!r}, which the stored results lack; run 'growkernels bench "
                f"{self.family}' again or correct benchmarks/headlines.py"
            )
        return geometric_mean(by_name[name].speedup(opponent).median for name in self.cases)


@dataclass(frozen=True)
class HeadlineTable:
    """The table `name` of headlines, in the order given."""

    name: str
    headlines: tuple[Headline, ...]

    def markdown(self, results: Path) -> str:
        """The whole table in Markdown."""
        heading = ["what", "shape", "opponent", "speed-up", "machine"]
        rows = [row for headline in self.headlines for row in headline.rows(results)]
        return "\n".join(
            f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows]
        )


_STAGES = "mean of the four stages of ResNet-18, 128 images, R = Cout/2, float32"
_TRAINING = "forward + backward"
_COMPOSED = ("eager dense", "eager conv, 1x1, cat", "torch.compile conv, 1x1, cat")

HEADLINES = HeadlineTable(
    "headlines",
    tuple(
        Headline(
            f"`basis_conv2d`, {direction}", _STAGES, "basis_conv",
            tuple(f"stage {stage}, {direction}" for stage in (1, 2, 3, 4)), _COMPOSED,
        )
        for direction in ("forward", _TRAINING)
    ),
)  # fmt: skip
