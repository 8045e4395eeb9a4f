"""What one training of one variant measured, as plain values that travel and are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """What one epoch measured.

    ``loss`` is the mean over its training batches (of mixed images and smoothed labels where the
    recipe mixes and smooths). ``test_loss``, ``top1`` and ``top5`` (accuracies in percent) are
    taken on the test images after it, None after an epoch without a test. ``seconds`` are those of
    training alone.
    """

    loss: float
    test_loss: float | None
    top1: float | None
    top5: float | None
    parameters: int
    seconds: float


@dataclass(frozen=True)
class GrowthStep:
    """One growth, before ``epoch``. Lists have one entry per layer, in the order of ``layers``.

    ``scores`` are those of every neuron (splitting: its smallest eigenvalue), ``added`` counts the
    neurons that were grown. ``change`` is the largest difference of outputs before and after,
    relative to the largest output. Seconds: of collecting inputs and gradients, of the scores
    (eigenpairs, where the criterion needs them), and of selection and surgery.
    """

    epoch: int
    budget: int
    layers: list[str]
    scores: list[list[float]]
    added: list[int]
    parameters: int
    change: float
    collect_seconds: float
    score_seconds: float
    surgery_seconds: float

    @property
    def seconds(self) -> float:
        return self.collect_seconds + self.score_seconds + self.surgery_seconds


@dataclass
class History:
    """All of a training; ``flops`` are those of the last network's forward pass of one image."""

    flops: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    growth: list[GrowthStep] = field(default_factory=list)

    def as_state(self) -> dict[str, Any]:
        """Containers of numbers and strings; ``from_state`` reads them."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        return cls(
            state["flops"],
            [Epoch(**epoch) for epoch in state["epochs"]],
            [GrowthStep(**step) for step in state["growth"]],
        )
