"""How far a result is from what it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def relative(actual: Tensor, expected: Tensor) -> float:
    """The norm of the error, of that of the expected values."""
    norm = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (norm or 1.0)


def largest(actual: Tensor, expected: Tensor) -> float:
    """The largest error, of the largest of the expected values."""
    if not expected.numel():
        return 0.0
    peak = expected.double().abs().max().item()
    return (actual.double() - expected.double()).abs().max().item() / (peak or 1.0)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def _beside_nan(t: Tensor, dim: int) -> Tensor:
    """The tensor as every other slice of one whose other slices are NaN."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim + 1).flatten(dim, dim + 1)


# What lies between the elements is NaN: reading it shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows padded": lambda t: F.pad(t, (0, 3), value=torch.nan)[..., :-3] if t.dim() else t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "pixels transposed": lambda t: (
        t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t
    ),
    "every other row": lambda t: _beside_nan(t, 0)[::2],
    "every other element": lambda t: _beside_nan(t, t.dim() - 1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded pixels": lambda t: t[..., :1, :1].expand(t.shape) if t.dim() > 1 else t,
    "channels_last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "channels of a wider channels_last": lambda t: (
        torch.cat([t, torch.full_like(t, torch.nan)], 1).contiguous(
            memory_format=torch.channels_last
        )[:, : t.shape[1]]
        if t.dim() == 4
        else t
    ),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
