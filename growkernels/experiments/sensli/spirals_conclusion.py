"""What the finished spirals study says: evidence, summary and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pandas
import torch

from growkernels.experiments.claims import Evidence, Value, paid_for
from growkernels.experiments.plots import Plot
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli import flops, merit_timing
from growkernels.experiments.sensli import spirals_plots as plots
from growkernels.experiments.sensli import spirals_questions as questions
from growkernels.experiments.sensli.engine import SettingRun, lineages_of
from growkernels.experiments.sensli.settings import Setting
from growkernels.experiments.sensli.spirals_study import METRICS_EVERY, SpiralsStudy, curve
from growkernels.experiments.statistics import MINIMUM_RUNS, Floats, effect, estimate
from growkernels.experiments.study import Conclusion
from growkernels.experiments.table import Table, differences, values

QUANTITIES = ("loss", "error")


def table_of(runs: Mapping[str, SettingRun]) -> Table:
    """Every METRICS_EVERY-th epoch, those at insertions, and the last."""
    parts = []
    for name, run in runs.items():
        setting = run.setting
        epochs = {*range(0, setting.epochs + 1, METRICS_EVERY), setting.epochs}
        epochs |= {insertion.epoch for v in setting.variants for insertion in v.insertions}
        kept = torch.tensor(sorted(epochs), device="cpu")
        for variant in setting.variants:
            columns = {q: curve(run, variant.name, q)[kept].double() for q in QUANTITIES}
            part = {
                "run": numpy.tile(numpy.arange(setting.runs), len(kept)),
                "epoch": kept.numpy().repeat(setting.runs),
                **{
                    quantity: of_epochs.flatten().numpy() for quantity, of_epochs in columns.items()
                },
            }
            parts.append(pandas.DataFrame(part).assign(setting=name, variant=variant.name))
    return Table(pandas.concat(parts, ignore_index=True))


@dataclass(frozen=True)
class SpiralsEvidence(Evidence):
    """The finished settings and their table, as claims, plots and the summary ask them."""

    of: Mapping[str, SettingRun]
    table: Table

    def settings(self, names: Sequence[str]) -> Sequence[str]:
        """Those of the groups that the claims name."""
        return [run.setting.name for name in names for run in self.group(name)]

    def group(self, name: str) -> list[SettingRun]:
        runs = list(self.of.values())
        if name == "swept":
            return [run for run in runs if run.setting.role == "when to insert"]
        found = [run for run in runs if run.setting.role == "one or three insertions"]
        if name == "choosing":
            return [run for run in found if run.setting.hidden > 1]
        if "three" in name:
            found = [run for run in found if run.setting.has("max_3")]
        if name.startswith(("full", "mini")):
            found = [r for r in found if r.setting.full_batch == name.startswith("full")]
        return found

    def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
        control = paid_for(variant)
        if control is not None:
            run, (fixed, resource, grown) = self.of[setting], control
            epoch = questions.paid_epochs(run, fixed, grown, resource)
            return dict(enumerate(curve(run, fixed, quantity)[epoch].tolist()))
        if variant.startswith(("inserted ", "the ", "at a ")):
            return self._of_times(self.of[setting].setting, variant, quantity)
        return self.table.final(variant, quantity, setting)

    def times(self, setting: Setting) -> dict[int, Floats]:
        """Final losses [runs] by the epoch of the insertion."""
        return {
            v.insertions[0].epoch: values(self.table.final(v.name, "loss", setting.name))
            for v in setting.variants
            if v.insertions
        }

    def _of_times(self, setting: Setting, kind: str, quantity: str) -> dict[int, float]:
        inserting = [v.name for v in setting.variants if v.insertions]
        losses = numpy.stack(
            [values(self.table.final(name, quantity, setting.name)) for name in inserting]
        )
        if kind.startswith("inserted"):
            part = losses[:3] if kind == "inserted early" else losses[-3:]
            return dict(enumerate(part.mean(axis=0).tolist()))
        if kind == "the fixed times":
            return dict(enumerate(losses.mean(axis=0).tolist()))
        if kind.startswith("at a "):
            by_rule = (
                questions.plateau_choices
                if kind == "at a plateau"
                else questions.merit_ratio_choices
            )
            choice = by_rule(self.of[setting.name]).numpy()
            return dict(enumerate(losses[choice, numpy.arange(setting.runs)].tolist()))
        # Half of the runs choose the best time, the other half test whether it is better.
        order = torch.randperm(
            setting.runs, generator=seeded(setting.seed, 0), device="cpu"
        ).numpy()
        half = setting.runs // 2
        chosen = int(numpy.nanmean(losses[:, order[:half]], axis=1).argmin())
        rest = [index for index in range(len(inserting)) if index != chosen]
        taken = losses[[chosen]] if kind == "the best time" else losses[rest]
        return {int(run): float(taken[:, run].mean()) for run in order[half:]}

    def obstacle(self, setting: str, first: str, second: str) -> str | None:
        own = self.of[setting].setting
        first, second = (control[0] if (control := paid_for(v)) else v for v in (first, second))
        if not own.has(first, second):
            return None  # times of a sweep
        if lineages_of(own.variant(first)) == lineages_of(own.variant(second)):
            return "one candidate position, so max = min = random: no test"
        rates = [
            math.prod(i.rate_factor for i in own.variant(v).insertions) for v in (first, second)
        ]
        if rates[0] != rates[1]:
            gap = effect(differences(*(self.runs(setting, v, "loss") for v in (first, second))))
            return f"difference {gap.text()}; their learning rates differ: no test"
        return None

    def value(self, name: str, setting: str) -> Value:
        run = self.of[setting]
        own = run.setting
        if name in ("right choices", "choices of one batch"):
            gains = questions.gains(run)
            right = (gains[gains.isfinite()] > 0).double()
            share = effect(100 * (right if name == "right choices" else questions.agreement(run)))
            measured = (
                f"{share.mean:.1f} [{share.low:.1f}, {share.high:.1f}] % ({share.count} runs)"
            )
            return Value(measured, share.low, share.high, share.count >= MINIMUM_RUNS)
        if name == "growth seconds":
            training, growth = questions.seconds(run, own.variant("max"))
            share_of_time = 100 * growth / (training + growth)
            return Value(f"{share_of_time:.2f} % of the time", share_of_time, share_of_time)
        total = flops.training_flops(own, own.variant("max"))
        if name == "saving":
            saved = 100 * (1 - total / flops.training_flops(own, own.variant("scratch_1")))
            return Value(f"{saved:.1f} % saved", saved, saved)
        counts = (
            flops.authors_merit_flops(own), flops.our_merit_flops(own), flops.virtual_flops(own)
        )  # fmt: skip
        authors, ours, recorded = (100 * count / total for count in counts)
        measured = (
            f"authors' extended network {authors:.3f} %, ours as a pass of its own {ours:.3f} %, "
            f"recorded during a training step {recorded:.4f} %"
        )
        return Value(measured, authors, authors)

    def vectors(self, name: str, setting: str) -> tuple[Floats, Floats]:
        """The signal-to-noise ratio of the largest merit, and what its choice gains, by run."""
        noise, gain = questions.signal_to_noise(self.of[setting]), questions.gains(self.of[setting])
        both = noise.isfinite() & gain.isfinite()
        return noise[both].numpy(), gain[both].numpy()


def conclude(study: SpiralsStudy, runs: Mapping[str, SettingRun]) -> Conclusion:
    evidence = SpiralsEvidence(runs, table_of(runs))
    compared = [run.setting for run in evidence.group("compared")]
    gaps = {
        s.name: effect(differences(*(evidence.runs(s.name, v, "loss") for v in ("max", "small"))))
        for s in compared
    }
    found = "; ".join(f"{name} {gap.text()}" for name, gap in gaps.items())
    return Conclusion(
        evidence,
        _plots(evidence),
        {
            "settings": {name: _summary(evidence, run) for name, run in runs.items()},
            "training_seconds": {n: round(run.seconds.sum().item(), 2) for n, run in runs.items()},
            "merit_pass_milliseconds": {
                s.name: merit_timing.measure(s, study.device) for s in compared
            },
        },
        "One layer inserted where its merit is largest changed the final training loss against "
        f"the small net's by: {found}.",
        {"settings": [run.setting for run in runs.values()], "flops": flops},
    )


def _summary(evidence: SpiralsEvidence, run: SettingRun) -> dict[str, dict[str, Any]]:
    summary: dict[str, dict[str, Any]] = {}
    name = run.setting.name
    for variant in run.setting.variants:
        loss, error = (evidence.runs(name, variant.name, quantity) for quantity in QUANTITIES)
        losses = estimate(values(loss))
        path = [run.lineages.index(lineage) for lineage in lineages_of(variant)]
        summary[variant.name] = {
            **losses.as_json("loss"),
            **estimate(values(error)).as_json("error"),
            "runs": losses.count,
            "diverged": run.setting.runs - losses.count,
            "stopped_early": sum(value == 0 for value in error.values()),
            "seconds": round(sum(run.seconds[index].item() for index in path), 3),
        }
    return summary


def _plots(evidence: SpiralsEvidence) -> dict[str, Plot]:
    """The figures these settings can fill, by file name."""
    compared, three = evidence.group("compared"), evidence.group("three")
    choosing = [run for run in compared if run.setting.hidden > 1]
    swept = evidence.group("swept")
    drawn: dict[str, Plot] = {}
    if compared:
        names = ["small", "max", "min", "random", "scratch_1", "large"]
        drawn["loss_one_insertion"] = Plot(
            plots.loss_curves(evidence, compared, names),
            "One insertion. Mean training loss over all initialisations; bands show one standard "
            "error, the dashed line is the insertion.",
        )
    if three:
        names = ["small", "max_3", "min_3", "random_3", "scratch_3"]
        drawn["loss_three_insertions"] = Plot(
            plots.loss_curves(evidence, three, names),
            "Three spaced insertions (dashed lines) against the final architecture from scratch.",
        )
    if choosing:
        drawn["merits"] = Plot(
            plots.merit_positions(choosing),
            "Merits at the first insertion: one thin line per initialisation, the geometric mean "
            "in bold.",
        )
    if swept:
        drawn["insertion_times"] = Plot(
            plots.insertion_times(evidence, swept),
            "When to insert: final training loss against the epoch of the insertion, mean and one "
            "standard error; lines with bands are the networks without insertion.",
        )
    if compared:
        best = max(compared, key=lambda run: run.setting.full_batch)
        drawn["decision_boundary"] = Plot(
            plots.decision_boundaries(best),
            f"{best.setting.name}, the run with the median final loss: predicted class (shading), "
            "decision boundary (line) and training points.",
        )
    return drawn
