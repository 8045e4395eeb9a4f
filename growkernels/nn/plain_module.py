"""Models whose modules can be exchanged."""

from __future__ import annotations

from torch import nn


def check_plain_module(model: object) -> None:
    """Raise TypeError for what is no module, and for one wrapped for data parallelism."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}; pass a torch.nn.Module.")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(
            f"The model is wrapped in {type(model).__name__}: pass model.module (the wrapper may "
            "be called meanwhile), and afterwards wrap the module again, because the old wrapper "
            "does not know the new parameters."
        )
