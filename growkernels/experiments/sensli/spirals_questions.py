"""What the paper leaves open about fully connected networks, answered from the finished settings.

Nothing here trains: curves, and the networks and merits at every insertion, are stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from growkernels.experiments.models.batched import BatchedNetwork, cross_entropy
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli import flops
from growkernels.experiments.sensli.engine import SettingRun, lineages_of, setting_data
from growkernels.experiments.sensli.merits import position_merits
from growkernels.experiments.sensli.settings import Variant
from growkernels.experiments.sensli.spirals_study import curve
from growkernels.growth.layer_insertion.triggers import LossPlateau

PATIENCE, THRESHOLD = 50, 0.02  # a plateau: in so many epochs the loss fell by a smaller share
TAU = 1.0  # the merit ratio that is large enough
NOISE_BATCH = 45  # points, as in the settings with mini-batches
NOISE_ORDER = 1  # what a generator is for


def first_insertion(run: SettingRun, variant: str) -> tuple[Tensor, Tensor, BatchedNetwork]:
    """Merits [runs, positions], the chosen positions [runs], and the networks before it."""
    lineage = lineages_of(run.setting.variant(variant))[1]
    return run.insertions[run.lineages.index(lineage)]


def seconds(run: SettingRun, variant: Variant) -> tuple[float, float]:
    """Of training and of growth, for all runs together.

    Of a stretch that several variants share, the part that belongs to this one's past.
    """
    path = lineages_of(variant)
    ends = [*(lineage[-1].step for lineage in path[1:]), run.setting.epochs]
    training = growth = 0.0
    for lineage, end in zip(path, ends, strict=True):
        index, begin = run.lineages.index(lineage), lineage[-1].step
        part = (end - begin) / (run.ends[index] - begin)
        training += part * run.seconds[index].item()
        growth += run.growth_seconds[index].item()
    return training, growth


def paid_epochs(run: SettingRun, fixed: str, grown: str, resource: str) -> int:
    """How many epochs of a fixed variant the "operations" or "seconds" of a grown one pay for.

    Rounded up, and no more than were trained.
    """
    setting = run.setting
    own, other = setting.variant(fixed), setting.variant(grown)
    if resource == "operations":
        ratio = flops.whole_flops(setting, other) / flops.whole_flops(setting, own)
    else:
        ratio = sum(seconds(run, other)) / sum(seconds(run, own))
    return min(setting.epochs, math.ceil(ratio * setting.epochs))


def sweep(run: SettingRun) -> list[Variant]:
    """The variants that insert, by the epoch in which they do."""
    return [variant for variant in run.setting.variants if variant.insertions]


def plateau_choices(run: SettingRun) -> Tensor:
    """[runs]: which variant of the sweep a plateau of the small net's loss chooses."""
    times = [variant.insertions[0].epoch for variant in sweep(run)]
    losses = curve(run, "small").double()
    chosen = []
    for of_run in losses.T.tolist():
        trigger = LossPlateau(PATIENCE, THRESHOLD)
        due = next((e for e, loss in enumerate(of_run) if _due(trigger, e, loss)), times[-1])
        chosen.append(next((i for i, time in enumerate(times) if time >= due), len(times) - 1))
    return torch.tensor(chosen, device="cpu")


def _due(trigger: LossPlateau, epoch: int, loss: float) -> bool:
    return math.isfinite(loss) and trigger.due(epoch, loss)


def merit_ratio_choices(run: SettingRun) -> Tensor:
    """[runs]: the first variant of the sweep whose merit ratio reaches TAU, or else the last."""
    reached = torch.stack([merit_ratio(run, variant.name) >= TAU for variant in sweep(run)])
    first = reached.int().argmax(0)
    return torch.where(reached.any(0), first, len(reached) - 1).cpu()


def merit_ratio(run: SettingRun, variant: str) -> Tensor:
    """[runs]: the largest merit over the mean squared gradient of the existing weight matrices."""
    merits, _, network = first_insertion(run, variant)
    points, one_hot = run.points[..., : run.train_count], run.one_hot[:, : run.train_count]
    activations = network.forward(points.expand(network.runs, -1, -1))
    _, dlogits = cross_entropy(activations.logits, one_hot)
    gradients, _ = network.backward(activations, dlogits)
    weights = [g for g in gradients if g.shape[-1] > 1]  # biases have one column
    base = torch.stack([g.pow(2).sum((1, 2)) for g in weights]).mean(0)
    return merits.max(1).values / base


def batch_merits(run: SettingRun) -> Tensor:
    """[batches, runs, positions]: merits from single batches at the first insertion."""
    _, _, network = first_insertion(run, "max")
    data = setting_data(run.setting, run.dtype)
    labels = data.train_labels
    order = torch.randperm(
        len(labels), generator=seeded(run.setting.seed, NOISE_ORDER), device="cpu"
    )
    one_hot = torch.stack((labels == 0, labels == 1)).to(run.dtype)
    return torch.stack(
        [
            position_merits(
                network,
                data.train_points[index].T[None].to(run.device),
                one_hot[:, index].to(run.device),
            )
            for index in order.split(NOISE_BATCH)
            if len(index) == NOISE_BATCH
        ]
    )


def signal_to_noise(run: SettingRun) -> Tensor:
    """[runs]: of the largest merit, as `Merits.snr` has it."""
    merits, chosen, _ = first_insertion(run, "max")
    by_batch = batch_merits(run).double()
    count = len(by_batch)
    means = merits.double()
    spread = (by_batch.sum(0) - count * means).clamp(min=0)
    snr = means * count * (count - 1) / spread
    return snr.gather(1, chosen[:, None])[:, 0].cpu()


def gains(run: SettingRun) -> Tensor:
    """[runs]: by how much largest ends below smallest in training loss."""
    return (curve(run, "min")[-1] - curve(run, "max")[-1]).double()


def agreement(run: SettingRun) -> Tensor:
    """[runs]: the share of single batches that choose the position that all points choose."""
    chosen = first_insertion(run, "max")[1]
    return (batch_merits(run).argmax(2) == chosen).double().mean(0).cpu()
