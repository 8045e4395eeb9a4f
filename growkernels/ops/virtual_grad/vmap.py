"""torch.func.vmap: a batch of networks is only more positions, so it stays one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _slices(tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> list[Tensor]:
    """All networks' tensors, position by position: index l * size + network."""
    return [
        one
        for tensor, dim in zip(tensors, dims, strict=True)
        for one in ([tensor] * size if dim is None else tensor.unbind(dim))
    ]


def register() -> None:
    ops = torch.ops.growkernels

    def norms(
        info: Any,
        in_dims: Any,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        layer: str,
        activation: str,
        scale: float,
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        hs, gs = _slices(inputs, in_dims[0], size), _slices(grads, in_dims[1], size)
        flat = ops.virtual_grad_norms(hs, gs, layer, activation, scale)
        return flat.reshape(len(inputs), size), 1

    def gradients(
        info: Any,
        in_dims: Any,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        layer: str,
        activation: str,
        scale: float,
    ) -> tuple[list[Tensor], list[int]]:
        size = info.batch_size
        hs, gs = _slices(inputs, in_dims[0], size), _slices(grads, in_dims[1], size)
        flat = ops.virtual_grads(hs, gs, layer, activation, scale)
        stacked = [torch.stack(flat[i : i + size]) for i in range(0, len(flat), size)]
        return stacked, [0] * len(inputs)

    def accumulate(
        info: Any,
        in_dims: Any,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        layer: str,
        activation: str,
        scale: float,
        sums: Sequence[Tensor],
        second_moments: Tensor | None,
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        if any(dim is None for dim in in_dims[5]):
            raise ValueError(
                "virtual_grad_norms: under vmap every buffer in accumulate must be batched too, "
                "or the networks' sums would mix"
            )
        hs, gs = _slices(inputs, in_dims[0], size), _slices(grads, in_dims[1], size)
        buffers = [s.movedim(d, 0) for s, d in zip(sums, in_dims[5], strict=True)]
        moments = None
        if second_moments is not None:
            if in_dims[6] is None:
                raise ValueError(
                    "virtual_grad_norms: under vmap second_moments must be batched too, or the "
                    "networks' moments would mix"
                )
            moments = torch.zeros(
                len(inputs) * size, dtype=second_moments.dtype, device=second_moments.device
            )
        flat = ops.accumulate_virtual_grads(
            hs, gs, layer, activation, scale, [b[i] for b in buffers for i in range(size)], moments
        )
        if second_moments is not None and moments is not None:
            second_moments.movedim(in_dims[6], 0).add_(moments.reshape(-1, size).T)
        return flat.reshape(len(inputs), size), 1

    torch.library.register_vmap("growkernels::virtual_grad_norms", norms)
    torch.library.register_vmap("growkernels::virtual_grads", gradients)
    torch.library.register_vmap("growkernels::accumulate_virtual_grads", accumulate)
