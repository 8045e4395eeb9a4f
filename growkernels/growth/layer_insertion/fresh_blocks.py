"""New values for a copied block, as whoever built the model would have drawn them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import nn

_DONE = "_is_hf_initialized"  # transformers' mark on what shall not be initialised again


def initialise(
    model: nn.Module, template: str, new: nn.Module, zero: Collection[str], seed: int
) -> None:
    """Draw a block's parameters and buffers anew.

    Each module in it does so by its own ``reset_parameters``; then the nearest module around the
    block that has ``_init_weights(module)``, as transformers', timm's and many hand-written models
    have, is asked about each. The values are the same on every device; parameters on the meta
    device get none.

    Args:
        template: path of the block that ``new`` is a copy of.
        zero: names of parameters that are made zero afterwards; they may have no initial value.
        seed: of the values.

    Raises:
        ValueError: parameters that neither initialises, or on several devices.
    """
    parameters = dict(new.named_parameters())
    devices = {tensor.device for tensor in (*parameters.values(), *new.buffers())}
    if torch.device("meta") in devices or not devices:
        return
    if len(devices) > 1:
        raise ValueError(f"Block {template!r} is on several devices; use init='copy'.")
    new.to("cpu")
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        for parameter in parameters.values():
            parameter.fill_(math.nan)
            vars(parameter).pop(_DONE, None)
        new.apply(_reset)
        if (init_weights := _init_weights_around(model, template)) is not None:
            new.apply(init_weights)
        missing = [n for n, p in parameters.items() if n not in zero and bool(p.isnan().any())]
    if missing:
        raise ValueError(
            f"Block {template!r} cannot be initialised anew: its {missing[0]!r} gets no value from "
            "reset_parameters of the module that has it, nor from an _init_weights around the "
            "block; use init='copy'."
        )
    new.to(devices.pop())


def _reset(module: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, name, None)):
            reset()
            return


def _init_weights_around(model: nn.Module, template: str) -> Callable[[nn.Module], None] | None:
    parts = template.split(".")
    for end in range(len(parts) - 1, -1, -1):
        around = model.get_submodule(".".join(parts[:end]))
        found: Callable[[nn.Module], None] | None = getattr(around, "_init_weights", None)
        if callable(found):
            return found
    return None
