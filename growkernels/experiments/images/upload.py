"""Small tensors on their way to a GPU, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``.

    A plain ``.to`` lets the host wait until a GPU has worked off its queue, so that it idles while
    the next step is prepared; from pinned memory the copy takes its turn in the queue.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
