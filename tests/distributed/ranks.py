"""Processes that meet over gloo, and what each of them found."""

from __future__ import annotations

import gc
import multiprocessing as standard_multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

Check = Callable[[int], Any]
SECONDS = 1200  # more than any machine takes, however busy it is


@dataclass
class Failure:
    """What a function gave that raised."""

    text: str


def raised(function: Callable[[], object]) -> str:
    """The type and sentence of what it raises, which travels between processes."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def on_ranks(checks: dict[str, Check], number: int, folder: Path) -> dict[str, list[Any]]:
    """What each function gives on each of `number` ranks, which are started once for all of them.

    Raises:
        AssertionError: with the traceback of the first function that raised (all have run); or
            processes that wait for one another forever.
    """
    # One server imports what takes seconds, and all processes of a session are its forks.
    standard_multiprocessing.set_forkserver_preload(
        ["growkernels.checkpoint", "pytest", "torch._dynamo"]
    )
    processes = multiprocessing.start_processes(
        _one, (checks, number, str(folder)), number, join=False, start_method="forkserver"
    )
    end = time.monotonic() + SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            raise AssertionError(f"The processes have not ended after {SECONDS} seconds.")
    told = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]
    for of_rank in told:
        for result in of_rank.values():
            if isinstance(result, Failure):
                raise AssertionError(result.text)
    return {name: [of_rank[name] for of_rank in told] for name in checks}


def _one(rank: int, checks: dict[str, Check], number: int, folder: str) -> None:
    torch.set_num_threads(1)
    # What was imported is no garbage, and no wrapper of a model, which surgeries look for among all
    # objects: a million of them otherwise, each time.
    gc.freeze()
    told: dict[str, Any] = {}
    for name, check in checks.items():
        # A group of its own for each, so that what one leaves behind does not reach the next.
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet-{name}",
            rank=rank,
            world_size=number,
            timeout=timedelta(seconds=SECONDS),
        )
        torch.manual_seed(0)
        try:
            told[name] = check(rank)
        except Exception:
            told[name] = Failure(traceback.format_exc())
        gc.collect()  # a wrapper that outlives its group may wait for the group's threads forever
        distributed.destroy_process_group()
    torch.save(told, Path(folder) / f"{rank}.pt")
