"""torch.func.vmap: a batch of images joins N; batches of filters, or of sums, are a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Dim = int | None


def _folded(tensor: Tensor, dim: Dim, size: int) -> Tensor:
    """[size * N, ...], a view where the strides allow it."""
    if dim is None:
        return tensor.repeat(size, *[1] * (tensor.dim() - 1))
    return tensor.movedim(dim, 0).flatten(0, 1)


def _unfolded(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def _one(argument: Any, dim: Dim, index: int) -> Any:
    return (
        argument.select(dim, index)
        if isinstance(argument, Tensor) and dim is not None
        else argument
    )


def _loop(
    op: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> Any:
    """`op` for each member of the batch; a tuple of stacked results, None where op returns None."""
    results = []
    for index in range(size):
        result = op(*(_one(a, d, index) for a, d in zip(arguments, in_dims, strict=True)))
        results.append(result if isinstance(result, tuple) else (result,))
    return tuple(
        None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True)
    )


def register() -> None:
    ops = torch.ops.growkernels

    def forward(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[1:4]):
            return _loop(ops.basis_conv2d, size, in_dims, arguments)[0], 0
        y = ops.basis_conv2d(_folded(arguments[0], in_dims[0], size), *arguments[1:])
        return _unfolded(y, size), 0

    def with_maps(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[1:4]):
            return _loop(ops.basis_conv2d_with_maps, size, in_dims, arguments), (0, 0)
        results = ops.basis_conv2d_with_maps(
            _folded(arguments[0], in_dims[0], size), *arguments[1:]
        )
        return tuple(_unfolded(result, size) for result in results), (0, 0)

    def backward(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        grad, x, basis, coeff, z, *rest = arguments
        mask = rest[-1]
        batched_parameters = any(in_dims[i] is not None for i in (2, 3, 5))
        if batched_parameters or any(mask[1:]):
            # Every member of the batch has sums of its own: per-sample gradients.
            results = _loop(ops.basis_conv2d_backward, size, in_dims, arguments)
        else:
            folded = [_folded(t, in_dims[i], size) for i, t in ((0, grad), (1, x), (4, z))]
            dx, *others = ops.basis_conv2d_backward(
                folded[0], folded[1], basis, coeff, folded[2], *rest
            )
            results = (None if dx is None else _unfolded(dx, size), *others)
        return results, tuple(None if result is None else 0 for result in results)

    torch.library.register_vmap("growkernels::basis_conv2d", forward)
    torch.library.register_vmap("growkernels::basis_conv2d_with_maps", with_maps)
    torch.library.register_vmap("growkernels::basis_conv2d_backward", backward)
