"""What the finished trainings say: values per run, sums over growth, and summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from growkernels.experiments.run_folder import number
from growkernels.experiments.scaling.history import GrowthStep, History
from growkernels.experiments.scaling.settings import FINAL_EPOCHS, Variant
from growkernels.experiments.statistics import estimate

Results = Mapping[str, Sequence[History]]  # variant -> its runs
Quantity = Literal["loss", "test_loss", "top1", "top5", "parameters", "seconds"]


def curve(runs: Sequence[History], quantity: Quantity) -> Tensor:
    """[epochs, runs] of one variant; NaN after an epoch without a test."""
    columns = [[getattr(epoch, quantity) for epoch in run.epochs] for run in runs]
    values = [[torch.nan if v is None else v for v in column] for column in columns]
    return torch.tensor(values, dtype=torch.float64).T


def final(runs: Sequence[History], quantity: Quantity) -> Tensor:
    """Mean over the last epochs, [runs]."""
    return curve(runs, quantity)[-FINAL_EPOCHS:].mean(0)


def parameters(runs: Sequence[History]) -> Tensor:
    """At the end, [runs]."""
    return curve(runs, "parameters")[-1]


def growth_share(runs: Sequence[History]) -> Tensor:
    """Seconds of growth per 100 seconds of training and growth, [runs]."""
    shares = []
    for run in runs:
        growth = sum(step.seconds for step in run.growth)
        shares.append(100 * growth / (growth + sum(epoch.seconds for epoch in run.epochs)))
    return torch.tensor(shares, dtype=torch.float64)


def root(layer: str) -> str:
    """The layer of the base network that a grown layer is a part of."""
    return layer.partition(".branches.")[0]


def base_layers(runs: Sequence[History]) -> list[str]:
    """Layers of the base network, in order."""
    return list(dict.fromkeys(root(name) for run in runs for name in run.growth[0].layers))


def added_by_layer(step: GrowthStep, layers: Sequence[str]) -> Tensor:
    """[layers]: neurons added in each layer of the base network, its branches included."""
    counts = dict.fromkeys(layers, 0)
    for name, added in zip(step.layers, step.added, strict=True):
        counts[root(name)] += added
    return torch.tensor([counts[name] for name in layers], dtype=torch.float64)


def variant_summary(runs: Sequence[History]) -> dict[str, Any]:
    """Final values of a variant, as plain JSON values."""
    summary: dict[str, Any] = {"runs": len(runs)}
    quantities: tuple[Quantity, ...] = ("top1", "top5", "loss", "test_loss")
    for quantity in quantities:
        value = estimate(final(runs, quantity))
        summary[f"{quantity}_mean"] = number(value.mean)
        summary[f"{quantity}_sem"] = number(value.sem)
    summary["parameters"] = [int(count) for count in parameters(runs)]
    summary["flops_per_image"] = [run.flops for run in runs]
    summary["seconds"] = round(float(curve(runs, "seconds").sum()), 3)
    summary["last_epoch_seconds"] = round(float(final(runs, "seconds").mean()), 4)
    steps = [step for run in runs for step in run.growth]
    if steps:
        summary["growth_seconds"] = {
            part: round(sum(getattr(step, f"{part}_seconds") for step in steps), 3)
            for part in ("collect", "score", "surgery")
        }
        summary["growth_share_of_time"] = number(estimate(growth_share(runs)).mean)
        summary["growth_steps"] = len(runs[0].growth)
        summary["largest_output_change"] = max(step.change for step in steps)
    return summary


def metrics_records(variant: Variant, run: int, history: History) -> list[dict[str, Any]]:
    """One record per epoch, and one per growth step with all scores summed up by layer."""
    where = {"variant": variant.name, "run": run}
    records: list[dict[str, Any]] = []
    steps = {step.epoch: step for step in history.growth}
    for index, epoch in enumerate(history.epochs):
        if index in steps:
            records.append({**where, "growth_before_epoch": index + 1, **_step(steps[index])})
        values = {k: None if v is None else number(v) for k, v in vars(epoch).items()}
        records.append({**where, "epoch": index + 1, **values})
    return records


def _step(step: GrowthStep) -> dict[str, Any]:
    layers = {}
    for name, scores, added in zip(step.layers, step.scores, step.added, strict=True):
        values = torch.tensor(scores, dtype=torch.float64)
        layers[name] = {
            "neurons": len(values),
            "lowest": number(values.min().item()),
            "median": number(values.median().item()),
            "below_zero": int((values < 0).sum()),
            "added": added,
        }
    return {
        "budget": step.budget,
        "parameters": step.parameters,
        "change": number(step.change),
        "collect_seconds": step.collect_seconds,
        "score_seconds": step.score_seconds,
        "surgery_seconds": step.surgery_seconds,
        "layers": layers,
    }
