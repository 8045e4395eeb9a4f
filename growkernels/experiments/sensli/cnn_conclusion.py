"""What the finished CNN study says: evidence, summary and pictures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy

from growkernels.experiments.claims import Evidence, Value, paid_for
from growkernels.experiments.models.vgg import vgg
from growkernels.experiments.plots import Plot
from growkernels.experiments.run_folder import number
from growkernels.experiments.sensli import cnn_plots
from growkernels.experiments.sensli.cnn_merits import MeritPass, training_flops
from growkernels.experiments.sensli.cnn_settings import NORM, TAU, CnnSetting, cnn_preset
from growkernels.experiments.sensli.cnn_study import CnnStudy
from growkernels.experiments.statistics import MINIMUM_RUNS, effect, estimate
from growkernels.experiments.study import Conclusion, Results
from growkernels.experiments.table import Table, differences, values
from growkernels.growth.layer_insertion import NORMS
from growkernels.growth.layer_insertion.triggers import LossPlateau

PAPER_EPOCHS = 100  # of exp5, to which the share of the merit pass refers
PLATEAU = 0.05  # an epoch whose loss is lower by a smaller share
TIMED = ("cnn_exp5", "cnn_exp9")  # one setting per base network
NORM_WORDS = {
    "operator": "operator norm",
    "frobenius": "Frobenius norm",
    "frobenius_scaled": "Frobenius norm / size",
}


@dataclass(frozen=True)
class CnnEvidence(Evidence):
    """The study and what it measured, as claims, plots and the summary ask them."""

    study: CnnStudy
    results: Results
    table: Table

    def setting(self, name: str) -> CnnSetting:
        return next(s for s in self.study.preset.settings if s.name == name)

    @cached_property
    def _paths(self) -> dict[tuple[str, str, int], list[str]]:
        return self.study.graph()[1]

    def stretches(self, setting: str, variant: str, run: int) -> list[dict[str, Any]]:
        """What the stretches of a variant measured, in order; none where nothing was trained."""
        found = [self.results[key].measured for key in self._paths[setting, variant, run]]
        return [measured for measured in found if measured["steps"]]

    def passes(self, setting: str, variant: str, run: int) -> list[MeritPass]:
        """The variant's insertion attempts in one run, in order."""
        stretches = self.stretches(setting, variant, run)
        return [MeritPass(**m["merit_pass"]) for m in stretches if m["merit_pass"] is not None]

    def first_passes(self, setting: str) -> dict[int, MeritPass]:
        """Every run's first merit pass."""
        found = {}
        for run in range(self.setting(setting).runs):
            passes = [
                p for v in self.setting(setting).variants for p in self.passes(setting, v.name, run)
            ]
            if passes:
                found[run] = min(passes, key=lambda p: p.epoch)
        return found

    def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
        if quantity == "spread":
            passes = self.first_passes(setting)
            return {run: math.log(merit.spread(variant)) for run, merit in passes.items()}
        control = paid_for(variant)
        if control is not None:
            fixed, resource, grown = control
            epoch = self.paid_epochs(setting, fixed, grown, resource)
            curve = self.table.curve(fixed, quantity, setting)
            return {int(r): float(v) for r, v in curve.loc[epoch].items()} if epoch else {}
        if variant in ("the fixed times", "at a plateau", "at a merit ratio"):
            return self._of_rule(setting, variant, quantity)
        if variant.startswith("inserted "):
            names = self.sweep(setting)
            third = max(1, len(names) // 3)
            names = names[:third] if variant == "inserted early" else names[-third:]
            tables = [self._where_inserted(setting, name, quantity) for name in names]
            everywhere = set.union(*(set(table) for table in tables))
            return {
                run: float(numpy.mean([table[run] for table in tables if run in table]))
                for run in everywhere
            }
        return self.table.final(variant, quantity, setting)

    def _of_rule(self, setting: str, rule: str, quantity: str) -> dict[int, float]:
        """What every run's choice among the times of the sweep comes to, or their mean."""
        finals = [self.table.final(name, quantity, setting) for name in self.sweep(setting)]
        if rule == "the fixed times":
            return {r: float(numpy.mean([final[r] for final in finals])) for r in finals[0]}
        choose = self._plateau if rule == "at a plateau" else self._merit_ratio
        return {run: finals[choose(setting, run)][run] for run in finals[0]}

    def _plateau(self, setting: str, run: int) -> int:
        """The first time of the sweep at which a plateau of the small net's loss is due."""
        trigger = LossPlateau(patience=1, threshold=PLATEAU)
        losses = self.table.curve("small", "loss", setting)[run]
        due = next((e for e, v in losses.items() if trigger.due(e, v)), math.inf)
        times = [self.setting(setting).variant(v).attempts[0].epoch for v in self.sweep(setting)]
        return next((i for i, time in enumerate(times) if time >= due), len(times) - 1)

    def _merit_ratio(self, setting: str, run: int) -> int:
        """The first time of the sweep at which the relative rule accepts."""
        accepted = [self.inserted(setting, name, run) for name in self.sweep(setting)]
        return accepted.index(True) if True in accepted else len(accepted) - 1

    def paid_epochs(self, setting: str, fixed: str, grown: str, resource: str) -> int:
        """How many epochs of a fixed variant a grown one's resource pays for, rounded up.

        In all runs together, and no more than were trained; 0 where nothing was.
        """
        epochs, spent, paid = self.setting(setting).epochs, 0.0, 0.0
        for run in range(self.setting(setting).runs):
            if not self.stretches(setting, fixed, run):
                continue
            if resource == "operations":
                spent += self.training_flops(setting, grown, run)
                spent += sum(merit.flops for merit in self.passes(setting, grown, run))
                paid += self.training_flops(setting, fixed, run)
            else:
                spent += self.seconds(setting, grown, run)
                paid += self.seconds(setting, fixed, run)
        return min(epochs, math.ceil(epochs * spent / paid)) if paid else 0

    def vectors(self, name: str, setting: str) -> tuple[list[float], list[float]]:
        """By run: the signal-to-noise ratio of the largest merit, and what its choice gains."""
        gains = self._gains(setting)
        passes = {run: self.passes(setting, "max", run)[0] for run in gains}
        return [p.snr[p.choice(NORM)] for p in passes.values()], list(gains.values())

    def _gains(self, setting: str) -> dict[int, float]:
        """By how much largest ends below smallest in training loss."""
        largest, smallest = (self.runs(setting, variant, "loss") for variant in ("max", "min"))
        return {run: smallest[run] - loss for run, loss in largest.items()}

    def sweep(self, setting: str) -> list[str]:
        """The variants that insert, by the epoch in which they do."""
        return [v.name for v in self.setting(setting).variants if v.attempts]

    def inserted(self, setting: str, variant: str, run: int) -> bool:
        return self.passes(setting, variant, run)[0].inserted is not None

    def _where_inserted(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
        final = self.table.final(variant, quantity, setting)
        return {run: v for run, v in final.items() if self.inserted(setting, variant, run)}

    def obstacle(self, setting: str, first: str, second: str) -> str | None:
        if second.startswith("final") and not self.runs(setting, second, "loss"):
            return "no layer was inserted in any run: no test"
        return None

    def value(self, name: str, setting: str) -> Value:
        if name == "right choices":
            right = effect([100.0 * (gain > 0) for gain in self._gains(setting).values()])
            measured = f"{right.mean:.0f} % of {right.count} runs"
            return Value(measured, right.low, right.high, right.count >= MINIMUM_RUNS)
        return self._saving(setting) if name == "saving" else self._merit_share(setting)

    def training_flops(self, setting: str, variant: str, run: int) -> float:
        """All training steps of a variant, without merit passes and tests; NaN if there is none."""
        images = self.study.source.about["train_images"]
        stretches = self.stretches(setting, variant, run)
        return sum(len(m["steps"]["loss"]) * images * m["flops"] for m in stretches) or math.nan

    def final_architecture_flops(self, setting: str, variant: str, run: int) -> float:
        """Training the network that the variant ends with from the start, for as many epochs."""
        images = self.study.source.about["train_images"]
        last = self.stretches(setting, variant, run)[-1]
        return float(last["flops"] * images * self.setting(setting).epochs)

    def seconds(self, setting: str, variant: str, run: int) -> float:
        """Training and merit passes of a variant, a stretch that it shares with others included."""
        training = sum(sum(m["steps"]["seconds"]) for m in self.stretches(setting, variant, run))
        return training + sum(merit.seconds for merit in self.passes(setting, variant, run))

    def decisions(self, setting: str, variant: str, run: int) -> list[str]:
        """Where each attempt inserted a layer, or "declined"."""
        return [
            "declined" if merit.inserted is None else merit.positions[merit.inserted]
            for merit in self.passes(setting, variant, run)
        ]

    def _saving(self, setting: str) -> Value:
        shares, merits, places = [], [], set()
        for run in range(self.setting(setting).runs):
            whole = self.final_architecture_flops(setting, "max", run)
            shares.append(100 * (1 - self.training_flops(setting, "max", run) / whole))
            merits.append(100 * sum(m.flops for m in self.passes(setting, "max", run)) / whole)
            places |= set(self.decisions(setting, "max", run))
        saved = estimate(shares)
        measured = (
            f"{saved.text(1)} % saved, of which the merit pass takes {estimate(merits).text(1)} "
            f"(layer behind {' or '.join(sorted(places))})"
        )
        return Value(measured, saved.mean, saved.mean)

    def _merit_share(self, setting: str) -> Value:
        epochs, images = self.setting(setting).epochs, self.study.source.about["train_images"]
        (merit,) = self.passes(setting, "max", 0)
        total = self.training_flops(setting, "max", 0)
        in_paper = total / epochs * PAPER_EPOCHS
        authors = 100 * self._authors_merit_flops(setting) * images / in_paper
        training = self.seconds(setting, "max", 0) - merit.seconds
        measured = (
            f"authors' extended network {authors:.2f} %, ours {100 * merit.flops / in_paper:.2f} % "
            f"at {PAPER_EPOCHS} epochs; in this run of {epochs} epochs ours is "
            f"{100 * merit.flops / total:.1f} % of the FLOPs and "
            f"{100 * merit.seconds / training:.1f} % of the training time"
        )
        return Value(measured, authors, authors)

    def _authors_merit_flops(self, setting: str) -> float:
        """Per image: forward and backward of the base net with a layer behind every convolution."""
        own, images = self.setting(setting), self.study.source.images
        extended = vgg(
            own.widths,
            [2] * len(own.widths),
            classes=len(images.classes),
            image_size=images.train_images.shape[-1],
            head_width=own.head_width,
        )
        return training_flops(extended, images.train_images[:2].float().cpu())


def conclude(study: CnnStudy, results: Results) -> Conclusion:
    evidence = CnnEvidence(study, results, Table.of(study.records(results)))
    settings = study.preset.settings
    loss = {
        v.name: estimate(values(evidence.runs("cnn_exp5", v.name, "loss"))).mean
        for v in evidence.setting("cnn_exp5").variants
    }
    gap = effect(differences(*(evidence.runs("cnn_exp5", v, "loss") for v in ("max", "small"))))
    times = {
        name: asdict(study.network(evidence.setting(name), 0, (1, 1, 1)).time_merit_passes())
        for name in TIMED
    }
    optimizer = settings[0].optimizer
    return Conclusion(
        evidence,
        _plots(evidence),
        {
            "optimizer": asdict(optimizer),
            "settings": {s.name: _summary(evidence, s) for s in settings},
            "merit_pass_milliseconds_per_batch": {
                name: {key: number(value) for key, value in time.items()}
                for name, time in times.items()
            },
        },
        f"On {study.source.about['name']}, one inserted convolution changed the final training "
        f"loss by {gap.text()} against the small net (cnn_exp5: "
        f"{', '.join(f'{name} {mean:.3f}' for name, mean in loss.items())}).",
        {
            "evidence": evidence,
            "settings": settings,
            "paper": cnn_preset("paper", optimizer.name).settings,
            "norms": NORMS,
            "norm_words": NORM_WORDS,
            "decides": NORM,
            "tau": TAU,
        },
    )


def _summary(evidence: CnnEvidence, setting: CnnSetting) -> dict[str, dict[str, Any]]:
    """Final values of every variant, as plain JSON values."""
    summary: dict[str, dict[str, Any]] = {}
    name, runs = setting.name, range(setting.runs)
    for variant in (v.name for v in setting.variants):
        loss = estimate(values(evidence.runs(name, variant, "loss")))
        ends = [evidence.stretches(name, variant, run)[-1:] for run in runs]
        summary[variant] = {
            **loss.as_json("loss"),
            **estimate(values(evidence.runs(name, variant, "error"))).as_json("error"),
            "runs": loss.count,
            "seconds": round(sum(evidence.seconds(name, variant, run) for run in runs), 3),
            "training_flops": [number(evidence.training_flops(name, variant, r)) for r in runs],
            "parameters": [end[0]["parameters"] if end else None for end in ends],
            "inserted": [evidence.decisions(name, variant, run) for run in runs],
        }
    return summary


def _plots(evidence: CnnEvidence) -> dict[str, Plot]:
    return {
        "training_loss": Plot(
            cnn_plots.training_curves(evidence, "loss"),
            "Mean loss over the batches of each epoch; bands show one standard error over the "
            "runs, dashed lines the insertions or attempts.",
        ),
        "test_error": Plot(
            cnn_plots.training_curves(evidence, "error"),
            "Test error after each epoch, drawn in the same way.",
        ),
        "merits": Plot(
            cnn_plots.merits(evidence),
            "Merits at each run's first attempt in three norms (thin lines: runs; thick: geometric "
            "mean), divided by the mean merit of the existing convolutions in the same norm. Above "
            f"the dashed line the relative rule with τ = {TAU:g} accepts.",
        ),
        "insertion_times": Plot(
            cnn_plots.insertion_times(evidence, "cnn_exp12"),
            "When to insert. Line: mean over the runs; dots: single runs, hollow where the attempt "
            "was declined and the network stayed the small one.",
        ),
    }
