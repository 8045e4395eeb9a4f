"""The time that calls take on a machine whose speed drifts."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def now(device: torch.device) -> float:
    """Seconds of a steady clock, after what was queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved_seconds(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of every call in each round; in a round each call has its turn.

    The times of one round are taken next to each other, so what slows the machine down for a while
    slows all of them down, and their ratios stay.

    Args:
        rounds: how many are timed.
        device: on which the calls work.
        warm_up: how many rounds are run before and not timed.
        progress: called with (rounds done, rounds in all), those of the warm-up counted.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        if progress is not None:
            progress(number, warm_up + rounds)
        for name, call in calls.items():
            started = now(device)
            call()
            spent = now(device) - started
            if number >= warm_up:
                seconds[name].append(spent)
    if progress is not None:
        progress(warm_up + rounds, warm_up + rounds)
    return seconds
