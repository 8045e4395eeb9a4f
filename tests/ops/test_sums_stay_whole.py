"""What cannot be added up is refused before anything is added; no pixels make zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import growkernels as gk

SHAPE = (2, 3, 5, 4)
WIDTH = 3


def zeros(layer: str) -> Tensor:
    return torch.zeros(WIDTH, WIDTH, 3, 3) if layer == "conv2d_relu" else torch.zeros(WIDTH, WIDTH)


def position(layer: str, generator: torch.Generator) -> Tensor:
    shape = SHAPE if layer == "conv2d_relu" else (7, WIDTH)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_positions_without_pixels_are_zeros(dtype: torch.dtype) -> None:
    h = [torch.randn(2, 3, 5, 4).to(dtype), torch.randn(2, 3, 0, 4).to(dtype)]
    of_sums = torch.float64 if dtype == torch.float64 else torch.float32
    sums = [torch.zeros(3, 3, 3, 3, dtype=of_sums) for _ in h]
    norms = gk.virtual_grad_norms(h, h, "conv2d_relu", sums)
    assert norms[0] > 0
    assert norms[1] == 0
    assert not sums[1].any()
    torch.testing.assert_close(sums[0], gk.virtual_grads(h[:1], h[:1], "conv2d_relu")[0])


def test_positions_without_pixels_are_differentiable() -> None:
    h = torch.randn(2, 3, 0, 4, requires_grad=True)
    gk.virtual_grad_norms([h], [h.detach()], "conv2d_relu").sum().backward()
    assert h.grad is not None
    assert h.grad.shape == h.shape


Refusal = Callable[[list[Tensor], list[Tensor], list[Tensor], Tensor], dict[str, object]]
SHARED = "share(s)? memory"
REFUSALS: dict[str, tuple[Refusal, str]] = {
    "expanded moments": (
        lambda h, g, sums, moments: {"second_moments": torch.zeros(1).expand(2)},
        "second_moments is an expanded tensor",
    ),
    "inference moments": (
        lambda h, g, sums, moments: {"second_moments": in_inference_mode(2)},
        "second_moments was made in inference mode",
    ),
    "inference sum": (
        lambda h, g, sums, moments: {"accumulate": [sums[0], in_inference_mode(*sums[1].shape)]},
        "buffer 1 was made in inference mode",
    ),
    "sparse moments": (
        lambda h, g, sums, moments: {"second_moments": torch.zeros(2).to_sparse()},
        "second_moments is of layout torch.sparse_coo",
    ),
    "moments that require grad": (
        lambda h, g, sums, moments: {"second_moments": torch.zeros(2, requires_grad=True)},
        "second_moments requires grad",
    ),
    "a sum within an input": (
        lambda h, g, sums, moments: {"accumulate": [within(h[1], sums[0]), sums[1]]},
        SHARED,
    ),
    "a sum within a gradient": (
        lambda h, g, sums, moments: {"accumulate": [sums[0], within(g[0], sums[1])]},
        SHARED,
    ),
    "moments within a sum": (
        lambda h, g, sums, moments: {"second_moments": sums[1].view(-1)[:2]},
        SHARED,
    ),
    "moments within an input": (
        lambda h, g, sums, moments: {"second_moments": h[0].view(-1)[:2]},
        SHARED,
    ),
    "equal sums": (lambda h, g, sums, moments: {"accumulate": [sums[0], sums[0]]}, SHARED),
    "sums that overlap": (
        lambda h, g, sums, moments: {"accumulate": overlapping(sums[0])},
        SHARED,
    ),
}


def in_inference_mode(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(shape)


def within(source: Tensor, like: Tensor) -> Tensor:
    """A buffer of `like`'s shape over the memory of `source`."""
    return source.view(-1)[: like.numel()].view(like.shape)


def overlapping(like: Tensor) -> list[Tensor]:
    memory = torch.zeros(like.numel() + 1)
    return [memory[:-1].view(like.shape), memory[1:].view(like.shape)]


@pytest.mark.parametrize("layer", ["linear_relu", "residual", "conv2d_relu", "linear"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_anything_is_added(name: str, layer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    h = [position(layer, generator) for _ in range(2)]
    sums, moments = [zeros(layer), zeros(layer)], torch.zeros(2)
    change, message = REFUSALS[name]
    g = [tensor.clone() for tensor in h]
    changed = {"accumulate": sums, "second_moments": moments, **change(h, g, sums, moments)}
    buffers = [*sums, *changed["accumulate"], changed["second_moments"]]  # type: ignore[misc]
    before = [b.to_dense().clone() for b in buffers]
    with pytest.raises((ValueError, TypeError), match=message):
        gk.virtual_grad_norms(h, g, layer, **changed)  # type: ignore[arg-type]
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer.to_dense(), old), name


@pytest.mark.parametrize("layer", ["linear_relu", "conv2d_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [3, 40])
def test_nan_lets_the_gradient_through_as_in_torch(
    layer: str, dtype: torch.dtype, width: int
) -> None:
    """Row j of G, of the sample where h[j] is NaN: the gradient meets the other features there."""
    generator = torch.Generator().manual_seed(0)
    shape = (64, width, 8, 8) if layer == "conv2d_relu" else (64, width)
    h = torch.rand(shape, generator=generator).to(dtype)
    g = torch.ones(shape).to(dtype)
    h[0, 1] = torch.nan
    expected = torch.autograd.grad(
        torch.relu(probe := h.clone().requires_grad_()), probe, g
    )[0]  # fmt: skip
    assert (expected == 1).all()
    (gradient,) = gk.virtual_grads([h], [g], layer)
    clean = torch.where(h.isnan(), 0, h)
    (whole,) = gk.virtual_grads([clean.clamp(min=1e-3)], [g], layer)
    others = [i for i in range(width) if i != 1]
    tolerance = {"rtol": 2e-2, "atol": 2e-2 * float(whole.abs().max())}
    torch.testing.assert_close(gradient[1][others], whole[1][others], **tolerance)


@pytest.mark.parametrize("layer", ["linear_relu", "conv2d_relu"])
def test_nan_lets_gradients_through_backwards(layer: str) -> None:
    """Where h is NaN the mask is 1, so dG meets h, and a mask of 0 would leave a 0."""
    h = torch.ones(1, 2, 3, 3) if layer == "conv2d_relu" else torch.ones(1, 2)
    h[0, 0] = torch.inf
    h[0, 1] = torch.nan
    g = torch.ones_like(h).requires_grad_()
    (gradient,) = gk.virtual_grads([h], [g], layer)
    (of_g,) = torch.autograd.grad(gradient[1, 0].sum(), g)
    assert not (of_g[0, 1] == 0).any()
