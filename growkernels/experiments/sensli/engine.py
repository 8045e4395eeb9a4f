"""Trains every variant and initialisation of one setting at once.

Variants that have the same past share it: the small net is the first phase of max, min and random,
and one insertion is the second phase of three. A beginning of a variant's forks is a *lineage*,
with one network per initialisation; that of the start has its number of hidden layers for a way,
the others an insertion. All lineages
of equal depth that are alive form one batched network (a *cohort*), so an epoch is a handful of
batched matrix products whatever the number of variants, and after an insertion a lineage moves to
the cohort one layer deeper.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from growkernels.experiments.images.spirals import Split, spirals, split
from growkernels.experiments.models.batched import (
    BatchedNetwork,
    concatenate,
    cross_entropy,
    from_parameters,
    initialise,
)
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli.merits import position_merits
from growkernels.experiments.sensli.settings import Insertion, Setting, Variant
from growkernels.experiments.study import Fork, Forks


def lineages_of(variant: Variant) -> list[Forks]:
    """The lineages a variant goes through, in order."""
    begin = Fork(0, variant.start_hidden)
    forks = (begin, *(Fork(insertion.epoch, insertion) for insertion in variant.insertions))
    return [forks[:count] for count in range(1, len(forks) + 1)]


def hidden_layers(lineage: Forks) -> int:
    """Of its networks: those of the start, and one per insertion."""
    layers: int = lineage[0].way
    return layers + len(lineage) - 1


def setting_data(setting: Setting, dtype: torch.dtype = torch.float32) -> Split:
    """The spirals and the one split that all runs of a setting share."""
    points, labels = spirals(setting.per_class, setting.inner_radius, dtype=dtype)
    return split(points, labels, seeded(setting.seed))


class SettingRun:
    """The training of one setting, epoch by epoch, with a state that can be saved and restored.

    Rows of the curves are lineage-major: lineage i owns rows i*runs ... (i+1)*runs - 1. Randomness
    is a function of (seed, epoch), so a restored run continues exactly as it would have.
    """

    def __init__(
        self,
        setting: Setting,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.setting = setting
        self.device = torch.device(device)
        self.dtype = dtype
        paths = [lineages_of(variant) for variant in setting.variants]
        self.lineages = sorted(dict.fromkeys(n for path in paths for n in path), key=_by_begin)
        self.ends = [self._end_of(lineage, paths) for lineage in self.lineages]
        rows = len(self.lineages) * setting.runs
        self.epoch = 0
        self.loss = torch.full((setting.epochs + 1, rows), torch.nan, device=device)
        self.error = torch.full((setting.epochs + 1, rows), torch.nan, device=device)
        self.rate = torch.full((rows,), setting.rate, dtype=dtype, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.seconds = torch.zeros(len(self.lineages), dtype=torch.float64, device="cpu")
        # Of the merit pass and the insertion that a lineage begins with.
        self.growth_seconds = torch.zeros_like(self.seconds)
        self.cohorts: dict[int, tuple[list[int], BatchedNetwork]] = {}
        # Per insertion: merits [runs, positions], chosen position [runs], the network before it.
        self.insertions: dict[int, tuple[Tensor, Tensor, BatchedNetwork]] = {}
        self._load_data()

    def _load_data(self) -> None:
        data = setting_data(self.setting, self.dtype)
        points = torch.cat((data.train_points, data.test_points)).T.to(self.device)
        labels = torch.cat((data.train_labels, data.test_labels)).to(self.device)
        self.points = points[None].contiguous()
        self.one_hot = torch.stack((labels == 0, labels == 1)).to(self.dtype)
        self.test_labels = labels[len(data.train_labels) :].bool()
        self.train_count = len(data.train_labels)

    def _end_of(self, lineage: Forks, paths: list[list[Forks]]) -> int:
        ends = []
        for path in paths:
            if lineage in path:
                at = path.index(lineage)
                ends.append(path[at + 1][-1].step if at + 1 < len(path) else self.setting.epochs)
        return max(ends)

    @property
    def done(self) -> bool:
        return self.epoch > self.setting.epochs

    def rows(self, lineage: int) -> slice:
        return slice(lineage * self.setting.runs, (lineage + 1) * self.setting.runs)

    def network(self, lineage: int) -> BatchedNetwork:
        """The current networks of one lineage that is alive (a copy)."""
        members, network = self.cohorts[hidden_layers(self.lineages[lineage])]
        start = members.index(lineage) * self.setting.runs
        return network.select(torch.arange(start, start + self.setting.runs, device=self.device))

    def advance(self, step: int) -> None:
        """The epoch of this number, which is the next one."""
        assert step == self.epoch
        self.step()

    def step(self) -> None:
        """One epoch: due insertions, then evaluation and update of every cohort.

        The curves at epoch e describe the networks after e updates; the last step only evaluates.
        """
        self._insert_and_regroup()
        for hidden in sorted(self.cohorts):
            started = time.perf_counter()
            members, network = self.cohorts[hidden]
            self._train_epoch(members, network)
            spent = time.perf_counter() - started
            self.seconds[torch.tensor(members, device="cpu")] += spent / len(members)
        self.epoch += 1

    def _insert_and_regroup(self) -> None:
        born = [i for i, n in enumerate(self.lineages) if n[-1].step == self.epoch]
        old = [i for members, _ in self.cohorts.values() for i in members]
        ended = [i for i in old if self.ends[i] == self.epoch < self.setting.epochs]
        if not born and not ended:
            return
        networks = {i: self.network(i) for i in old}
        networks.update({i: self._create(i) for i in born})
        for i in ended:
            del networks[i]
        self.cohorts = {}
        for hidden in sorted({hidden_layers(self.lineages[i]) for i in networks}):
            members = sorted(i for i in networks if hidden_layers(self.lineages[i]) == hidden)
            self.cohorts[hidden] = (members, concatenate([networks[i] for i in members]))

    def _create(self, index: int) -> BatchedNetwork:
        lineage, setting = self.lineages[index], self.setting
        if len(lineage) == 1:
            hidden = hidden_layers(lineage)
            return initialise(
                setting.family, setting.runs, 2, setting.width, hidden, 2,
                seeded(setting.seed, hidden), self.dtype, self.device,
            )  # fmt: skip
        insertion: Insertion = lineage[-1].way
        parent = self.lineages.index(lineage[:-1])
        started = time.perf_counter()
        network = self.network(parent)
        train = slice(self.train_count)
        merits = position_merits(network, self.points[..., train], self.one_hot[..., train])
        positions = self._choose(merits, insertion, index)
        self.insertions[index] = (merits, positions, network)
        rows, parent_rows = self.rows(index), self.rows(parent)
        self.rate[rows] = self.rate[parent_rows] * insertion.rate_factor
        self.active[rows] = self.active[parent_rows]
        grown = network.with_insertion(positions)
        self.growth_seconds[index] = time.perf_counter() - started
        return grown

    def _choose(self, merits: Tensor, insertion: Insertion, index: int) -> Tensor:
        if insertion.rule == "random":
            generator = seeded(self.setting.seed, self.epoch, index)
            drawn = torch.randint(
                merits.shape[1], (merits.shape[0],), generator=generator, device="cpu"
            )
            return drawn.to(self.device)
        return merits.argmin(1) if insertion.rule == "min" else merits.argmax(1)

    def _train_epoch(self, members: list[int], network: BatchedNetwork) -> None:
        index = torch.cat(
            [torch.arange(s.start, s.stop, device="cpu") for s in (self.rows(i) for i in members)]
        ).to(self.device)
        everything = network.forward(self.points.expand(network.runs, -1, -1))
        training = everything.narrow(self.train_count)
        loss, dlogits = cross_entropy(training.logits, self.one_hot[:, : self.train_count])
        logits = everything.logits[..., self.train_count :]
        wrong = (logits[:, 1] > logits[:, 0]) != self.test_labels
        error = 100.0 * wrong.float().mean(1)
        self.loss[self.epoch, index] = loss.float()
        self.error[self.epoch, index] = error
        # A run without test errors is finished: it stays in the batch with learning rate zero.
        self.active[index] &= error > 0
        if self.epoch == self.setting.epochs:
            return
        rate = self.rate[index] * self.active[index]
        if self.setting.full_batch:
            network.descend(network.backward(training, dlogits)[0], rate)
        else:
            self._mini_batches(network, rate, len(members))

    def _mini_batches(self, network: BatchedNetwork, rate: Tensor, copies: int) -> None:
        """One shuffled pass; the order depends on epoch and initialisation, not on the variant."""
        generator = seeded(self.setting.seed, self.epoch)
        draw = torch.rand(self.setting.runs, self.train_count, generator=generator, device="cpu")
        order = draw.argsort(1).to(self.device).repeat(copies, 1)
        points = self.points[0][:, order].transpose(0, 1)
        one_hot = self.one_hot[:, order].transpose(0, 1)
        for start in range(0, self.train_count, self.setting.batch):
            part = slice(start, start + self.setting.batch)
            activations = network.forward(points[..., part])
            _, dlogits = cross_entropy(activations.logits, one_hot[..., part])
            network.descend(network.backward(activations, dlogits)[0], rate)

    def state(self) -> None:
        """What is measured is also all that is needed to go on."""

    @property
    def measured(self) -> dict[str, Any]:
        """Everything :meth:`load` needs; loads with ``weights_only=True``."""
        return {
            "epoch": self.epoch,
            "loss": self.loss[: self.epoch].clone(),
            "error": self.error[: self.epoch].clone(),
            "rate": self.rate.clone(),
            "active": self.active.clone(),
            "seconds": self.seconds.clone(),
            "growth_seconds": self.growth_seconds.clone(),
            "cohorts": {
                hidden: (members, [p.clone() for p in network.parameters()])
                for hidden, (members, network) in self.cohorts.items()
            },
            "insertions": {
                index: (merits, positions, network.parameters())
                for index, (merits, positions, network) in self.insertions.items()
            },
        }

    def load(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.loss[: self.epoch] = state["loss"]
        self.error[: self.epoch] = state["error"]
        self.rate.copy_(state["rate"])
        self.active.copy_(state["active"])
        self.seconds.copy_(state["seconds"])
        self.growth_seconds.copy_(state["growth_seconds"])
        family, device = self.setting.family, self.device
        self.cohorts = {
            hidden: (members, from_parameters(family, [p.to(device) for p in parameters]))
            for hidden, (members, parameters) in state["cohorts"].items()
        }
        self.insertions = {
            index: (
                merits.to(device),
                positions.to(device),
                from_parameters(family, [p.to(device) for p in parameters]),
            )
            for index, (merits, positions, parameters) in state["insertions"].items()
        }


def _by_begin(lineage: Forks) -> int:
    return lineage[-1].step
