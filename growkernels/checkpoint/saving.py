"""Writing a checkpoint: all ranks or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim import Optimizer

from growkernels.checkpoint.layout import (
    HEAD,
    VERSION,
    Stateful,
    as_sentence,
    clean,
    is_finished,
    listed,
    name_of,
    packed_for_load,
    told_in_a_sentence,
    unwrapped,
)
from growkernels.growth import insertions
from growkernels.growth.processes import Ranks
from growkernels.nn.optimizers import Optimizers


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizers | None = None,
    drivers: Sequence[Stateful] = (),
    *,
    extra: Any = None,
    wait: bool = True,
) -> Future[Any] | None:
    """Write a checkpoint into a new folder; every process calls it.

    Parameters and optimizer states are written as they are, shard by shard. Nothing is stepped: an
    optimizer that has no states yet has none in the checkpoint.

    Args:
        path: a folder that holds no checkpoint yet, so that a kill cannot spoil one.
        model: plain, sharded by ``fully_shard``, or in a DistributedDataParallel.
        optimizer: the model's, or a list of them.
        drivers: whose recorded batches (of each process) shall survive: LayerInsertion,
            NeuronScaling, triggers, anything with a ``state_dict``.
        extra: of the first process; what ``torch.load(weights_only=True)`` reads: schedulers'
            states, step counts.
        wait: False: copy to the CPU and write in the background (``dcp.async_save``); the process
            group then needs a backend for the CPU.

    Returns:
        None, or the Future of what goes on in the background.

    Raises:
        ValueError: the folder holds a checkpoint; an optimizer of another model; what could not be
            loaded again.
        OSError, RuntimeError: a file could not be written; the Future then raises it, if there is
            one.

    What one rank raises all raise, and then nothing is left in the folder.
    """
    folder = Path(path)
    ranks = Ranks()
    with ranks.agreed():
        if is_finished(folder):
            raise ValueError(
                f"{folder} holds a checkpoint; save each one into a folder of its own, so that a "
                "kill while writing leaves the one before."
            )
        new_folder = not folder.exists()
        state = _state(unwrapped(model), listed(optimizer), drivers, extra, ranks)
    failed = f"The checkpoint in {folder} was not written, and nothing is left of it"

    def take_back() -> None:
        _remove(folder, ranks.own, new_folder)

    if not wait:
        return _in_the_background(state, folder, failed, take_back)
    try:
        with told_in_a_sentence(failed):
            state_dict_saver.save(state, checkpoint_id=folder, no_dist=not ranks.several)
    except Exception as error:
        take_back()
        with ranks.agreed():  # one sentence, and no rank goes on before all have taken back
            raise error
    return None


def _state(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    drivers: Sequence[Stateful],
    extra: Any,
    ranks: Ranks,
) -> dict[str, Any]:
    """The checkpoint's entries, as far as this process has them."""
    head = {
        "version": VERSION,
        "records": insertions(model),
        "frozen": [clean(n) for n, p in model.named_parameters() if not p.requires_grad],
        "ranks": ranks.number,
        "drivers": len(drivers),
    }
    state: dict[str, Any] = {HEAD: json.dumps(head)}
    state.update((f"model/{name}", v) for name, v in get_model_state_dict(model).items())
    names = {id(p): clean(name) for name, p in model.named_parameters()}
    for part in optimizers:
        for parameter, entries in part.state.items():
            name = name_of(names, parameter)
            state.update((f"optimizer/{name}/{key}", value) for key, value in entries.items())
    groups = [
        [
            {**group, "params": [name_of(names, p) for p in group["params"]]}
            for group in part.param_groups
        ]
        for part in optimizers
    ]
    state["groups"] = packed_for_load(groups, "A group of the optimizer")
    state["extra"] = packed_for_load(extra, "extra")
    for number, driver in enumerate(drivers):
        driver_state = packed_for_load(driver.state_dict(), f"The state of driver {number}")
        state[f"driver/{number}/{ranks.own}"] = driver_state
    return state


def _in_the_background(
    state: dict[str, Any], folder: Path, failed: str, take_back: Callable[[], None]
) -> Future[Any]:
    told: Future[Any] = Future()

    def finish(saving: Future[Any]) -> None:
        error = saving.exception()
        if error is None:
            told.set_result(saving.result())
            return
        take_back()
        told.set_exception(
            as_sentence(error, failed) if isinstance(error, CheckpointException) else error
        )

    with told_in_a_sentence(failed):
        saving: Any = state_dict_saver.async_save(state, checkpoint_id=folder)
    saving.add_done_callback(finish)
    return told


def _remove(folder: Path, rank: int, new_folder: bool) -> None:
    """Remove what this rank has written; the last of them removes the folder, if it was new."""
    written = [*folder.glob(f"__{rank}_*.distcp")]
    if rank == 0:
        written += [folder / ".metadata", folder / ".metadata.tmp"]
    with suppress(OSError):  # what cannot be removed is no checkpoint without .metadata
        for file in written:
            file.unlink(missing_ok=True)
        if new_folder:
            folder.rmdir()
