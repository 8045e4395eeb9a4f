"""What every op does inside the rest of torch: autograd, torch.func, torch.compile, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from op_samples import OPS, Op, Sample
from op_samples.contract import over
from op_samples.numbers import LAYOUTS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import growkernels as gk

CHANNELS_LAST = LAYOUTS["channels_last"]
EVERY_OP = pytest.mark.parametrize("op", OPS.values(), ids=str)


def flat(op: Op, function: Callable[..., Any], sample: Sample) -> Callable[..., Any]:
    """The function of the sample's tensors alone, one after the other."""

    def call(*tensors: Tensor) -> Any:
        results = op.results(function, tensors, sample)
        return results[0] if len(results) == 1 else tuple(results)

    return call


def loss_of(op: Op, function: Callable[..., Any], sample: Sample) -> Callable[..., Tensor]:
    def loss(*tensors: Tensor) -> Tensor:
        return torch.stack([y.sin().sum() for y in op.results(function, tensors, sample)]).sum()

    return loss


@pytest.mark.parametrize("key", ["CPU", "Meta", "AutocastCPU", "AutocastCUDA", "Autograd"])
@EVERY_OP
def test_every_layer_has_a_kernel_of_its_own(op: Op, key: str) -> None:
    """Torch's fallbacks would serve, and hide that one is missing."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"growkernels::{op.name}", key)


@EVERY_OP
def test_vmap_has_a_rule_of_its_own(op: Op) -> None:
    batched = "FuncTorchBatched"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"growkernels::{op.name}", batched)


@over("small")
def test_gradients_of_gradients(op: Op, sample: Sample) -> None:
    tensors = [t.requires_grad_() for t in sample.tensors(torch.float64)]
    function = flat(op, op.function, sample)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@over("small")
def test_functional_gradients(op: Op, sample: Sample) -> None:
    """As torch.func has them: of all tensors, for each of several values of one, and twice."""
    tensors = sample.tensors(torch.float64)
    everything = tuple(range(len(tensors)))
    ours, oracle = (loss_of(op, function, sample) for function in (op.function, op.oracle))
    wanted = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(oracle(*wanted), wanted)
    torch.testing.assert_close(torch.func.grad(ours, everything)(*tensors), expected)
    for index in everything:
        stacked = [t[None].mul(torch.tensor([1.0, 0.7]).view(-1, *([1] * t.dim())))
                   if i == index else t for i, t in enumerate(tensors)]  # fmt: skip
        in_dims = tuple(0 if i == index else None for i in everything)
        each, exact = (
            torch.func.vmap(torch.func.grad(loss, everything), in_dims)(*stacked)
            for loss in (ours, oracle)
        )
        torch.testing.assert_close(each, exact)
    last = len(tensors) - 1
    torch.testing.assert_close(
        torch.func.hessian(ours, last)(*tensors), torch.func.hessian(oracle, last)(*tensors)
    )


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@EVERY_OP
def test_opcheck(op: Op, dtype: torch.dtype, requires_grad: bool) -> None:
    tolerances = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    registered = getattr(torch.ops.growkernels, op.name).default
    for sample in {str(sample): sample for sample in (*op.small[:2], op.small[-1])}.values():
        tensors = [CHANNELS_LAST(t).requires_grad_(requires_grad) for t in sample.tensors(dtype)]
        arguments = op.registered(tensors, sample.arguments)
        torch.library.opcheck(registered, arguments, **tolerances)


def vmapped_dimensions(count: int) -> list[tuple[int | None, ...]]:
    """Every tensor has a dimension more, or one alone, or the first and third; at both ends."""
    alone = [tuple(0 if i == j else None for i in range(count)) for j in range(count)]
    return [
        (0,) * count,
        (-1,) * count,
        tuple(i % 2 for i in range(count)),
        *alone,
        tuple(0 if i in (0, 2) else None for i in range(count)),
    ]


@over("small")
def test_vmap(op: Op, sample: Sample) -> None:
    members = [sample.tensors(torch.float64, seed=seed) for seed in range(3)]
    function = flat(op, op.function, sample)
    for in_dims in vmapped_dimensions(len(sample.shapes)):
        batched = [
            members[0][i] if dim is None else torch.stack([m[i] for m in members], dim)
            for i, dim in enumerate(in_dims)
        ]
        actual = torch.func.vmap(function, in_dims=in_dims)(*batched)
        for index, member in enumerate(members):
            own = [members[0][i] if dim is None else member[i] for i, dim in enumerate(in_dims)]
            expected = function(*own)
            if isinstance(actual, tuple):
                assert isinstance(expected, tuple)
                torch.testing.assert_close(tuple(y[index] for y in actual), expected)
            else:
                torch.testing.assert_close(actual[index], expected)


def resized() -> list[Any]:
    return [
        pytest.param(op, number, id=f"{op} {op.resized(4)[number]}")
        for op in OPS.values()
        for number in range(len(op.resized(4)))
    ]


@pytest.mark.parametrize(("op", "number"), resized())
def test_compile_without_breaks_and_with_dynamic_shapes(op: Op, number: int) -> None:
    """Between other operations, results and gradients."""

    function, arguments = op.function, dict(op.resized(4)[number].arguments)
    half = len(op.resized(4)[number].shapes) // 2 if op.takes_lists else 0

    def program(*tensors: Tensor) -> Any:
        first, *rest = tensors
        given: list[Any] = [first + 1, *rest]
        if half:
            given = [given[:half], given[half:]]
        results = function(*given, **arguments)
        return [y * 2 for y in ([results] if isinstance(results, Tensor) else results)]

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    for size in (4, 9):
        found = []
        for run in (program, compiled):
            tensors = op.resized(size)[number].tensors(torch.float32)
            leaves = [t.requires_grad_() for t in tensors]
            results = run(*leaves)
            gradients = torch.autograd.grad([y.sin().sum() for y in results], leaves)
            found.append([*results, *gradients])
        for eager, mine in zip(*found, strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("op", "number"), resized())
def test_export(op: Op, number: int) -> None:
    """With every size free that differs between two samples."""
    before, after = (op.resized(size)[number] for size in (4, 9))

    class Program(torch.nn.Module):
        def forward(self, tensors: list[Tensor]) -> Any:
            return op.results(op.function, tensors, before)

    free = [
        {d: torch.export.Dim.AUTO for d, size in enumerate(shape) if size != other[d]}
        for shape, other in zip(before.shapes, after.shapes, strict=True)
    ]
    exported = torch.export.export(
        Program(), (before.tensors(torch.float32),), dynamic_shapes=(free,)
    )
    tensors = after.tensors(torch.float32)
    torch.testing.assert_close(exported.module()(tensors), Program()(tensors))


@over("few")
def test_autocast_takes_what_a_product_would(op: Op, sample: Sample) -> None:
    """Even where some of the tensors have the lower dtype already."""
    tensors = sample.tensors(torch.float32)
    tensors[1::2] = [t.bfloat16() for t in tensors[1::2]]
    dtype = torch.float32 if op.promotes else torch.bfloat16
    expected = op.with_gradients(op.function, [t.to(dtype) for t in tensors], sample)

    def in_autocast(*arguments: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op.function(*arguments, **options)

    actual = op.with_gradients(in_autocast, tensors, sample)
    results = len(actual) - len(tensors)
    for mine, exact in zip(actual[:results], expected[:results], strict=True):
        assert mine.dtype == exact.dtype
        assert torch.equal(mine, exact)
    for tensor, mine, exact in zip(tensors, actual[results:], expected[results:], strict=True):
        assert mine.dtype == tensor.dtype
        assert torch.equal(mine, exact.to(tensor.dtype))


@EVERY_OP
def test_flops_are_counted(op: Op) -> None:
    for sample, forward, backward in op.flops:
        tensors = [t.requires_grad_() for t in sample.tensors(torch.float32)]
        with FlopCounterMode(display=False) as counter:
            results = op.results(op.function, tensors, sample)
        assert counter.get_total_flops() == forward
        if backward:
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad([y.sum() for y in results], tensors)
            assert counter.get_total_flops() == backward


def test_symbolic_tracing_goes_through() -> None:
    """Its stand-ins for tensors are none."""

    def loss(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        norms = gk.virtual_grad_norms([x], [x], "linear_relu")
        return gk.splitting_hvp(x, w, v).sum() + norms.sum()

    traced = torch.fx.symbolic_trace(loss)
    x = torch.ones(2, 3)
    assert torch.equal(traced(x, x, x.T @ x), loss(x, x, x.T @ x))
