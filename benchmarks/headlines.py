"""The README's headlines: a few figures measured on CPUs, over several cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from benchmarks import markdown
from benchmarks.results import FamilyResult, stored


@dataclass(frozen=True)
class Headline:
    """`cases` of `family` against each of the opponents."""

    what: str
    shape: str
    family: str
    cases: tuple[str, ...]
    opponents: tuple[str, ...]

    def speedups(self, results: Path) -> dict[str, dict[str, float]]:
        """By machine, every CPU that has results, and opponent: the geometric mean over the cases
        of the median ratios. Of a maker's CPUs it is the one that was measured last.
        Raises FileNotFoundError or ValueError for missing results.
        """
        families = stored(self.family, results, "cpu")
        last = {f.machine.partition(" ")[0]: f for f in sorted(families, key=_measured)}
        families = [family for family in families if family in last.values()]
        if not families:
            raise FileNotFoundError(
                f"no results of {self.family!r} are stored in {results}; "
                f"run 'growkernels bench {self.family}' first"
            )
        return {
            family.machine: {opponent: self._mean(family, opponent) for opponent in self.opponents}
            for family in families
        }

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


def _measured(family: FamilyResult) -> str:
    return str(family.environment.get("time", ""))


def times(ratio: float) -> str:
    """A ratio as text, in three figures."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


@dataclass(frozen=True)
class HeadlineTable:
    """The table `name` of headlines, in the order given."""

    name: str
    headlines: tuple[Headline, ...]

    def markdown(self, results: Path) -> str:
        """The whole table in Markdown."""
        rows = [
            [
                headline.what,
                headline.shape,
                "; ".join(f"**{times(ratio)}** {name}" for name, ratio in speedups.items()),
                machine,
            ]
            for headline in self.headlines
            for machine, speedups in headline.speedups(results).items()
        ]
        return markdown.table(("what", "shape", "speed-up over", "machine"), rows, ("machine",))


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
            "`virtual_grad_norms`",
            "12 × [6304, 384], float32",
            "virtual_grad",
            ("linear_relu",),
            ("eager loop", "torch.compile"),
        ),
        Headline(
            "`virtual_grad_norms`, convolutions",
            "mean of [128, 64, 32, 32], [128, 128, 16, 16], [128, 256, 8, 8], float32",
            "virtual_grad",
            tuple(
                f"conv2d_relu {64 << stage} at {32 >> stage}x{32 >> stage} channels_last"
                for stage in range(3)
            ),
            ("conv2d_weight", "autograd"),
        ),
    ),
)
