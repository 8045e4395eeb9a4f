"""The convolutional settings of the SensLI study, as data.

Names follow the scripts of the authors' published code (mathemml/SensLI, folder for CNNs). The
preset ``paper`` has their sizes; the others keep what is compared and shrink everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Rule = Literal["max", "min", "random", "relative"]

NORM = "operator"  # decides, as in the authors' experiments; the others are reported beside it
TAU = 1.0


@dataclass(frozen=True)
class Attempt:
    """Before ``epoch`` (counted from 0) one layer is inserted where ``rule`` says.

    ``relative`` takes the largest merit, but only if it is at least TAU times the mean merit of
    the existing convolutions; otherwise the network stays as it is.
    """

    epoch: int
    rule: Rule


@dataclass(frozen=True)
class CnnVariant:
    """One curve of a setting.

    It starts with ``layers[s]`` convolutions in stage s. ``final_of`` names another variant
    instead, whose final architecture is trained from scratch.
    """

    name: str
    attempts: tuple[Attempt, ...] = ()
    layers: tuple[int, ...] = (1, 1, 1)
    final_of: str | None = None


@dataclass(frozen=True)
class CnnOptimizer:
    """SGD. ``plain`` is what the authors' training loop computes, ``momentum`` what it names."""

    name: Literal["plain", "momentum"]
    rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def build(self, model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(
            model.parameters(), self.rate, self.momentum, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class CnnSetting:
    """One experiment. ``batch`` is in images, ``epochs`` counts passes over the training images."""

    name: str
    role: str
    widths: tuple[int, ...]
    variants: tuple[CnnVariant, ...]
    epochs: int
    runs: int
    optimizer: CnnOptimizer
    batch: int = 128
    head_width: int = 500
    seed: int = 1

    def variant(self, name: str) -> CnnVariant:
        return next(v for v in self.variants if v.name == name)

    @property
    def title(self) -> str:
        return f"CNN {'-'.join(map(str, self.widths))}, {self.role}"


@dataclass(frozen=True)
class CnnPreset:
    """The settings of one preset, and how much data they see."""

    settings: tuple[CnnSetting, ...]
    train_limit: int | None
    test_limit: int | None


def cnn_preset(preset: str, optimizer: str) -> CnnPreset:
    """The four CNN experiments in the size of a preset, trained with one of two optimizers.

    Raises ValueError for an optimizer that is neither ``plain`` nor ``momentum``.
    """
    # Batches of 16 or 32 at these rates learn in some thousand steps what the paper's cannot.
    rate = 0.01 if preset == "paper" else 0.1
    if optimizer == "plain":
        sgd = CnnOptimizer("plain", rate)
    elif optimizer == "momentum":
        sgd = CnnOptimizer("momentum", 0.01, 0.9, 5e-4)
    else:
        raise ValueError(f"Unknown optimizer {optimizer!r}; choose plain or momentum.")
    if preset == "paper":
        sizes = Sizes(
            optimizer=sgd, growing=(64, 128, 256), equal=(200, 200, 200), batch=128,
            head_width=500, block=50, attempt_block=50, sweep=tuple(range(10, 81, 10)),
            sweep_epochs=200, runs=10, single_runs=1,
        )  # fmt: skip
        return CnnPreset(cnn_settings(sizes), None, None)
    if preset == "desk":  # an hour on two cores; the small net reaches 64 % in 12 epochs
        sizes = Sizes(
            optimizer=sgd, growing=(16, 32, 64), equal=(24, 24, 24), batch=32, head_width=100,
            block=6, attempt_block=4, sweep=(2, 5, 8), sweep_epochs=12, runs=6, single_runs=6,
        )  # fmt: skip
        return CnnPreset(cnn_settings(sizes), 20_000, None)
    sizes = Sizes(
        optimizer=sgd, growing=(16, 32, 64), equal=(24, 24, 24), batch=16, head_width=100,
        block=6, attempt_block=4, sweep=(2, 5, 8), sweep_epochs=12, runs=3, single_runs=2,
    )  # fmt: skip
    return CnnPreset(cnn_settings(sizes), 1440, 1000)


@dataclass(frozen=True)
class Sizes:
    """What differs between presets.

    ``block`` epochs lie before and after an insertion, ``attempt_block`` around exp1's attempts.
    """

    optimizer: CnnOptimizer
    growing: tuple[int, int, int]
    equal: tuple[int, int, int]
    batch: int
    head_width: int
    block: int
    attempt_block: int
    sweep: tuple[int, ...]
    sweep_epochs: int
    runs: int
    single_runs: int


def cnn_settings(sizes: Sizes) -> tuple[CnnSetting, ...]:
    """exp5, exp9, exp12 and exp1 of the authors' CNN code."""
    block = sizes.block
    attempts = tuple(Attempt(n * sizes.attempt_block, "relative") for n in (1, 2, 3))

    def setting(
        name: str,
        role: str,
        widths: tuple[int, ...],
        epochs: int,
        runs: int,
        *variants: CnnVariant,
    ) -> CnnSetting:
        return CnnSetting(
            name, role, widths, variants, epochs, runs,
            sizes.optimizer, sizes.batch, sizes.head_width,
        )  # fmt: skip

    return (
        setting(
            "cnn_exp5", "against fixed architectures", sizes.growing, 2 * block, sizes.runs,
            CnnVariant("small"),
            CnnVariant("max", (Attempt(block, "max"),)),
            # The authors' large net has its extra layer in front, wherever SensLI puts its own.
            CnnVariant("large", layers=(2, 1, 1)),
        ),
        setting(
            "cnn_exp9", "largest against smallest merit", sizes.equal, 2 * block, sizes.runs,
            CnnVariant("max", (Attempt(block, "max"),)),
            CnnVariant("min", (Attempt(block, "min"),)),
            CnnVariant("random", (Attempt(block, "random"),)),
        ),
        setting(
            "cnn_exp12", "when to insert", sizes.growing, sizes.sweep_epochs, sizes.single_runs,
            CnnVariant("small"),
            *(CnnVariant(f"insert_{e}", (Attempt(e, "relative"),)) for e in sizes.sweep),
        ),
        setting(
            "cnn_exp1", "three attempts", sizes.growing, 4 * sizes.attempt_block, sizes.single_runs,
            CnnVariant("sensli", attempts),
            CnnVariant("final", final_of="sensli"),
        ),
    )  # fmt: skip
