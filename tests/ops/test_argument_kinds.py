"""Arguments of a wrong kind: one sentence each, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import growkernels as gk

X = torch.ones(4, 3)
W = torch.ones(4, 2)
V = torch.ones(2, 3)
IMAGES = torch.ones(1, 2, 5, 5)
FILTERS = torch.ones(3, 2, 3, 3)
HUGE = 2**63 - 1
NOT_TENSORS = (1, "x", [1.0], 2.5)

CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "eigs without samples": (
        lambda: gk.splitting_eigs(None, W),  # type: ignore[arg-type]
        "splitting_eigs: x is a NoneType; pass a torch.Tensor",
    ),
    "k": (
        lambda: gk.splitting_eigs(X, W, k="1"),  # type: ignore[arg-type]
        "splitting_eigs: k is '1'; pass an integer",
    ),
    "iters": (
        lambda: gk.splitting_eigs(X, W, iters=1.5),  # type: ignore[arg-type]
        "splitting_eigs: iters is 1.5; pass an integer",
    ),
    "tol": (
        lambda: gk.splitting_eigs(X, W, tol=None),  # type: ignore[arg-type]
        "splitting_eigs: tol is None; pass a number",
    ),
    "n": (
        lambda: gk.solvers.smallest_eigenpairs(lambda v: v, 2.0, 3),  # type: ignore[arg-type]
        "smallest_eigenpairs: n is 2.0; pass an integer",
    ),
    "layer": (
        lambda: gk.virtual_grads([X], [X], 3),  # type: ignore[arg-type]
        "virtual_grads: layer is 3; pass a string",
    ),
    "activation": (
        lambda: gk.virtual_grad_norms([X], [X], "residual", activation=None),  # type: ignore[arg-type]
        "virtual_grad_norms: activation is None; pass a string",
    ),
    "scale": (
        lambda: gk.virtual_grad_norms([X], [X], "residual", scale="2"),  # type: ignore[arg-type]
        "virtual_grad_norms: scale is '2'; pass a number",
    ),
    "activation of a weight": (
        lambda: gk.splitting_weight(X, X, torch.tanh),  # type: ignore[arg-type]
        "splitting_weight: activation is .*; pass a string",
    ),
    "beta": (
        lambda: gk.splitting_weight(X, X, "relu", beta="3"),  # type: ignore[arg-type]
        "splitting_weight: beta is '3'; pass a number",
    ),
    "sparse": (
        lambda: gk.splitting_hvp(X.to_sparse(), W, V),
        "splitting_hvp: x is of layout torch.sparse_coo; pass a dense tensor",
    ),
    "compressed": (
        lambda: gk.splitting_weight(X, X.to_sparse_csr()),
        "splitting_weight: preact is of layout torch.sparse_csr; pass a dense tensor",
    ),
    "oneDNN's": (
        lambda: gk.basis_conv2d(IMAGES.to_mkldnn(), FILTERS, torch.ones(1, 3)),
        "basis_conv2d: x is of layout torch._mkldnn; pass a dense tensor",
    ),
    "nested": (
        lambda: gk.splitting_hvp(torch.nested.nested_tensor([X, X]), W, V),
        "splitting_hvp: x is nested; pass a dense tensor",
    ),
    "sparse in a list": (
        lambda: gk.virtual_grads([X, X.to_sparse()], [X, X], "residual"),
        r"virtual_grads: inputs\[1\] is of layout torch.sparse_coo; pass a dense tensor",
    ),
    "sparse bias": (
        lambda: gk.basis_conv2d(IMAGES, FILTERS, torch.ones(1, 3), torch.ones(4).to_sparse()),
        "basis_conv2d: bias is of layout torch.sparse_coo; pass a dense tensor",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of layouts that are in beta
@pytest.mark.parametrize("name", CALLS)
def test_one_sentence(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(TypeError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", NOT_TENSORS)
def test_no_tensors(value: object) -> None:
    for call in (
        lambda: gk.basis_conv2d(IMAGES, FILTERS, torch.ones(1, 3), value),  # type: ignore[arg-type]
        lambda: gk.virtual_grads([X], [X], "residual", out=value),  # type: ignore[arg-type]
        lambda: gk.virtual_grads([X], [X], "residual", out=[value]),  # type: ignore[list-item]
        lambda: gk.virtual_grad_norms([X], [X], "residual", value),  # type: ignore[arg-type]
        lambda: gk.virtual_grad_norms(
            [X], [X], "residual", [torch.zeros(3, 3)], second_moments=value  # type: ignore[arg-type]
        ),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"pass a (list of tensors|torch.Tensor)") as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("parameter", ["stride", "padding", "dilation"])
def test_distances_that_overflow(parameter: str) -> None:
    distance = {parameter: HUGE}
    with pytest.raises(ValueError, match=r"2147483647"):
        gk.splitting_hvp_conv2d(IMAGES, torch.ones(1, 3, 3, 3), FILTERS, **distance)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2147483647"):
        gk.basis_conv2d(IMAGES, FILTERS, torch.ones(1, 3), **distance)  # type: ignore[arg-type]


def test_sizes_that_overflow() -> None:
    wide = torch.ones(1, 2, 1, 1).expand(1, 2, 3, 2**33)
    with pytest.raises(ValueError, match="at most 2147483647"):
        gk.splitting_hvp_conv2d(wide, torch.ones(1, 3, 1, 1), FILTERS)
    with pytest.raises(ValueError, match="at most 2147483647"):
        gk.basis_conv2d(wide, FILTERS, torch.ones(1, 3))
