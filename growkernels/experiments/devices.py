"""Devices: checks one named by the user before any work starts, and tells the time on one."""

from __future__ import annotations

import time

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


def now(device: torch.device) -> float:
    """Seconds of a steady clock, after what was queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
