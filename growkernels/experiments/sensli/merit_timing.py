"""Wall time of the merit pass: the authors' way, the driver, and the batched op, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.experiments.models.batched import RESIDUAL_SCALE, initialise
from growkernels.experiments.models.networks import single_network
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli.authors_merits import ExtendedNetwork
from growkernels.experiments.sensli.engine import setting_data
from growkernels.experiments.sensli.merits import position_merits
from growkernels.experiments.sensli.settings import Setting
from growkernels.growth import LayerInsertion
from growkernels.timing import interleaved_seconds

KIND_OF_FAMILY = {"feedforward": "linear_relu", "residual": "residual"}


def driver_merits(
    inserter: LayerInsertion, model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> list[float]:
    """One recorded pass over the batches with ``gk.growth.LayerInsertion``."""
    inserter.reset()
    for inputs, targets in batches:
        model.zero_grad()
        with inserter.recording():
            F.cross_entropy(model(inputs), targets).backward()
    values: list[float] = inserter.merits().values.tolist()
    return values


def measure(setting: Setting, device: str, repeats: int = 15) -> dict[str, Any]:
    """Median milliseconds, variants interleaved.

    "authors" and "driver" handle one network; "batched" handles all initialisations of the setting
    at once and is given per network; "ordinary" is one pass over the same batches with the
    gradients of the existing weights alone.
    """
    generator = seeded(setting.seed, setting.hidden)
    networks = initialise(
        setting.family, setting.runs, 2, setting.width, setting.hidden, 2, generator, device=device
    )
    model = single_network(networks, 0)
    data = setting_data(setting)
    points, labels = data.train_points.to(device), data.train_labels.to(device)
    one_hot = torch.stack((labels == 0, labels == 1)).float()
    batches = list(zip(points.split(setting.batch), labels.split(setting.batch), strict=True))
    paths = {str(index): setting.width for index in range(setting.hidden)}
    kind = KIND_OF_FAMILY[setting.family]
    extended = ExtendedNetwork(model, paths, kind)
    inserter = LayerInsertion(model, dict.fromkeys(paths, kind), scale=RESIDUAL_SCALE)

    def ordinary() -> None:
        for inputs, targets in batches:
            model.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()

    variants: dict[str, Callable[[], object]] = {
        "ordinary": ordinary,
        "authors": lambda: extended.merits(batches, F.cross_entropy),
        "driver": lambda: driver_merits(inserter, model, batches),
        "batched": lambda: position_merits(networks, points.T[None], one_hot),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training: networks this small lose with more
    try:
        seconds = interleaved_seconds(variants, repeats, torch.device(device), warm_up=2)
    finally:
        torch.set_num_threads(threads)
    inserter.close()
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    median["batched"] /= setting.runs
    return {name: round(value, 4) for name, value in median.items()}
