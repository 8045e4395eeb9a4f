"""One training by all processes of torchrun together: each computes a part of every batch.

They draw the same random numbers, so they hold the same batches and grow alike; gradients are
averaged by DistributedDataParallel. Batch norms see their process' part, as they do there.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from growkernels.distributed.same_wrapper import release
from growkernels.experiments.helpers import of_torchrun, store_of
from growkernels.growth.processes import Ranks

_wanted: ContextVar[bool] = ContextVar("trainings by all processes together", default=False)


@contextmanager
def together(wanted: bool) -> Iterator[None]:
    """Inside, every training is one of all processes.

    Raises ValueError where there is one process alone.
    """
    if wanted and not of_torchrun():
        raise ValueError(
            "--ddp is for several processes; start them by torchrun --nproc-per-node N --no-python "
            "growkernels reproduce ..."
        )
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def processes() -> int:
    """How many train together."""
    return int(os.environ["WORLD_SIZE"]) if _wanted.get() else 1


@contextmanager
def met(name: str) -> Iterator[None]:
    """Inside, the processes are a group; `name` is that of what they train."""
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store_of(name),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        yield
    finally:
        gc.collect()  # a wrapper that outlives its group may wait for the group's threads forever
        distributed.destroy_process_group()


@contextmanager
def wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """What to call in training: the model, or what averages its gradients over the processes."""
    ranks = Ranks()
    if not ranks.several:
        yield model
        return
    # The same dropped paths for all parts of a batch would be fewer random numbers.
    torch.manual_seed(torch.initial_seed() + ranks.own)
    wrapper = DistributedDataParallel(model)
    try:
        yield wrapper
    finally:
        release(wrapper)


def part_of(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    """This process' rows, and what the mean loss over them counts in the mean over processes."""
    ranks, count = Ranks(), len(inputs)
    if count < ranks.number:
        raise ValueError(
            f"A batch of {count} images cannot be shared out among {ranks.number} processes; start "
            "fewer."
        )
    rows = slice(ranks.own, None, ranks.number)
    part = inputs[rows]
    return part, targets[rows], len(part) * ranks.number / count


def mean(value: Tensor) -> Tensor:
    """Over the processes."""
    ranks = Ranks()
    return ranks.sum(value) / ranks.number


def any_of(flag: bool) -> bool:
    """Whether any process says so."""
    return any(Ranks().gathered(flag))
