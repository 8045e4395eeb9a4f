"""FLOP formulas for torch.utils.flop_counter: two per multiply-add, the weights not counted."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula


def register() -> None:
    ops = torch.ops.growkernels

    def hvp(
        x: Sequence[int], w: Sequence[int], v: Sequence[int], *args: object, **kwargs: object
    ) -> int:
        samples = prod(w) // w[1] if w[1] else 0
        return 4 * samples * prod(v)

    register_flop_formula([ops.splitting_hvp, ops.splitting_hvp_conv2d])(hvp)
