"""What the finished study of non-uniform scaling says: evidence, summary and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from growkernels.experiments.claims import OF_SETTING, Evidence, Value
from growkernels.experiments.plots import Plot
from growkernels.experiments.run_folder import number
from growkernels.experiments.scaling import plots
from growkernels.experiments.scaling.settings import FINAL_EPOCHS, Setting, preset_setting
from growkernels.experiments.scaling.study import ScalingStudy
from growkernels.experiments.statistics import Floats, effect, estimate
from growkernels.experiments.study import Conclusion, Results
from growkernels.experiments.table import Table, differences, values

PARTS = ("collect", "score", "surgery")
USUAL = "splitting"
FEW_STEPS = 100  # an epoch of fewer is too short to say what growth adds to a training


@dataclass(frozen=True)
class ScalingEvidence(Evidence):
    """The study's table and growth steps, as claims, plots and the summary ask them.

    ``growth`` and ``flops`` have a list, by variant, of what every run had.
    """

    setting: Setting
    table: Table
    growth: Mapping[str, list[list[dict[str, Any]]]]
    flops: Mapping[str, list[int]]

    def words(self) -> dict[str, object]:
        usual = self.setting.variant(USUAL).growth
        assert usual is not None
        return {"interval": usual.interval}

    def settings(self, names: Sequence[str]) -> Sequence[str]:
        if list(names) == ["every other interval"]:
            return [v.name for v in self.setting.variants if v.name.startswith("interval_")]
        return names

    def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
        name = setting if variant == OF_SETTING else variant
        return self.table.final(name, quantity, epochs=FINAL_EPOCHS)

    def obstacle(self, setting: str, first: str, second: str) -> str | None:
        missing = {setting if v == OF_SETTING else v for v in (first, second)} - set(self.flops)
        return f"{' and '.join(sorted(missing))} not in this preset: no test" if missing else None

    def value(self, name: str, setting: str) -> Value:
        if name == "every growth":
            steps = [s for runs in self.growth.values() for run in runs for s in run]
            worst = max(step["change"] for step in steps)
            measured = f"largest change {worst:.1e} of the largest output, in {len(steps)} growths"
            return Value(measured, worst, worst)
        kind, _, variant = name.partition(" ")
        if variant not in self.flops:
            return Value(f"{variant} not in this preset: no test", 0.0, 0.0, tests=False)
        if kind == "flops":
            full = self.flops["homogeneous"][0]
            shares = [100 * (1 - flops / full) for flops in self.flops[variant]]
            measured = f"{estimate(shares).text(1)} % fewer per image than the full network"
            return Value(f"{variant}: {measured}", min(shares), max(shares))
        if kind == "seconds":
            times = estimate(list(self.seconds(USUAL) / self.seconds(variant)))
            return Value(f"{times.text(2)} times the seconds of {variant}", times.mean, times.mean)
        share, recipe = estimate(self.growth_shares(variant)), self.setting.recipe
        measured = (
            f"{variant}: {share.text(1)} % of the time for {len(self.growth[variant][0])} growths "
            f"in {self.setting.epochs} epochs"
        )
        each = math.inf if recipe.epoch_images is None else recipe.epoch_images // recipe.batch
        if each < FEW_STEPS:
            measured += f" of only {each} steps each: no test"
        return Value(measured, share.mean, share.mean, tests=each >= FEW_STEPS)

    def parameters(self, variant: str) -> Floats:
        """At the end, [runs]."""
        return values(self.table.final(variant, "parameters"))

    def seconds(self, variant: str) -> Floats:
        """Of training and growth, without tests, [runs]."""
        training: Floats = self.table.curve(variant, "seconds").sum().to_numpy()
        of_growth = [
            sum(step[f"{part}_seconds"] for step in steps for part in PARTS)
            for steps in self.growth[variant]
        ]
        whole: Floats = training + numpy.array(of_growth, dtype=numpy.float64)
        return whole

    def growth_seconds(self, variant: str, part: str) -> float:
        """Of all runs, in one of PARTS."""
        return float(sum(s[f"{part}_seconds"] for run in self.growth[variant] for s in run))

    def growth_shares(self, variant: str) -> list[float]:
        """Seconds of growth per 100 seconds of training and growth, [runs]."""
        training: Floats = self.table.curve(variant, "seconds").sum().to_numpy()
        return list(100 * (1 - training / self.seconds(variant)))


def conclude(study: ScalingStudy, results: Results) -> Conclusion:
    setting = study.setting
    steps: dict[str, list[list[dict[str, Any]]]] = {}
    flops: dict[str, list[int]] = {}
    for (_, variant, _), path in study.graph()[1].items():
        of_run = [step for key in path for step in results[key].measured["growth"]]
        steps.setdefault(variant, []).append(of_run)
        flops.setdefault(variant, []).append(results[path[-1]].measured["flops"])
    evidence = ScalingEvidence(setting, Table.of(study.records(results)), steps, flops)
    compared = ("reduced", "splitting", "splitting_large", "homogeneous")
    found = ", ".join(
        f"{name} {estimate(values(evidence.runs('', name, 'top1'))).text(2)} % at "
        f"{_short(float(evidence.parameters(name).mean()))} parameters"
        for name in compared
        if name in flops
    )
    return Conclusion(
        evidence,
        _plots(evidence),
        {"variants": {v.name: _summary(evidence, v.name) for v in setting.variants}},
        f"Top-1 accuracy on {study.source.about['name']}: {found}.",
        {"setting": setting, "paper": preset_setting("paper", 256)},
    )


def _short(count: float) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def _summary(evidence: ScalingEvidence, variant: str) -> dict[str, Any]:
    """Final values of a variant, as plain JSON values."""
    accuracies = evidence.runs("", variant, "top1")
    full = evidence.runs("", "homogeneous", "top1")
    summary: dict[str, Any] = {"runs": len(accuracies)}
    for quantity in ("top1", "top5", "loss", "test_loss"):
        summary |= estimate(values(evidence.runs("", variant, quantity))).as_json(quantity)
    summary["top1_against_homogeneous"] = effect(differences(accuracies, full)).as_json()
    summary["parameters"] = [int(count) for count in evidence.parameters(variant)]
    summary["flops_per_image"] = evidence.flops[variant]
    seconds = evidence.table.curve(variant, "seconds")
    summary["seconds"] = round(float(seconds.sum().sum()), 3)
    last = values(evidence.runs("", variant, "seconds"))
    summary["last_epoch_seconds"] = round(float(last.mean()), 4)
    steps = [step for run in evidence.growth[variant] for step in run]
    if steps:
        summary["growth_seconds"] = {
            part: round(evidence.growth_seconds(variant, part), 3) for part in PARTS
        }
        summary["growth_share_of_time"] = number(estimate(evidence.growth_shares(variant)).mean)
        summary["growth_steps"] = len(evidence.growth[variant][0])
        summary["largest_output_change"] = max(step["change"] for step in steps)
    return summary


def _plots(evidence: ScalingEvidence) -> dict[str, Plot]:
    return {
        "accuracy_by_parameters": Plot(
            plots.accuracy_by_parameters(evidence),
            "Final accuracy against size. Squares keep their size, discs grow during training. "
            "Variants of about one size stand side by side.",
        ),
        "accuracy": Plot(
            plots.training_curves(evidence, "top1"),
            "Accuracy after each epoch; bands show one standard error over the runs, dashed lines "
            "the growth steps of the usual interval.",
        ),
        "training_loss": Plot(
            plots.training_curves(evidence, "loss"), "Training loss, drawn in the same way."
        ),
        "where_grown": Plot(
            plots.where_grown(evidence),
            "Where neurons were added: block and layer against time, mean over the runs. A "
            "branch's neurons count for the layer that it belongs to.",
        ),
        "spectra": Plot(
            plots.spectra(evidence),
            "Smallest eigenvalue of every neuron's splitting matrix at each growth step (variant "
            "splitting, first run): median and 5 to 95 % of a layer's neurons. Below zero there is "
            "a direction of descent that the neuron lacks.",
        ),
        "growth_cost": Plot(plots.growth_cost(evidence), "What growth adds to the training time."),
    }
