"""Random calls of the eigensolvers: pairs are judged by their residuals in float64."""

from __future__ import annotations

import random
from typing import Any

import torch
from random_networks import DTYPES, filled
from refusals import one_call
from torch import Tensor

import growkernels as gk
from growkernels.ops.eigen import symmetric_eigs
from growkernels.solvers import smallest_eigenpairs

VALUES = ("normal", "normal", "normal", "tiny", "huge", "subnormal", "nan", "inf", "zeros", "ones")
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 9, 16, 17, 33)
LAYOUTS = ("plain", "transposed", "stepped", "expanded")


def random_matrices(rng: random.Random) -> dict[str, Any]:
    return {
        "dtype": rng.choice((*("float32", "float64") * 5, "bfloat16", "float16")),
        "n": rng.choice(SIZES),
        "d": rng.choice((*SIZES, 98)),
        "rows": rng.choice(SIZES),
        "k": rng.choice((*(None, 1, 1, 2, 3) * 3, 5, 0, -1)),
        "iters": rng.choice((*(None, 60, 7, None) * 3, 0, 1)),
        "tol": rng.choice((*(1e-3, 1e-4, 1e-9) * 5, 0.0, 1.0, "nan")),
        "values": rng.choice(("normal",) * 10 + VALUES),
        "layout": rng.choice(LAYOUTS),
        "select": rng.random() < 0.5,
        "seed": rng.randrange(1 << 31),
    }


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at other strides; `expanded` repeats the first entry."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "stepped" and tensor.dim():
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "expanded" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    return tensor


def _random(words: dict[str, Any], *shape: int, stream: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(words["seed"] + stream)
    tensor = torch.randn(shape, generator=generator)
    if words["values"] == "ones":
        tensor = torch.ones(shape)
    return filled(tensor.to(DTYPES[words["dtype"]]), words["values"])


def check_pairs(
    matrices: Tensor, values: Tensor, vectors: Tensor, allowed: Tensor, dtype: torch.dtype
) -> None:
    """Asserts S v = lambda v within `allowed` [n, k] of |S|, and that vectors are orthonormal."""
    matrices = matrices.double()
    norms = torch.linalg.matrix_norm(matrices, 2) if matrices.numel() else values.new_zeros(0)
    norms = norms.double().reshape(-1, 1)
    usual = (norms[:, 0] < 1e30) & (norms[:, 0] > 1e-25) & norms[:, 0].isfinite()
    wide, theirs = vectors.double()[usual], values.double()[usual]
    images = torch.einsum("nab,nkb->nka", matrices[usual], wide)
    errors = (images - theirs[:, :, None] * wide).norm(dim=2) / norms[usual]
    rounding = 64 * torch.finfo(dtype).eps * max(1, matrices.shape[-1]) ** 0.5
    assert bool((errors <= allowed[usual].double() + rounding).all()), float(errors.max())
    gram = wide @ wide.transpose(1, 2)
    assert bool(((gram - torch.eye(gram.shape[1])).abs() < 32 * rounding).all()), "not orthonormal"
    assert bool((values[:, 1:] >= values[:, :-1])[usual].all()), "not ascending"


def symmetric(words: dict[str, Any]) -> None:
    a = laid_out(_random(words, words["n"], words["d"], words["d"]), words["layout"])
    with one_call():
        values, vectors = symmetric_eigs(a, words["k"])
    k = words["d"] if words["k"] is None else words["k"]
    assert values.shape == (words["n"], k), values.shape
    assert vectors.shape == (words["n"], k, words["d"]), vectors.shape
    assert values.dtype == vectors.dtype == a.dtype
    lower = a.double().tril()
    finite = lower.isfinite().flatten(1).all(1)
    assert bool(values[~finite].isnan().all())
    assert bool(vectors[~finite].isnan().all())
    whole = (lower + lower.tril(-1).transpose(1, 2))[finite]
    if whole.numel():
        check_pairs(whole, values[finite], vectors[finite], torch.zeros(len(whole), k), a.dtype)
        exact = torch.linalg.eigvalsh(whole)[:, :k]
        size = exact.abs().amax(1, keepdim=True) if k else exact
        norm = torch.linalg.matrix_norm(whole, 2).reshape(-1, 1)
        close = (values[finite].double() - exact).abs() <= 1e2 * torch.finfo(a.dtype).eps * norm
        usual = (norm < 1e30) & (norm > 1e-25)
        assert bool((close | ~usual).all()), (values, exact, size)


def smallest(words: dict[str, Any]) -> None:
    k = 1 if words["k"] is None else words["k"]
    a = _random(words, words["n"], words["d"], words["d"]).double()
    dtype = DTYPES[words["dtype"]]
    whole = ((a + a.transpose(1, 2)) / 2).to(dtype)

    def product(matrices: Tensor) -> Any:
        return lambda v: torch.einsum("nab,nkb->nka", matrices, v)

    with one_call():
        values, vectors, residuals = smallest_eigenpairs(
            product(whole),
            words["n"],
            words["d"],
            k,
            iters=words["iters"],
            tol=float(words["tol"]),
            select=(lambda rows: product(whole[rows])) if words["select"] else None,
            dtype=dtype,
        )
    assert values.shape == residuals.shape == (words["n"], k)
    assert vectors.shape == (words["n"], k, words["d"])
    check_pairs(whole, values, vectors, residuals, dtype)


def splitting(words: dict[str, Any]) -> None:
    x = laid_out(_random(words, words["rows"], words["d"]), words["layout"])
    w = laid_out(_random(words, words["rows"], words["n"], stream=1), words["layout"])
    k = 1 if words["k"] is None else words["k"]
    with one_call():
        values, vectors, residuals = gk.splitting_eigs(
            x, w, k=k, iters=words["iters"], tol=float(words["tol"])
        )
    assert values.shape == residuals.shape == (words["n"], k)
    assert vectors.shape == (words["n"], k, words["d"])
    matrices = torch.einsum("mi,ma,mb->iab", w.double(), x.double(), x.double())
    sizes = torch.einsum("mi,ma,mb->iab", *(t.double().abs() for t in (w, x, x))).sum((1, 2))
    norms = matrices.flatten(1).norm(dim=1)
    # Where sums cancel, |S| is smaller than the rounding of what it is made of.
    cancelled = 1e-5 * (sizes / norms.clamp(min=1e-300))[:, None]
    loose = torch.finfo(values.dtype).eps * 1e4 + cancelled
    check_pairs(matrices, values, vectors, residuals + loose, values.dtype)
