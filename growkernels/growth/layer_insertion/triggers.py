"""When to try an insertion or a growth: triggers with one protocol.

A training loop asks ``due`` after every step; when it says yes, the loop records merits and asks
``accept`` whether to insert. Triggers carry their state in ``state_dict``, so that a resumed run
tries at the same steps as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

from growkernels.growth.layer_insertion.merits import Merits


class Trigger(Protocol):
    """What a training loop may ask of a trigger."""

    def due(self, step: int, loss: float) -> bool:
        """Whether to record merits after this step (or epoch), whose training loss is given."""

    def accept(self, merits: Merits) -> bool:
        """Whether these merits justify an insertion now."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Trigger:
    """What accepts any merits and has no state, but where a trigger says otherwise."""

    def accept(self, merits: Merits) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class FixedStep(_Trigger):
    """Due after each of the given steps, as in SensLI's experiments."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = frozenset(steps)

    def due(self, step: int, loss: float) -> bool:
        return step in self.steps


class Interval(_Trigger):
    """Due after step `warmup` and after every `every` steps from there on.

    Beyond Uniform Scaling (arXiv 2402.12418) grows after epoch 50 and every 30 epochs.

    Raises:
        ValueError: a negative warmup, or `every` below 1.
    """

    def __init__(self, warmup: int, every: int) -> None:
        if warmup < 0 or every < 1:
            raise ValueError(
                f"warmup is {warmup} and every is {every}; give at least 0 and at least 1 steps."
            )
        self.warmup = warmup
        self.every = every

    def due(self, step: int, loss: float) -> bool:
        return step >= self.warmup and (step - self.warmup) % self.every == 0


class LossPlateau(_Trigger):
    """Due when the loss has not fallen below (1 - threshold) * its best for `patience` steps.

    After it was due the count starts anew from the current loss.

    Raises:
        ValueError: patience below 1, threshold outside [0, 1), or (in ``due``) a loss that is NaN.
    """

    def __init__(self, patience: int, threshold: float = 1e-3) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience}; it must be at least 1 step.")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold}; it is a fraction in [0, 1).")
        self.patience = patience
        self.threshold = threshold
        self._best = math.inf
        self._waited = 0

    def due(self, step: int, loss: float) -> bool:
        if math.isnan(loss):
            raise ValueError(f"The loss at step {step} is NaN; no plateau can be told from it.")
        if loss < self._best - self.threshold * abs(self._best) or self._best == math.inf:
            self._best, self._waited = loss, 0
            return False
        self._waited += 1
        if self._waited < self.patience:
            return False
        self._best, self._waited = loss, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]


class MeritRatio(_Trigger):
    """Due every `every` steps; accepts when the largest merit is >= tau times the base merit.

    Raises:
        ValueError: `every` below 1 or a tau that is not positive.
    """

    def __init__(self, tau: float, every: int) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1 step.")
        if not tau > 0:
            raise ValueError(f"tau is {tau}; the merit ratio needs a positive threshold.")
        self.tau = tau
        self.every = every

    def due(self, step: int, loss: float) -> bool:
        return step > 0 and step % self.every == 0

    def accept(self, merits: Merits) -> bool:
        return merits.ratio() >= self.tau
