"""Growing a checkpoint's file, without a model that trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.growth.records import Records, read_records, rebuild
from growkernels.growth.state import grow_state
from growkernels.nn.records import without_values
from growkernels.saved_files import read_saved


def grow_file(
    checkpoint: Path, records: Records, out: Path, build: Callable[[], nn.Module]
) -> dict[str, tuple[int, int]]:
    """Do what records say to a checkpoint that ``torch.save`` wrote, and write the result.

    The checkpoint is a model's state dict, or a dict with one under ``"model"``; then the
    optimizer's state under ``"optimizer"`` grows too, and what the model went through before is
    under ``"insertions"`` (``gk.growth.insertions``), to which the records are added. All other
    entries stay. `out` appears whole or not at all.

    Returns:
        {"parameters": (before, after), "tensors": (before, after)} of the model's state.

    Raises:
        ValueError: neither of the two, a file that cannot be read or names code, or what
            ``grow_state`` raises.
    """
    loaded = _read(checkpoint)
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"{checkpoint} holds a {type(loaded).__name__}; a model's state dict is needed, or a "
            "dict with one under 'model'."
        )
    bare = all(isinstance(value, Tensor) for value in loaded.values())
    if not bare and not isinstance(loaded.get("model"), Mapping):
        raise ValueError(
            f"{checkpoint} has no state dict under 'model'; its entries are "
            f"{', '.join(map(repr, loaded))}. Save the model's state under 'model' and the "
            "optimizer's under 'optimizer'."
        )
    whole: dict[str, Any] = {"model": loaded} if bare else dict(loaded)
    history = read_records(whole.get("insertions", []))
    listed = read_records(records)

    def build_before() -> nn.Module:
        base = build()
        rebuild(base, history)
        return base

    model_state, optimizer_state = grow_state(
        listed, whole["model"], whole.get("optimizer"), build=build_before
    )
    grown = {
        **whole,
        "model": model_state,
        "insertions": [*history, *map(without_values, listed)],
    }
    if optimizer_state is not None:
        grown["optimizer"] = optimizer_state
    _write(model_state if bare else grown, out)
    states = (whole["model"], model_state)
    return {
        "parameters": _both(
            sum(t.numel() for t in s.values() if isinstance(t, Tensor)) for s in states
        ),
        "tensors": _both(len(s) for s in states),
    }


def _read(checkpoint: Path) -> Any:
    try:
        return read_saved(checkpoint)
    except UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} cannot be read as tensors and plain values ({error}), and nothing else "
            "in it is run; save state dicts with torch.save."
        ) from error


def _both(numbers: Any) -> tuple[int, int]:
    before, after = numbers
    return before, after


def _write(content: object, out: Path) -> None:
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
