"""What a finished setting measured: curves, final values, merits and chosen positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from growkernels.experiments.sensli.engine import SettingRun, lineages_of
from growkernels.experiments.statistics import estimate


def curve(run: SettingRun, variant: str, quantity: str = "loss") -> Tensor:
    """[epochs + 1, runs] on the CPU; ``quantity`` is "loss" (training) or "error" (test, %)."""
    values: Tensor = getattr(run, quantity)
    path = [run.lineages.index(n) for n in lineages_of(run.setting.variant(variant))]
    result = values[:, run.rows(path[0])].clone()
    for index in path[1:]:
        begin = run.lineages[index].begin
        result[begin:] = values[begin:, run.rows(index)]
    return result.cpu()


def final(run: SettingRun, variant: str, quantity: str = "loss") -> Tensor:
    """The value of every run after the last epoch, [runs]."""
    return curve(run, variant, quantity)[-1]


def last_insertion(run: SettingRun, variant: str) -> int:
    """The lineage that the variant's last insertion started."""
    return run.lineages.index(lineages_of(run.setting.variant(variant))[-1])


def variant_seconds(run: SettingRun, variant: str) -> float:
    """Training time of the variant's lineages, each an equal share of its batch.

    A first phase that several variants share counts for each of them.
    """
    path = lineages_of(run.setting.variant(variant))
    return sum(run.seconds[run.lineages.index(n)].item() for n in path)


def setting_summary(run: SettingRun) -> dict[str, dict[str, Any]]:
    summary: dict[str, dict[str, Any]] = {}
    for variant in run.setting.variants:
        loss = estimate(final(run, variant.name))
        error = estimate(final(run, variant.name, "error"))
        summary[variant.name] = {
            "loss_mean": _number(loss.mean),
            "loss_sem": _number(loss.sem),
            "error_mean": _number(error.mean),
            "error_sem": _number(error.sem),
            "runs": loss.count,
            "diverged": run.setting.runs - loss.count,
            "stopped_early": int((final(run, variant.name, "error") == 0).sum()),
            "seconds": round(variant_seconds(run, variant.name), 3),
        }
    return summary


def metrics_records(run: SettingRun, every: int) -> list[dict[str, Any]]:
    """One record per variant and ``every`` epochs, and one per insertion."""
    records: list[dict[str, Any]] = []
    name = run.setting.name
    for variant in run.setting.variants:
        loss, error = curve(run, variant.name), curve(run, variant.name, "error")
        for epoch in range(0, run.setting.epochs + 1, every):
            mean = estimate(loss[epoch])
            records.append(
                {
                    "setting": name,
                    "variant": variant.name,
                    "epoch": epoch,
                    "loss_mean": _number(mean.mean),
                    "loss_sem": _number(mean.sem),
                    "error_mean": _number(estimate(error[epoch]).mean),
                }
            )
    for index, (merits, positions, _) in sorted(run.insertions.items()):
        lineage = run.lineages[index]
        records.append(
            {
                "setting": name,
                "insertion": lineage.insertions[-1].rule,
                "epoch": lineage.begin,
                "merits": merits.tolist() if bool(merits.isfinite().all()) else None,
                "positions": positions.tolist(),
            }
        )
    return records


def _number(value: float) -> float | None:
    """JSON knows no NaN: a mean over no finite run is null."""
    return value if torch.tensor(value).isfinite() else None
