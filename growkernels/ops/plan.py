"""What computes a call: one answer for the ops that dispatch by it and for `growkernels info`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class Plan(NamedTuple):
    """What computes a call.

    Attributes:
        backend: its name; None where nothing can compute the call on this machine.
        parameters: what its launch needs, such as tiles; None for what is not launched from Python.
        refused: the backends preferred to it and the reason against each, in that order.
    """

    backend: str | None
    parameters: Any = None
    refused: tuple[tuple[str, str], ...] = ()


def from_library(choice: tuple[str, dict[str, str]]) -> Plan:
    """The answer of an op NAME_plan, which the compiled library dispatches by."""
    backend, refused = choice
    return Plan(backend, None, tuple(refused.items()))


class Example(NamedTuple):
    """A kind of call, of the size that decides about its speed, for `growkernels info`.

    Attributes:
        backends: names, the preferred ones first, each with the types of devices it is for; none
            for those that any device can have.
        plan: the plan of that call on a device and for a dtype.
    """

    backends: Mapping[str, tuple[str, ...]]
    plan: Callable[[torch.device, torch.dtype], Plan]


def without_data(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    """A tensor to ask a plan for: it has no memory."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
