"""Every neuron's smallest eigenvalue: `splitting_eigs` against explicit splitting matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import growkernels as gk
from benchmarks import opponents
from benchmarks.case import OURS, Call, Case, Workload
from benchmarks.models.deit import HIDDEN, TOKENS, WIDTH, DeiT
from benchmarks.table import Table

FAMILY = "splitting_eigs"
KERNELS = ("splitting", "wide_products", "eigen", "solvers")
TABLE = Table(
    name=FAMILY,
    family=FAMILY,
    columns=(
        "case", "shape", "dtype", "growkernels", "peak memory", "opponent", "speed-up",
        "opponent's time", "opponent's memory", "machine",
    ),
)  # fmt: skip

_TOL = 1e-3
_IMAGES = 32
_EXPLICIT = "explicit eigh"
_BATCHED = "explicit batched eigh"
_AUTHORS = "authors' loop"
_OPPONENTS = {
    _EXPLICIT: opponents.explicit_smallest_eigenvalues,
    _BATCHED: opponents.explicit_smallest_eigenvalues_batched,
    _AUTHORS: opponents.authors_smallest_eigenvalues,
}
Data = Callable[[], tuple[Tensor, Tensor]]


def _normal() -> tuple[Tensor, Tensor]:
    """The hardest spectra: nothing sets the smallest eigenvalue apart from its neighbours."""
    generator = torch.Generator().manual_seed(0)
    rows = _IMAGES * TOKENS
    x = torch.randn(rows, WIDTH, generator=generator)
    return x, torch.randn(rows, HIDDEN, generator=generator)


def _deit() -> tuple[Tensor, Tensor]:
    """fc1 in the middle of an untrained DeiT-S that sees normal images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeiT()
        images = torch.randn(_IMAGES, 3, 224, 224)
        labels = torch.randint(1000, (_IMAGES,))
    seen: dict[str, Tensor] = {}

    def keep(gelu: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.update(preact=inputs[0], activation=output)

    fc1, gelu = (model.get_submodule(f"blocks.6.mlp.{i}") for i in (0, 1))
    fc1.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    gelu.register_forward_hook(keep)
    torch.autograd.backward(functional.cross_entropy(model(images), labels))
    grad = seen["activation"].grad
    assert grad is not None
    x, preact, grad = (t.detach().flatten(0, -2) for t in (seen["x"], seen["preact"], grad))
    return x, gk.splitting_weight(grad, preact)


def _build(
    data: Data, neurons: int, opponent: str, dtype: torch.dtype, device: torch.device
) -> Workload:
    x, w = data()
    x, w = x.to(device, dtype), w[:, :neurons].contiguous().to(device, dtype)
    calls: dict[str, Call] = {
        opponent: partial(_OPPONENTS[opponent], x.float(), w.float()),
        OURS: lambda: gk.splitting_eigs(x, w, tol=_TOL)[0][:, 0],
    }
    # Of one product with S: how many a solve takes depends on the data.
    flops = 4.0 * len(x) * neurons * WIDTH
    read = float(x.element_size() * (x.numel() + w.numel()))
    return Workload(calls, flops, read, _TOL)


def _case(
    name: str, data: Data, neurons: int, opponent: str, dtype: torch.dtype = torch.float32
) -> Case:
    suffix = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return Case(
        name=f"{name}, {neurons} neurons{suffix}",
        shape=f"x [{_IMAGES * TOKENS}, {WIDTH}], w [{_IMAGES * TOKENS}, {neurons}]",
        dtype=dtype,
        layout="contiguous",
        direction=f"smallest eigenvalue, tol {_TOL:g}",
        opponents=(opponent,),
        build=partial(_build, data, neurons, opponent, dtype),
    )


# The opponents' time is proportional to the neurons: all 1536 of a layer take a minute and more.
CASES = [
    _case("DeiT-S fc1", _deit, 192, _EXPLICIT),
    _case("normal", _normal, 192, _EXPLICIT),
    _case("DeiT-S fc1", _deit, 48, _AUTHORS),
    _case("normal", _normal, 48, _AUTHORS),
]

# The longest last, which may be too long for the time that is left.
GPU_CASES = [
    _case("normal", _normal, 192, _BATCHED, torch.bfloat16),
    _case("normal", _normal, 192, _BATCHED),
    _case("DeiT-S fc1", _deit, 192, _BATCHED, torch.bfloat16),
    _case("DeiT-S fc1", _deit, HIDDEN, _BATCHED, torch.bfloat16),
]


def bench_splitting_eigs(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
