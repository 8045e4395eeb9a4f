"""What the finished study of basis convolutions says: evidence, summary and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from growkernels.experiments.basis import plots
from growkernels.experiments.basis.plans import parameter_count
from growkernels.experiments.basis.search import Search
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    BY_CHANCE,
    BY_TAYLOR,
    BY_TRAINING,
    DENSE,
    DENSE_SHORTER,
    EVERYWHERE,
    FULL_FIRST,
    ONE_FRACTION,
    preset_settings,
)
from growkernels.experiments.basis.study import BasisStudy
from growkernels.experiments.claims import Evidence, Value
from growkernels.experiments.models.resnet import resnet18
from growkernels.experiments.plots import Plot
from growkernels.experiments.run_folder import number
from growkernels.experiments.statistics import effect, estimate, rank_correlation
from growkernels.experiments.study import Conclusion
from growkernels.experiments.table import Table, differences, values

TIMED_IMAGES = 50_000  # as many as are in CIFAR-10's training set
NAMES = {
    DENSE: "dense",
    EVERYWHERE: "basis everywhere",
    BY_TRAINING: "layers chosen by training",
    BY_TAYLOR: "layers chosen by Taylor",
    BASIS_FIRST: "basis first, then full",
    FULL_FIRST: "full first, then basis",
    DENSE_SHORTER: "dense, for the time of basis everywhere",
    ONE_FRACTION: "layers chosen by Taylor, one fraction",
    BY_CHANCE: "layers chosen by chance",
}


@dataclass(frozen=True)
class BasisEvidence(Evidence):
    """The study and its table, as claims, plots and the summary ask them."""

    study: BasisStudy
    table: Table

    @property
    def search(self) -> Search:
        assert self.study.search is not None
        return self.study.search

    def settings(self, names: Sequence[str]) -> Sequence[str]:
        if list(names) == ["every fraction"]:
            return [f"{fraction:g} of the filters" for fraction in self.study.settings.fractions]
        return names

    def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
        return self.table.final(variant, quantity)

    def obstacle(self, setting: str, first: str, second: str) -> str | None:
        missing = {first, second} - set(self.study.settings.variants)
        return f"{' and '.join(sorted(missing))} not in this preset: no test" if missing else None

    def value(self, name: str, setting: str) -> Value:
        search = self.search
        if name.startswith("saving "):
            variant = name.removeprefix("saving ")
            low, middle, high = (100 * (1 - ratio) for ratio in reversed(self.time_ratio(variant)))
            asked = "" if search.ratio is None else f", {100 * (1 - search.ratio):.1f} % asked for"
            measured = (
                f"{NAMES[variant]}: a step saves {middle:.1f} % "
                f"(quartiles {low:.1f} to {high:.1f}{asked})"
            )
            return Value(measured, low, high)
        ours = search.by_taylor.seconds + search.taylor_training_seconds
        share = 100 * ours / search.by_training.seconds
        measured = (
            f"{search.by_taylor.seconds:.1f} s and {search.taylor_training_seconds:.1f} s for the "
            f"training, against {search.by_training.seconds:.1f} s: {share:.1f} %"
        )
        return Value(measured, share, share)

    def vectors(self, name: str, setting: str) -> tuple[list[float], list[float]]:
        return self.costs(float(setting.partition(" ")[0]))

    def costs(self, fraction: float) -> tuple[list[float], list[float]]:
        """Of every layer: by training, and by Taylor at this fraction of the filters.

        A fraction that saves nothing has the costs of the one below it.
        """
        share = self.study.settings.fractions.index(fraction)
        trained, predicted = [], []
        for path, costs in self.search.by_training.costs.items():
            trained.append(next(iter(costs.values())))
            taylor = [cost for _, cost in sorted(self.search.by_taylor.costs[path].items())]
            predicted.append(taylor[min(share, len(taylor) - 1)])
        return trained, predicted

    def time_ratio(self, variant: str) -> tuple[float, float, float]:
        """Time per epoch relative to dense: lower quartile, median, upper quartile.

        That of a skip schedule is the mean over its epochs, and what a shorter training takes is
        spread over as many epochs as the others have.
        """
        times = self.study.step_times
        assert times is not None
        if variant in times:
            return times[variant].ratio
        epochs = self.study.settings.epochs
        if variant == DENSE_SHORTER:
            shorter = self.study.epochs(variant) / epochs
            return shorter, shorter, shorter
        before = self.study.switch / epochs
        share = before if variant == BASIS_FIRST else 1 - before
        low, middle, high = (1 + share * (r - 1) for r in times[EVERYWHERE].ratio)
        return low, middle, high

    def epoch_seconds(self, variant: str) -> float:
        """Of the timed network on as many images as are in CIFAR-10's training set."""
        times = self.study.step_times
        assert times is not None
        steps = TIMED_IMAGES / self.study.settings.timing.batch
        if variant in times:
            return steps * times[variant].milliseconds / 1e3
        return steps * times[DENSE].milliseconds / 1e3 * self.time_ratio(variant)[1]


