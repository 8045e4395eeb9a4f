"""Smallest eigenpairs of many symmetric matrices that are known only by their products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from growkernels.ops.arguments import check_integers, check_numbers
from growkernels.solvers.precision import without_autocast
from growkernels.solvers.search_space import SearchSpace

# S applied to vectors [n, k, d], one matrix for each of the n neurons.
Matvec = Callable[[Tensor], Tensor]
# The same for the neurons of these indices alone.
Select = Callable[[Tensor], Matvec]

# Not a seed that data is drawn from: a start among the rows of x would see nothing but their span.
_SEED = 6_283_185_307
ITERS_ON_CPU = 200
ITERS_ELSEWHERE = 64
# No neuron is believed to have converged before.
_FIRST_TEST = 6
# Of tol: how small a residual has to be before the CPU lets a neuron go. At tol itself a
# neighbour's pair may have converged while the smallest one is still hidden in the residual; the
# few further products bring it out, at less cost than a second vector beside each would.
_BEYOND = 0.1
# Neurons that have converged leave the batch once they are this part of it: repacking what belongs
# to the others costs about a twentieth of a product with S.
_PACKED_SHARE = 1 / 16


class Solution(NamedTuple):
    """What a solve ends with, converged or not."""

    values: Tensor  # [n, k]
    vectors: Tensor  # [n, k, d]
    residuals: Tensor  # [n, k], relative to the largest |Ritz value| seen


def smallest_eigenpairs(
    matvec: Matvec,
    n: int,
    d: int,
    k: int = 1,
    *,
    iters: int | None = None,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
    select: Select | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k smallest eigenpairs of n symmetric d x d matrices S_i, all n advancing together.

    Block Lanczos with thick restarts and full reorthogonalisation of the basis, which holds 6 k
    directions: 12 k n d numbers of memory, however many steps it takes.

    Args:
        matvec: takes v [n, k, d] and returns [n, k, d], S_i v[i, j]; for instance a sum of
            `growkernels.splitting_hvp` over batches, with `full_precision=True`, or
            `growkernels.splitting_hvp_conv2d`.
        n, d, k: matrices, their size, and eigenpairs wanted of each; k at most d.
        iters: the most calls of `matvec`; 200 on the CPU, where the solver stops as soon as all
            neurons have converged. Elsewhere exactly so many steps are taken, 64 unless given:
            convergence is never read back to the host.
        tol: a neuron has converged when |S v - lambda v| <= tol * |S| for all k pairs. |S| is the
            largest |Ritz value| seen, which never exceeds it, so the test errs on the safe side.
        generator: for the start vectors, normally distributed; on `device`. None means a fixed
            seed. The same seed gives the same bits on the same machine.
        select: given the indices of neurons, a matvec for those alone. With it, on the CPU,
            neurons that have converged cost nothing further.
        device, dtype: of the vectors; float32 or float64. Autocast is off while they are computed,
            in `matvec` as well.

    Returns:
        values [n, k] ascending; vectors [n, k, d], orthonormal, of either sign; and residuals
        [n, k], |S v - lambda v| / |S| as the iteration knows them, zero where S is zero.
        Eigenvalues of multiplicity up to k are found as often as they occur.

    As with every Krylov method, a neuron whose start has next to nothing of the right eigenvector
    may settle for a neighbouring eigenpair. On the CPU neurons are therefore taken on to tol / 10
    where the dtype resolves that, and of 105,000 simulated matrices of 128 features 3 did at
    tol=1e-4, 27 at 1e-3 (docs/limits.md). A smaller tol or k=2 makes that rarer still.

    Not differentiable. A RuntimeWarning tells how many neurons have not converged. Raises
    ValueError for sizes that make no sense, and on the CPU when a product is not finite; elsewhere
    such neurons return NaN.
    """
    name = "smallest_eigenpairs"
    check_request(name, n, d, k, iters, tol)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: dtype is {dtype}; use torch.float32 or torch.float64")
    device = torch.device(device)
    with torch.no_grad(), without_autocast(device):
        start = random_start(n, k, d, generator, device, dtype)
        solution = solve(name, start, matvec, select, iters=iters, tol=tol)
    warn_unless_converged(name, solution.residuals, iters, tol)
    values, vectors, residuals = solution
    return values, vectors, residuals


