"""What finished CNN runs measured: curves, final values, costs and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from growkernels.experiments.run_folder import number
from growkernels.experiments.sensli.cnn_engine import CnnRun, path_of
from growkernels.experiments.sensli.cnn_merits import MeritPass
from growkernels.experiments.sensli.cnn_settings import NORM, CnnSetting, CnnVariant
from growkernels.experiments.statistics import estimate

Runs = Sequence[CnnRun]  # all of one setting


def variant_named(setting: CnnSetting, name: str) -> CnnVariant:
    return next(variant for variant in setting.variants if variant.name == name)


def curve(runs: Runs, name: str, quantity: str = "loss") -> Tensor:
    """[epochs, runs]: "loss" (training), "test_loss", "error" (test, %) or "seconds" per epoch.

    NaN for a run in which the variant does not exist.
    """
    setting = runs[0].setting
    columns = []
    for run in runs:
        values: list[float] = []
        for stretch, epochs in run.variant_curves(variant_named(setting, name)):
            values += getattr(stretch, quantity)[:epochs]
        columns.append(torch.tensor(values or [torch.nan] * setting.epochs, dtype=torch.float64))
    return torch.stack(columns, dim=1)


def final(runs: Runs, name: str, quantity: str = "loss") -> Tensor:
    """The value after the last epoch, [runs]."""
    return curve(runs, name, quantity)[-1]


def merit_passes(run: CnnRun, name: str) -> list[MeritPass]:
    """The variant's insertion attempts in one run, in order."""
    stretches = run.variant_curves(variant_named(run.setting, name))
    return [curve.merit_pass for curve, _ in stretches if curve.merit_pass is not None]


def first_passes(runs: Runs) -> list[MeritPass]:
    """Every run's first merit pass."""
    found = []
    for run in runs:
        passes = [c.merit_pass for c in run.curves.values() if c.merit_pass is not None]
        found += [min(passes, key=lambda p: p.epoch)] if passes else []
    return found


def training_flops(run: CnnRun, name: str) -> float:
    """All training steps of a variant, without merit passes and tests; NaN if there is none."""
    stretches = run.variant_curves(variant_named(run.setting, name))
    images = len(run.data.train_labels)
    return sum(epochs * images * curve.flops for curve, epochs in stretches) or float("nan")


def final_architecture_flops(run: CnnRun, name: str) -> float:
    """Training the network that the variant ends with from the start, for as many epochs."""
    stretches = run.variant_curves(variant_named(run.setting, name))
    return stretches[-1][0].flops * len(run.data.train_labels) * run.setting.epochs


def seconds(run: CnnRun, name: str) -> float:
    """Training and merit passes of a variant, a stretch that it shares with others included."""
    stretches = run.variant_curves(variant_named(run.setting, name))
    training = sum(sum(curve.seconds[:epochs]) for curve, epochs in stretches)
    return training + sum(merit.seconds for merit in merit_passes(run, name))


def parameters(run: CnnRun, name: str) -> int | None:
    stretches = run.variant_curves(variant_named(run.setting, name))
    return stretches[-1][0].parameters if stretches else None


def decisions(run: CnnRun, name: str) -> list[str]:
    """Where each attempt inserted a layer, or "declined"."""
    return [
        "declined" if merit.inserted is None else merit.positions[merit.inserted]
        for merit in merit_passes(run, name)
    ]


def setting_summary(runs: Runs) -> dict[str, dict[str, Any]]:
    """Final values of every variant, as plain JSON values."""
    summary: dict[str, dict[str, Any]] = {}
    for variant in runs[0].setting.variants:
        name = variant.name
        loss, error = estimate(final(runs, name)), estimate(final(runs, name, "error"))
        summary[name] = {
            "loss_mean": number(loss.mean),
            "loss_sem": number(loss.sem),
            "error_mean": number(error.mean),
            "error_sem": number(error.sem),
            "runs": loss.count,
            "seconds": round(sum(seconds(run, name) for run in runs), 3),
            "training_flops": [number(training_flops(run, name)) for run in runs],
            "parameters": [parameters(run, name) for run in runs],
            "inserted": [decisions(run, name) for run in runs],
        }
    return summary


def metrics_records(run: CnnRun) -> list[dict[str, Any]]:
    """One record per variant and epoch, and one per insertion attempt."""
    records: list[dict[str, Any]] = []
    for variant in run.setting.variants:
        where = {"setting": run.setting.name, "run": run.run, "variant": variant.name}
        if not run.variant_curves(variant):
            continue
        columns = {q: curve([run], variant.name, q)[:, 0].tolist() for q in _QUANTITIES}
        for epoch in range(run.setting.epochs):
            values = {q: number(columns[q][epoch]) for q in _QUANTITIES}
            records.append({**where, "epoch": epoch + 1, **values})
        for merit in merit_passes(run, variant.name):
            records.append(
                {
                    **where,
                    "attempt_before_epoch": merit.epoch + 1,
                    "rule": merit.rule,
                    "positions": merit.positions,
                    "merits": {n: list(map(number, v)) for n, v in merit.merits.items()},
                    "base": {n: number(v) for n, v in merit.base.items()},
                    "snr": list(map(number, merit.snr)),
                    "decided_by": NORM,
                    "inserted": merit.inserted,
                    "reason": merit.reason,
                    "seconds": merit.seconds,
                    "flops": merit.flops,
                }
            )
    return records


_QUANTITIES = ("loss", "test_loss", "error", "seconds")


def started_alike(setting: CnnSetting, first: str, second: str) -> bool:
    """Whether two variants have the same initial weights in every run."""
    a, b = variant_named(setting, first), variant_named(setting, second)
    return a.final_of is None and b.final_of is None and path_of(a)[0] == path_of(b)[0]
