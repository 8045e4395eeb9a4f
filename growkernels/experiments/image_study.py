"""What the studies on images share: variants in several runs, whose steps are epochs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from growkernels.experiments.images.store import ImageSource
from growkernels.experiments.run_folder import number
from growkernels.experiments.study import (
    Content,
    Forks,
    Result,
    Results,
    Stretch,
    Training,
    along,
    finished,
    stretches_of,
)

Paths = dict[tuple[str, str, int], list[str]]  # of a setting, variant and run
Graph = tuple[list[Stretch], Paths]


class ImageTraining(Training, Protocol):
    """A training that goes on with a stored state."""

    def load(self, stored: Result, *, own: bool) -> None:
        """With one of its own stretch (``own``), or of the one before it."""


class ImageStudy(Content):
    """A study on the images of ``source``."""

    source: ImageSource

    @property
    def device(self) -> str:  # type: ignore[override]
        return self.source.device

    @abstractmethod
    def graph(self) -> Graph:
        """All stretches, and the path of every variant and run; "" where there is one setting."""

    @abstractmethod
    def training(self, stretch: Stretch) -> ImageTraining:
        """At the very beginning."""

    def besides(self, measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What a stretch measured besides its epochs, as lines of metrics.jsonl."""
        yield from ()

    def stretches(self) -> list[Stretch]:
        return self.graph()[0]

    def begin(self, stretch: Stretch, parent: Result | None) -> Training:
        training = self.training(stretch)
        if parent is not None:
            training.load(parent, own=False)
        return training

    def resume(self, stretch: Stretch, stored: Result) -> Training:
        training = self.training(stretch)
        training.load(stored, own=True)
        return training

    def records(self, results: Results) -> list[dict[str, Any]]:
        """One record per setting, variant, run and epoch, and what there is besides."""
        records: list[dict[str, Any]] = []
        for (setting, variant, run), path in self.graph()[1].items():
            if not finished(results, path):
                continue
            where: dict[str, Any] = {"setting": setting} if setting else {}
            where |= {"variant": variant, "run": run}
            curves = along(results, path)
            for epoch in range(len(curves.get("loss", ()))):
                values = {
                    quantity: None if of_epochs[epoch] is None else number(of_epochs[epoch])
                    for quantity, of_epochs in curves.items()
                }
                records.append({**where, "epoch": epoch + 1, **values})
            for key in path:
                records += [{**where, **record} for record in self.besides(results[key].measured)]
        return records


def graph_of(variants: Mapping[str, tuple[int, Forks]], runs: int, bar: str) -> Graph:
    """Of variants with their numbers of epochs; ``bar`` may have a place for the run."""
    by_epochs: dict[int, dict[str, Forks]] = {}
    for name, (epochs, forks) in variants.items():
        by_epochs.setdefault(epochs, {})[name] = forks
    graph: list[Stretch] = []
    paths: Paths = {}
    for run in range(runs):
        for epochs, of_epochs in by_epochs.items():
            stretches, of_run = stretches_of(
                of_epochs, epochs, f"run{run}", bar=bar.format(run + 1), about=run
            )
            graph += stretches
            paths |= {("", name, run): path for name, path in of_run.items()}
    return graph, paths
