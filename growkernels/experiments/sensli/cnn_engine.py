"""Trains all variants of one CNN setting from one random start, epoch by epoch, side by side.

Variants with the same past share it: the small net is the first stretch of every insertion. Such a
shared stretch is a *lineage*; it branches where variants part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.data.augment import Normalise, random_crop_flip
from growkernels.data.images import ImageData
from growkernels.data.upload import upload
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli.cnn_merits import (
    MeritPass,
    PassTimes,
    attempt_insertion,
    time_passes,
    training_flops,
)
from growkernels.experiments.sensli.cnn_settings import Attempt, CnnSetting, CnnVariant
from growkernels.growth import insertions, rebuild
from growkernels.models.vgg import layers_per_stage, vgg
from growkernels.timing import now

EVALUATION_BATCH = 500
# What a generator is for, so that no two draw the same numbers.
INITIAL_VALUES, TRAINING_ORDER, MERIT_ORDER = range(3)


@dataclass(frozen=True)
class Lineage:
    """Networks that start with ``layers`` convolutions per stage and have these attempts behind."""

    layers: tuple[int, ...]
    attempts: tuple[Attempt, ...]

    @property
    def key(self) -> str:
        tries = "".join(f" {a.rule}@{a.epoch}" for a in self.attempts)
        return "-".join(map(str, self.layers)) + tries

    @property
    def begin(self) -> int:
        return self.attempts[-1].epoch if self.attempts else 0

    @property
    def parent(self) -> Lineage:
        return replace(self, attempts=self.attempts[:-1])


def path_of(variant: CnnVariant) -> list[Lineage]:
    """The lineages that a variant goes through, in order."""
    tries = variant.attempts
    return [Lineage(variant.layers, tries[:n]) for n in range(len(tries) + 1)]


@dataclass
class Curve:
    """What a lineage measured, one value per epoch of its own.

    ``loss`` is the mean over the epoch's training batches, ``test_loss`` and ``error`` (percent)
    are taken after it, ``seconds`` are those of training alone. ``flops`` is per image.
    """

    begin: int
    parameters: int
    flops: float
    layers: tuple[int, ...]
    loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    merit_pass: MeritPass | None = None


@dataclass
class Network:
    """A lineage that is being trained."""

    model: nn.Sequential
    optimizer: torch.optim.SGD


class CnnRun:
    """One setting from one start, with a state that can be saved and restored.

    All randomness is a function of (setting's seed, run, epoch), the same for every lineage, so a
    restored run continues exactly as it would have, and variants differ in nothing but what is
    compared. Every run has its own initial values (the authors' runs share one vector).

    A variant that trains another one's final architecture from scratch follows in a second phase.
    """

    def __init__(
        self, setting: CnnSetting, run: int, data: ImageData, device: torch.device | str = "cpu"
    ) -> None:
        self.setting = setting
        self.run = run
        self.device = torch.device(device)
        self.data = data.to(self.device)
        self.normalise = Normalise(self.device)
        self.epoch = 0
        self.phase = 0
        self.networks: dict[str, Network] = {}
        self.curves: dict[str, Curve] = {}

    @property
    def done(self) -> bool:
        return self.phase == 2

    @property
    def progress(self) -> int:
        """Epochs behind, out of the setting's ``epochs_to_train`` (or more, at the end)."""
        return self.phase * self.setting.epochs + self.epoch

    def resolve(self, variant: CnnVariant) -> CnnVariant | None:
        """The variant with its architecture; None if that is not known yet or nothing new.

        A final architecture is nothing new where no layer was inserted.
        """
        if variant.final_of is None:
            return variant
        original = next(v for v in self.setting.variants if v.name == variant.final_of)
        end = self.curves.get(path_of(original)[-1].key)
        if end is None or end.layers == original.layers:
            return None
        return replace(variant, layers=end.layers)

    def variant_curves(self, variant: CnnVariant) -> list[tuple[Curve, int]]:
        """The variant's lineages in order, each with the number of its epochs that belong to it."""
        resolved = self.resolve(variant)
        if resolved is None:
            return []
        path = path_of(resolved)
        ends = [lineage.begin for lineage in path[1:]] + [self.setting.epochs]
        return [
            (self.curves[lineage.key], end - lineage.begin)
            for lineage, end in zip(path, ends, strict=True)
        ]

    def step(self) -> None:
        """One epoch: due insertions, then training and test of every network."""
        paths = self._paths()
        if not paths:
            self._next_phase()
            return
        lineages = sorted({n for path in paths for n in path}, key=lambda n: n.begin)
        for lineage in lineages:
            if lineage.begin == self.epoch and lineage.key not in self.curves:
                self._start(lineage)
        wanted = {lineage.key: _end(lineage, paths, self.setting.epochs) for lineage in lineages}
        self.networks = {k: n for k, n in self.networks.items() if wanted[k] > self.epoch}
        images, order = self._epoch_images(TRAINING_ORDER)
        for key, network in self.networks.items():
            self._train_epoch(network, self.curves[key], images, order)
        self.epoch += 1
        if self.epoch == self.setting.epochs:
            self._next_phase()

    def _paths(self) -> list[list[Lineage]]:
        """The lineages of every variant of the current phase."""
        resolved = [
            self.resolve(variant)
            for variant in self.setting.variants
            if (variant.final_of is None) == (self.phase == 0)
        ]
        return [path_of(variant) for variant in resolved if variant is not None]

    def _next_phase(self) -> None:
        self.phase, self.epoch, self.networks = self.phase + 1, 0, {}
        if self.phase == 1 and not self._paths():
            self.phase = 2

    def _start(self, lineage: Lineage) -> None:
        merit_pass = None
        if lineage.attempts:
            parent = self.networks[lineage.parent.key]
            model = copy.deepcopy(parent.model)
            optimizer = self.setting.optimizer.build(model)
            optimizer.load_state_dict(parent.optimizer.state_dict())
            merit_pass = attempt_insertion(
                model,
                optimizer,
                self._merit_batches,
                lineage.attempts[-1].rule,
                self.epoch,
            )
        else:
            model = self._new_model(lineage.layers)
            optimizer = self.setting.optimizer.build(model)
        self.networks[lineage.key] = Network(model, optimizer)
        self.curves[lineage.key] = Curve(
            begin=lineage.begin,
            parameters=sum(p.numel() for p in model.parameters()),
            flops=training_flops(model, self.normalise(self.data.train_images[:2])),
            layers=layers_per_stage(model),
            merit_pass=merit_pass,
        )

    def _new_model(self, layers: tuple[int, ...]) -> nn.Sequential:
        setting = self.setting
        model = vgg(
            setting.widths,
            layers,
            classes=len(self.data.classes),
            image_size=self.data.train_images.shape[-1],
            head_width=setting.head_width,
            generator=seeded(setting.seed, self.run, INITIAL_VALUES, *layers),
        )
        return model.to(self.device)

    def _epoch_images(self, purpose: int) -> tuple[Tensor, Tensor]:
        """The training images as this epoch crops and mirrors them, and their order."""
        generator = seeded(self.setting.seed, self.run, purpose, self.phase, self.epoch)
        images = random_crop_flip(self.data.train_images, generator)
        return images, upload(torch.randperm(len(images), generator=generator), self.device)

    def time_merit_passes(self, batches: int = 20) -> PassTimes:
        """Our merit pass and the authors' on the first network of the setting, untrained."""
        model = self._new_model(self.setting.variants[0].layers)
        return time_passes(model, lambda: islice(self._merit_batches(), batches))

    def _merit_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training images in batches of one size; a smaller last one is left."""
        images, order = self._epoch_images(MERIT_ORDER)
        size = min(self.setting.batch, len(order))
        return self._batches(images, order[: len(order) // size * size].split(size))

    def _batches(self, images: Tensor, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order:
            yield self.normalise(images[index]), self.data.train_labels[index]

    def _train_epoch(self, network: Network, curve: Curve, images: Tensor, order: Tensor) -> None:
        start = now(self.device)
        total = torch.zeros((), device=self.device)
        for batch, labels in self._batches(images, order.split(self.setting.batch)):
            network.optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(network.model(batch), labels)
            loss.backward()
            network.optimizer.step()
            total += loss.detach() * len(labels)
        curve.seconds.append(now(self.device) - start)
        curve.loss.append(total.item() / len(order))
        test_loss, error = self._test(network.model)
        curve.test_loss.append(test_loss)
        curve.error.append(error)

    @torch.no_grad()
    def _test(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss and percentage of wrong answers on the test images."""
        loss = torch.zeros((), device=self.device)
        wrong = torch.zeros((), device=self.device)
        for images, labels in zip(
            self.data.test_images.split(EVALUATION_BATCH),
            self.data.test_labels.split(EVALUATION_BATCH),
            strict=True,
        ):
            logits = model(self.normalise(images))
            loss += F.cross_entropy(logits, labels, reduction="sum")
            wrong += (logits.argmax(1) != labels).sum()
        count = len(self.data.test_labels)
        return loss.item() / count, 100 * wrong.item() / count

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`load_state_dict` needs; loads with ``weights_only=True``."""
        return {
            "epoch": self.epoch,
            "phase": self.phase,
            "curves": {key: asdict(curve) for key, curve in self.curves.items()},
            "networks": {
                key: {
                    "layers": list(map(int, key.split(" ")[0].split("-"))),
                    "insertions": insertions(network.model),
                    "model": network.model.state_dict(),
                    "optimizer": network.optimizer.state_dict(),
                }
                for key, network in self.networks.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.phase = state["epoch"], state["phase"]
        self.curves = {}
        for key, stored in state["curves"].items():
            merit_pass = stored["merit_pass"]
            self.curves[key] = Curve(
                **{**stored, "layers": tuple(stored["layers"])}
                | {"merit_pass": None if merit_pass is None else MeritPass(**merit_pass)}
            )
        self.networks = {}
        for key, stored in state["networks"].items():
            model = self._new_model(tuple(stored["layers"]))
            optimizer = self.setting.optimizer.build(model)
            rebuild(model, stored["insertions"], optimizer)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            model.load_state_dict(stored["model"])
            optimizer.load_state_dict(stored["optimizer"])
            self.networks[key] = Network(model, optimizer)


def _end(lineage: Lineage, paths: list[list[Lineage]], epochs: int) -> int:
    """The epoch before which the last variant leaves this lineage."""
    ends = []
    for path in paths:
        if lineage in path:
            at = path.index(lineage) + 1
            ends.append(path[at].begin if at < len(path) else epochs)
    return max(ends)
