"""Random numbers that are a function of what they are for."""

from __future__ import annotations

import torch


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on all of ``numbers``."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % (2**63)
    return torch.Generator().manual_seed(seed)