def conclude(study: BasisStudy, records: Sequence[Mapping[str, Any]]) -> Conclusion:
    settings = study.settings
    evidence = BasisEvidence(study, Table.of(records))
    summary = summary_of(evidence)
    found = []
    for variant in (EVERYWHERE, BY_TRAINING, BY_TAYLOR):
        gain = effect(differences(*(evidence.runs("", v, "accuracy") for v in (variant, DENSE))))
        found.append(
            f"{NAMES[variant]} {100 * (evidence.time_ratio(variant)[1] - 1):+.1f} % time and "
            f"{gain.text(2)} points of accuracy"
        )
    return Conclusion(
        evidence,
        _plots(evidence),
        summary,
        f"On {study.source.about['name']}, against dense: {'; '.join(found)}.",
        {
            "names": NAMES,
            "settings": settings,
            "paper": preset_settings("paper", synthetic=False, autocast=False),
            "switch": study.switch,
            "timed_images": TIMED_IMAGES,
            "search": evidence.search,
        },
    )


def summary_of(evidence: BasisEvidence) -> dict[str, Any]:
    """Final values and the search, as plain JSON values."""
    study, search = evidence.study, evidence.search
    settings = study.settings
    model = resnet18(study.source.about["classes"], width=settings.recipe.width)
    variants = {}
    for variant in settings.variants:
        accuracies = evidence.runs("", variant, "accuracy")
        accuracy = estimate(values(accuracies))
        against = differences(accuracies, evidence.runs("", DENSE, "accuracy"))
        variants[variant] = {
            **accuracy.as_json("accuracy"),
            **estimate(against).as_json("accuracy_against_dense"),
            "accuracy_against_dense": effect(against).as_json(),
            **estimate(values(evidence.runs("", variant, "loss"))).as_json("loss"),
            "runs": accuracy.count,
            "training_seconds_mean": number(evidence.table.curve(variant, "seconds").sum().mean()),
            "parameters": parameter_count(model, study.plan(variant)),
            "time_per_epoch_against_dense": [round(r, 4) for r in evidence.time_ratio(variant)],
            "seconds_per_epoch": round(evidence.epoch_seconds(variant), 3),
        }
    correlations = {}
    for fraction in settings.fractions:
        found, by_chance, _ = rank_correlation(*evidence.costs(fraction))
        correlations[str(fraction)] = {"spearman": number(found), "p": number(by_chance)}
    assert study.step_times is not None
    return {
        "recipe": asdict(settings.recipe),
        "timing": asdict(settings.timing),
        "variants": variants,
        "search": {
            "by_training": _sensitivities(search, "by_training"),
            "by_taylor": _sensitivities(search, "by_taylor"),
            "taylor_training_seconds": round(search.taylor_training_seconds, 3),
            "rank_correlation": correlations,
            "time_ratio_asked_for": search.ratio,
            "layer_times": {
                "step": search.times.step,
                "full": dict(search.times.full),
                "basis": {p: dict(times) for p, times in search.times.basis.items()},
            },
        },
        "plans": {name: dict(plan) for name, plan in search.plans.items()},
        "step_times": {name: asdict(value) for name, value in study.step_times.items()},
    }


def _sensitivities(search: Search, method: str) -> dict[str, Any]:
    found = getattr(search, method)
    return {
        "costs": {p: {r: number(c) for r, c in v.items()} for p, v in found.costs.items()},
        "errors": {p: {r: number(c) for r, c in v.items()} for p, v in found.errors.items()},
        "baseline": found.baseline,
        "seconds": round(found.seconds, 3),
    }


def _plots(evidence: BasisEvidence) -> dict[str, Plot]:
    return {
        "time_and_accuracy": Plot(
            plots.time_and_accuracy(evidence, NAMES),
            "What basis convolutions save and cost. Time is that of training steps of the "
            "full-width network, all variants taking turns in one process; a skip schedule's is "
            "the mean over its epochs.",
        ),
        "plans": Plot(
            plots.plans(evidence, NAMES),
            "The chosen layers. A layer is as wide as the time of its full convolution and is "
            "filled as far as its filters are basis filters; grey layers keep their kernels.",
        ),
        "sensitivities": Plot(
            plots.sensitivities(evidence),
            "What replacing one layer costs, measured by a short training per layer (the paper's "
            "way; bars show one standard error over the starts if there are several) and "
            "predicted by a Taylor expansion from one pass over some training images.",
        ),
        "training_curves": Plot(
            plots.training_curves(evidence, NAMES),
            "Training loss and test accuracy; bands show one standard error over the runs, the "
            "dashed line where skip schedules change over.",
        ),
        "accuracy_by_time": Plot(
            plots.accuracy_by_time(evidence, NAMES),
            "Test accuracy against the wall time of the trainings themselves, side by side on all "
            "cores, tests and the search aside; means over the runs.",
        ),
    }