def solve(
    name: str,
    start: Tensor,
    matvec: Matvec,
    select: Select | None,
    *,
    iters: int | None,
    tol: float,
    adaptive: bool | None = None,
) -> Solution:
    """The loop of `smallest_eigenpairs`, from `start` [n, k, d].

    `adaptive` looks at convergence, to retire neurons and to stop, as the CPU does; without it the
    host reads nothing, so the loop can be captured in a CUDA graph.
    """
    n, k, _ = start.shape
    if adaptive is None:
        adaptive = start.device.type == "cpu"
    steps = iters if iters is not None else ITERS_ON_CPU if adaptive else ITERS_ELSEWHERE
    space = SearchSpace(start)
    if not adaptive:
        for _ in range(steps - 1):
            space.advance(matvec(space.direction))
        values, vectors, residuals = space.extend(matvec(space.direction))
        return Solution(values, vectors, _relative(residuals, space.norms))
    enough = min(tol, max(_BEYOND * tol, attainable(start.dtype)))
    found = Solution(start.new_empty(n, k), torch.empty_like(start), start.new_empty(n, k))
    active = torch.arange(n, device=start.device)
    for step in range(1, steps + 1):
        pairs = space.extend(matvec(space.direction))
        values, vectors, residuals = pairs
        check_finite(name, values, active)
        residuals = _relative(residuals, space.norms)
        best = Solution(values, vectors, residuals)
        converged = (residuals <= enough).all(1)
        count = int(converged.sum()) if step >= _FIRST_TEST else 0
        if step == steps or count == len(active):
            # Whoever is left comes back as it is.
            _store(found, active, best)
            break
        if select is not None and count >= _PACKED_SHARE * len(active):
            done, rest = converged.nonzero()[:, 0], (~converged).nonzero()[:, 0]
            _store(found, active[done], Solution(*(part[done] for part in best)))
            space.keep(rest)
            active = active[rest]
            matvec = select(active)
            space.add(pairs.residuals[rest])
        else:
            space.add(pairs.residuals)
    return found


def random_start(
    n: int,
    k: int,
    d: int,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Normally distributed vectors [n, k, d]; from a fixed seed without a generator."""
    if generator is None:
        generator = torch.Generator(device).manual_seed(_SEED)
    return torch.randn(n, k, d, generator=generator, device=device, dtype=dtype)


def check_request(name: str, n: int, d: int, k: int, iters: int | None, tol: float) -> None:
    """Raises one sentence for sizes and limits that make no sense: ValueError, or TypeError."""
    check_integers(name, n=n, d=d, k=k)
    check_integers(name, **({} if iters is None else {"iters": iters}))
    check_numbers(name, tol=tol)
    if n < 0 or d < 0:
        raise ValueError(f"{name}: got n={n}, d={d}; sizes cannot be negative")
    if k < 1:
        raise ValueError(f"{name}: got k={k}; ask for at least one eigenpair")
    if k > d:
        raise ValueError(f"{name}: got k={k}, but S is {d} x {d}; ask for at most {d} eigenpairs")
    if iters is not None and iters < 1:
        raise ValueError(f"{name}: got iters={iters}; allow at least one step")
    if not 0 < tol < 1:
        raise ValueError(f"{name}: got tol={tol}; it is relative to |S|, between 0 and 1")


def warn_unless_converged(name: str, residuals: Tensor, iters: int | None, tol: float) -> None:
    """Warns of residuals above `tol`, with the numbers; the one look at them from the host.

    None is taken while a CUDA graph is captured: whoever replays it has the residuals.
    """
    if residuals.numel() == 0 or _captured(residuals):
        return
    # A residual that is NaN has not converged either.
    missed = ~(residuals <= tol).all(1)
    count = int(missed.sum())
    if not count:
        return
    worst = float(residuals.max())
    steps = iters or (ITERS_ON_CPU if residuals.device.type == "cpu" else ITERS_ELSEWHERE)
    least = attainable(residuals.dtype)
    remedy = (
        f"pass a larger tol, as {residuals.dtype} resolves no less than about {least:.0e}"
        if tol < least
        else "raise iters or tol"
    )
    warnings.warn(
        f"{name}: {count} of {len(residuals)} neurons have not converged to tol={tol:g} within "
        f"{steps} steps, the worst residual is {worst:.1e}; {remedy}",
        RuntimeWarning,
        stacklevel=3,
    )


def attainable(dtype: torch.dtype) -> float:
    """The relative residual below which rounding leaves little to gain."""
    return 16 * torch.finfo(dtype).eps


def _captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _relative(residuals: Tensor, norms: Tensor) -> Tensor:
    """Lengths of the residuals [n, k, d] beside |S|, [n, k]; 0 / 0 is 0."""
    lengths = residuals.norm(dim=2)
    return torch.where(lengths == 0, 0, lengths / norms[:, None])


def _store(found: Solution, neurons: Tensor, part: Solution) -> None:
    for target, source in zip(found, part, strict=True):
        target[neurons] = source


def check_finite(name: str, values: Tensor, active: Tensor) -> None:
    if math.isfinite(float(values.sum())):
        return
    bad = ~values.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"{name}: the product of S with a vector is not finite for {int(bad.sum())} of "
            f"{len(active)} neurons, the first of them neuron {int(active[bad][0])}; look for NaN, "
            f"infinity or overflow in what S is made of"
        )
