"""What a checkpoint's entries are called and how they are packed, for those that write and read.

``growkernels`` (the head: JSON text, read first), ``model/NAME``, ``optimizer/NAME/ENTRY``,
``groups`` (of the optimizers), ``driver/NUMBER/RANK``, ``extra``.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from growkernels.growth.processes import Ranks
from growkernels.nn.optimizers import Optimizers
from growkernels.saved_files import read_saved

VERSION = 1
HEAD = "growkernels"


class Stateful(Protocol):
    """A driver, a trigger, or anything else with a state of its own in each process."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


@contextmanager
def told_in_a_sentence(what: str) -> Iterator[None]:
    """Let what fails inside torch's checkpoints be told as everything else is; torch tells all
    ranks of it.

    Args:
        what: happened to the checkpoint, a clause.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise as_sentence(error, what) from error


def as_sentence(error: CheckpointException, what: str) -> Exception:
    """The first failing rank's error, on one line."""
    rank, (cause, _) = min(error.failures.items())
    ranks = Ranks()
    where = f"On rank {rank} of {ranks.number}: " if ranks.several else ""
    reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
    kind = OSError if isinstance(cause, OSError) else RuntimeError
    return kind(f"{where}{what} ({reason}).")


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a whole checkpoint: .metadata is written last."""
    return (folder / ".metadata").exists()


def packed(content: Any) -> Tensor:
    """Bytes, for what processes have each of their own and no template for when they load."""
    file = io.BytesIO()
    torch.save(content, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def packed_for_load(content: Any, what: str) -> Tensor:
    """``packed``, or ValueError where ``load`` could not read it again."""
    tensor = packed(content)
    try:
        unpacked(tensor)
    except UnpicklingError:
        raise ValueError(
            f"{what} holds what torch.load(weights_only=True) does not read, so the checkpoint "
            "could not be loaded; give tensors, numbers, strings, and lists and dicts of them."
        ) from None
    return tensor


def unpacked(content: Tensor) -> Any:
    return read_saved(io.BytesIO(content.numpy().tobytes()))


def listed(optimizer: Optimizers | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def name_of(names: Mapping[int, str], parameter: Tensor) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise ValueError(
            f"The optimizer holds a parameter of shape {tuple(parameter.shape)} that the model "
            "does not have; pass the optimizer of this model."
        )
    return name


def clean(name: str) -> str:
    """A parameter's name without what compilation and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel and torch.compile around it."""
    inside: nn.Module | None = None
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inside = model.module
    else:
        inside = model._modules.get("_orig_mod")
    return model if inside is None else unwrapped(inside)
