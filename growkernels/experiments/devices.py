"""Devices: checks one named by the user before any work starts."""

from __future__ import annotations

import torch


def usable_device(name: str) -> str:
    """``name`` if torch can compute there; ValueError with one sentence if not."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); choose cpu, or cuda on a machine "
            "with a GPU and a CUDA build of torch."
        ) from None
    return name
