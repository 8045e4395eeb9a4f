"""The README's table of headlines: a few figures measured on CPUs, over several cases."""

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
        """The rows of every CPU. Raises FileNotFoundError or ValueError for missing results."""
        families = stored(self.family, results, "cpu")
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


_COMPOSED = ("eager dense", "eager conv, 1x1, cat", "torch.compile conv, 1x1, cat")
_RESNET = "128 images of 32 x 32, half of the filters in 16 layers, float32"
_DEIT = "M=6304, n=1536, d=384, float32"

HEADLINES = HeadlineTable(
    "headlines",
    (
        *(
            Headline(
                f"`basis_conv2d`, {direction}",
                "mean of ResNet-18's four stages, 128 images, R = Cout/2, float32",
                "basis_conv",
                tuple(f"stage {stage}, {direction}" for stage in (1, 2, 3, 4)),
                _COMPOSED,
            )
            for direction in ("forward", "forward + backward")
        ),
        Headline(
            "training step of ResNet-18",
            _RESNET,
            "resnet18_step",
            ("ResNet-18, eager",),
            ("eager dense", "eager conv, 1x1, cat"),
        ),
        Headline(
            "the same, compiled",
            _RESNET,
            "resnet18_step",
            ("ResNet-18, torch.compile",),
            ("compiled dense",),
        ),
        Headline(
            "`splitting_hvp`",
            _DEIT,
            "splitting",
            (f"hvp {_DEIT}",),
            ("eager", "torch.compile"),
        ),
        Headline(
            "`splitting_hvp_conv2d`",
            "3x3 layers of ResNet-18's four stages, 128 images",
            "splitting",
            tuple(f"conv2d {64 << stage} at {32 >> stage}x{32 >> stage}" for stage in range(4)),
            ("eager",),
        ),
        Headline(
            "`splitting_hvp`",
            "M=512, n=16, d=64, float32",
            "splitting",
            ("autograd",),
            ("double backward per neuron", "vmap of jvp of grad"),
        ),
        Headline(
            "`splitting_eigs`, DeiT-S' fc1",
            "M=6304, d=384, float32, tol 1e-3",
            "splitting_eigs",
            ("DeiT-S fc1, 192 neurons",),
            ("explicit eigh",),
        ),
        Headline(
            "`splitting_eigs`, DeiT-S' fc1",
            "M=6304, d=384, float32, tol 1e-3",
            "splitting_eigs",
            ("DeiT-S fc1, 48 neurons",),
            ("authors' loop",),
        ),
        Headline(
            "`virtual_grad_norms`",
            "12 × [6304, 384], float32",
            "virtual_grad",
            ("linear_relu",),
            ("eager loop", "torch.compile"),
        ),
        Headline(
            "`virtual_grad_norms`",
            "6 × [450, 5], float32",
            "virtual_grad",
            ("linear_relu small float32",),
            ("eager loop", "torch.compile"),
        ),
    ),
)
