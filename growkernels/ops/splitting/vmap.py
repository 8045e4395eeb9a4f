"""torch.func.vmap: vectors for the same x and w, and neurons on the same x, stay one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# The op on x, w and vectors [n, k, ...].
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def _product(
    size: int, dims: tuple[int | None, ...], x: Tensor, w: Tensor, v: Tensor, one: int, op: Product
) -> tuple[Tensor, int]:
    """`op` for a batch of `size`; `one` is how many dimensions the v of one neuron's vector has."""
    x_dim, w_dim, v_dim = dims
    x, w, v = (
        t if dim is None else t.movedim(dim, 0)
        for t, dim in zip((x, w, v), (x_dim, w_dim, v_dim), strict=True)
    )
    batched_v = v if v_dim is not None else v.expand(size, *v.shape)
    single = batched_v.dim() == one + 2  # [B, n, ...], else [B, n, k, ...]
    vectors = batched_v.unsqueeze(2) if single else batched_v
    if x_dim is not None:
        ws = w.unbind() if w_dim is not None else [w] * size
        y = torch.stack([op(*each) for each in zip(x.unbind(), ws, vectors, strict=True)])
    elif w_dim is not None:  # B times as many neurons
        y = op(x, w.transpose(0, 1).flatten(1, 2), vectors.flatten(0, 1)).view(vectors.shape)
    else:  # B times as many vectors for each neuron
        shared = vectors.transpose(0, 1)
        y = op(x, w, shared.flatten(1, 2)).view(shared.shape).transpose(0, 1)
    return (y.squeeze(2) if single else y), 0


def register() -> None:
    ops = torch.ops.growkernels

    def weight(
        info: Any, in_dims: Any, grad: Tensor, preact: Tensor, activation: str, beta: float | None
    ) -> tuple[Tensor, int]:
        grad, preact = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((grad, preact), in_dims[:2], strict=True)
        )
        return ops.splitting_weight(grad, preact, activation, beta), 0

    def hvp(
        info: Any, in_dims: Any, x: Tensor, w: Tensor, v: Tensor, *, full_precision: bool = False
    ) -> tuple[Tensor, int]:
        op = partial(ops.splitting_hvp, full_precision=full_precision)
        return _product(info.batch_size, in_dims, x, w, v, 1, op)

    def hvp_conv2d(
        info: Any, in_dims: Any, x: Tensor, w: Tensor, v: Tensor, *sliding: list[int]
    ) -> tuple[Tensor, int]:
        def op(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
            y: Tensor = ops.splitting_hvp_conv2d(x, w, v, *sliding)
            return y

        return _product(info.batch_size, in_dims[:3], x, w, v, 3, op)

    torch.library.register_vmap("growkernels::splitting_weight", weight)
    torch.library.register_vmap("growkernels::splitting_hvp", hvp)
    torch.library.register_vmap("growkernels::splitting_hvp_conv2d", hvp_conv2d)
