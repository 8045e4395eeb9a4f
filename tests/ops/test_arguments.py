"""What is no tensor at all is one sentence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.fx

import growkernels as gk

X = torch.ones(2, 3)
IMAGES = torch.ones(1, 2, 3, 3)
CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "one tensor": (
        lambda: gk.virtual_grad_norms(X, [X], "linear_relu"),  # type: ignore[arg-type]
        "virtual_grad_norms: inputs is a Tensor; pass a list of tensors, one for every position",
    ),
    "None in a list": (
        lambda: gk.virtual_grads([X, X], [X, None], "linear_relu"),  # type: ignore[list-item]
        r"virtual_grads: grads\[1\] is a NoneType; pass a torch.Tensor",
    ),
    "array": (
        lambda: gk.splitting_hvp(np.ones((2, 3)), X, X),  # type: ignore[arg-type]
        "splitting_hvp: x is a ndarray; pass a torch.Tensor",
    ),
    "no weights": (
        lambda: gk.splitting_hvp_conv2d(IMAGES, None, IMAGES),  # type: ignore[arg-type]
        "splitting_hvp_conv2d: w is a NoneType; pass a torch.Tensor",
    ),
    "number": (
        lambda: gk.splitting_weight(X, 1.0),  # type: ignore[arg-type]
        "splitting_weight: preact is a float; pass a torch.Tensor",
    ),
    "no coefficients": (
        lambda: gk.basis_conv2d(IMAGES, IMAGES, None),  # type: ignore[arg-type]
        "basis_conv2d: coeff is a NoneType; pass a torch.Tensor",
    ),
    "float8 positions": (
        lambda: gk.virtual_grad_norms([X.to(torch.float8_e5m2)], [X], "residual"),
        "has dtype Float8_e5m2; pass float16, bfloat16, float32 or float64",
    ),
    "float8 samples": (
        lambda: gk.splitting_hvp(X.to(torch.float8_e5m2), X, X),
        "x has dtype Float8_e5m2; pass float16, bfloat16, float32 or float64",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_sentence(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_symbolic_tracing_goes_through() -> None:
    def loss(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        norms = gk.virtual_grad_norms([x], [x], "linear_relu")
        return gk.splitting_hvp(x, w, v).sum() + norms.sum()

    traced = torch.fx.symbolic_trace(loss)
    assert torch.equal(traced(X, X, X.T @ X), loss(X, X, X.T @ X))
