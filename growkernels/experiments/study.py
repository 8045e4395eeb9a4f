"""What a study is: a graph of stretches of training, and variants that are paths through it.

Variants with the same past share it. A variant is given as its *forks*: from a step on its training
goes another way. Where ways part, trainings are cut into *stretches*, each of which is trained once
and goes on where its parent ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:  # workers come here, and need none of these
    from rich.console import Console

    from growkernels.experiments.claims import Evidence
    from growkernels.experiments.plots import Plot
    from growkernels.experiments.run_folder import RunFolder


@dataclass(frozen=True)
class Fork:
    """From ``step`` (counted from 0) on the training goes this ``way``; its text names it."""

    step: int
    way: Any


Forks = tuple[Fork, ...]


@dataclass(frozen=True)
class Stretch:
    """Steps ``first`` to ``last`` - 1 of a training whose past is ``forks``.

    It begins with what its ``parent`` left, or anew. ``bar`` names the line of the progress display
    that it counts for, ``cost`` is that of a step relative to others, and ``about`` what the study
    needs to know besides.
    """

    key: str
    forks: Forks
    first: int
    last: int
    parent: str | None = None
    bar: str = ""
    cost: float = 1.0
    about: Any = None

    @property
    def forked(self) -> bool:
        """Whether it begins where its way parts from another one."""
        return self.first == self.forks[-1].step


def text_of(forks: Forks) -> str:
    return "+".join(f"{fork.way}{f'@{fork.step}' if fork.step else ''}" for fork in forks)


def stretches_of(
    variants: Mapping[str, Forks],
    steps: int,
    name: str,
    *,
    bar: str = "",
    cost: float = 1.0,
    about: Any = None,
) -> tuple[list[Stretch], dict[str, list[str]]]:
    """The stretches of trainings of ``steps`` steps, and every variant's path through them.

    ``name`` begins all keys, which are names of files.
    """
    cuts: dict[Forks, set[int]] = {}
    for forks in variants.values():
        for forks_so_far, end in _ways(forks, steps):
            cuts.setdefault(forks_so_far, {forks_so_far[-1].step}).add(end)
    stretches: list[Stretch] = []
    ending: dict[tuple[Forks, int], str] = {}
    for forks in sorted(cuts, key=len):
        ends = sorted(cuts[forks])
        parent = ending.get((forks[:-1], forks[-1].step))
        for first, last in pairwise(ends):
            key = f"{name}-{text_of(forks)}-to{last}"
            stretches.append(Stretch(key, forks, first, last, parent, bar, cost, about))
            ending[forks, last] = parent = key
    paths = {
        variant: [
            ending[so_far, last]
            for so_far, end in _ways(forks, steps)
            for last in sorted(cuts[so_far])
            if so_far[-1].step < last <= end
        ]
        for variant, forks in variants.items()
    }
    return stretches, paths


def _ways(forks: Forks, steps: int) -> Iterator[tuple[Forks, int]]:
    """Every beginning of the forks, with the step at which the next one follows."""
    for count, end in enumerate([*(fork.step for fork in forks[1:]), steps], start=1):
        yield forks[:count], end


class Training(Protocol):
    """A stretch that is being trained."""

    @property
    def measured(self) -> dict[str, Any]:
        """What has been measured so far, as containers of numbers, strings and tensors.

        Under "steps" stand, by quantity, the values of every step.
        """

    def advance(self, step: int) -> None:
        """Do this step."""

    def state(self) -> Any:
        """What is needed to go on; loads with ``weights_only=True``."""


@dataclass(frozen=True)
class Result:
    """A finished stretch: what it measured, and its state where others begin with it."""

    measured: dict[str, Any]
    state: Any = None


Results = Mapping[str, Result]


class Content(ABC):
    """One study's content. The framework trains its stretches and writes what it concludes.

    It travels to worker processes by pickle.
    """

    name: ClassVar[str]
    claims: ClassVar[Path]
    """The registered claims, a TOML file."""
    page: ClassVar[str]
    """The template of the report."""

    device: str

    @property
    def run_count(self) -> int | None:
        """How many runs of every variant there are, where more can be added later."""
        return None

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What defines the trainings, ``run_count`` aside, as plain JSON values."""

    def prepare(self, folder: RunFolder, console: Console) -> Content:
        """What comes before the trainings; the study that knows what was found."""
        return self

    @abstractmethod
    def stretches(self) -> list[Stretch]:
        """The graph; parents come before their children."""

    @abstractmethod
    def begin(self, stretch: Stretch, parent: Result | None) -> Training:
        """The training at the stretch's first step."""

    @abstractmethod
    def resume(self, stretch: Stretch, stored: Result) -> Training:
        """The training as it was stored."""

    @abstractmethod
    def records(self, results: Results) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, as far as results are there."""

    @abstractmethod
    def conclude(self, results: Results, folder: RunFolder) -> Conclusion:
        """What the finished trainings say."""


@dataclass
class Conclusion:
    """A study's measurements, ready for the claims and the page.

    ``summary`` goes into summary.json (beside what every study's has), ``shown`` to the page alone;
    ``overview`` begins the sentences at its top.
    """

    evidence: Evidence
    plots: Mapping[str, Plot]
    summary: dict[str, Any]
    overview: str
    shown: dict[str, Any] = field(default_factory=dict)


def along(results: Results, path: Sequence[str]) -> dict[str, list[Any]]:
    """What the stretches of a path measured in their steps, from the first to the last."""
    curves: dict[str, list[Any]] = {}
    for key in path:
        for quantity, of_steps in results[key].measured["steps"].items():
            curves.setdefault(quantity, []).extend(of_steps)
    return curves


def finished(results: Results, path: Sequence[str]) -> bool:
    """Whether all of a path is there; a path without stretches is none."""
    return bool(path) and all(key in results for key in path)
