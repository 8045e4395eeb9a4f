"""Several optimizers of one model as one, and wrappers through which an optimizer is seen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

ParamGroup = dict[str, Any]
Optimizers: TypeAlias = "Optimizer | Sequence[Optimizer]"

# Wrappers that hand on groups and state of the optimizer in them, by the file that defines them:
# where it was never imported, no optimizer can be of this class.
_SEEN_THROUGH = (
    ("accelerate.optimizer", "AcceleratedOptimizer", "optimizer"),
    ("lightning.pytorch.core.optimizer", "LightningOptimizer", "optimizer"),
    ("pytorch_lightning.core.optimizer", "LightningOptimizer", "optimizer"),
)


class JointOptimizer(Optimizer):
    """The groups and states of several optimizers, for surgeries; the optimizers do the steps."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        # Not Optimizer's own: it would make groups and hooks of its own.
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[ParamGroup]:  # type: ignore[override]
        """The parts' own groups, in a new list."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> MutableMapping[nn.Parameter, Any]:  # type: ignore[override]
        """The parts' own states: each parameter's in the part that holds it."""
        return _JointState(self)


class _JointState(MutableMapping[nn.Parameter, Any]):
    def __init__(self, joint: JointOptimizer) -> None:
        self._joint = joint

    def __getitem__(self, parameter: nn.Parameter) -> Any:
        return part_with(self._joint, parameter).state[parameter]

    def get(self, parameter: nn.Parameter, default: Any = None) -> Any:
        states = (part.state for part in self._joint.parts)
        return next((state[parameter] for state in states if parameter in state), default)

    def __setitem__(self, parameter: nn.Parameter, value: Any) -> None:
        part_with(self._joint, parameter).state[parameter] = value

    def __delitem__(self, parameter: nn.Parameter) -> None:
        holding = [part for part in self._joint.parts if parameter in part.state]
        if not holding:
            raise KeyError(parameter)
        for part in holding:
            del part.state[parameter]

    def pop(self, parameter: nn.Parameter, *default: Any) -> Any:
        value = self.get(parameter, *default)
        for part in self._joint.parts:
            part.state.pop(parameter, None)
        return value

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (p for part in self._joint.parts for p in part.state)  # type: ignore[misc]

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._joint.parts)


def as_one(optimizer: Optimizers | None) -> Optimizer | None:
    """One optimizer for surgeries: itself, what its wrapper wraps, or several as one.

    Raises:
        TypeError: an entry of a list that is no optimizer.
        ValueError: an empty list, or a parameter that two of the optimizers hold.
    """
    if not isinstance(optimizer, list | tuple):
        return None if optimizer is None else _seen_through(optimizer)  # type: ignore[arg-type]
    parts = [_seen_through(part) for part in optimizer]
    for part in parts:
        if not isinstance(part, Optimizer):
            raise TypeError(
                f"One of the optimizers is a {type(part).__name__}; give torch.optim optimizers."
            )
    if not parts:
        raise ValueError("The list of optimizers is empty; pass None if there is none.")
    holders = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
    if len(set(holders)) < len(holders):
        raise ValueError(
            "Two of the optimizers hold the same parameter; give each parameter to one of them."
        )
    return parts[0] if len(parts) == 1 else JointOptimizer(parts)


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers that do the steps."""
    return optimizer.parts if isinstance(optimizer, JointOptimizer) else (optimizer,)


def part_with(optimizer: Optimizer, parameter: nn.Parameter) -> Optimizer:
    """The optimizer that holds a parameter, or the first one."""
    parts = parts_of(optimizer)
    for part in parts[1:]:
        if any(p is parameter for group in part.param_groups for p in group["params"]):
            return part
    return parts[0]


def part_of_group(optimizer: Optimizer, group: ParamGroup) -> Optimizer:
    """The optimizer that a parameter group belongs to."""
    parts = parts_of(optimizer)
    return next((part for part in parts if any(g is group for g in part.param_groups)), parts[0])


def all_step_by(
    optimizer: Optimizer | None, kind: type[Optimizer], parameters: Iterable[nn.Parameter]
) -> bool:
    """Whether the optimizers that hold these parameters are all of this kind."""
    if optimizer is None:
        return False
    return all(isinstance(part_with(optimizer, parameter), kind) for parameter in parameters)


def warn_of_unheld(optimizer: Optimizer, touched: Mapping[str, nn.Parameter]) -> None:
    """Warn of trainable parameters that a surgery touches and the given optimizers do not hold.

    Another optimizer may hold them, which would go on with parameters that the model has no more,
    or not learn of new ones.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    unheld = [name for name, p in touched.items() if p.requires_grad and id(p) not in held]
    if unheld:
        warnings.warn(
            f"The surgery touches {', '.join(map(repr, unheld))} of a layer, which no given "
            "optimizer holds; if another one trains it, give all optimizers of the model as a "
            "list.",
            stacklevel=2,
        )


def _seen_through(optimizer: Optimizer) -> Optimizer:
    for file, kind, attribute in _SEEN_THROUGH:
        known = getattr(sys.modules.get(file), kind, None)
        if known is not None and isinstance(optimizer, known):
            return _seen_through(getattr(optimizer, attribute))
    return optimizer
