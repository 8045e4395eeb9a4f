"""The subspaces, one for each neuron, in which smallest eigenpairs are looked for.

All neurons advance together: one block of k directions each is added at a time, and a full basis
is cut down to the 2 k + 1 directions that matter. Thick restarts that also keep the previous
step's Ritz vectors need hardly more products with S than Lanczos with an unlimited basis, whose
memory and full reorthogonalisation they avoid: Stathopoulos and Saad, "Restarting techniques for
the (Jacobi-)Davidson symmetric eigenvalue methods" (1998).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from growkernels.ops.eigen import (
    SEARCH_SPACE_BLOCKS,
    has_search_space_step,
    search_space_step_,
    symmetric_eigs,
)
from growkernels.solvers.precision import bmm


class RitzPairs(NamedTuple):
    """The best eigenpairs found so far."""

    values: Tensor  # [n, k], ascending
    vectors: Tensor  # [n, k, d], orthonormal
    residuals: Tensor  # [n, k, d], S v - lambda v, in units of SearchSpace.unit


class SearchSpace:
    """Orthonormal bases of n subspaces of R^d and their images under S, [n, 6 k, d] each.

    A direction that depends on the others, as happens once a subspace is invariant under S, stays
    in its place as a column of zeros: it is dead. Dead columns keep all neurons in step.

    Each S is divided by the largest element of its first image, so that squares of large and small
    matrices neither overflow nor vanish. `norms` and residuals are in that unit.
    """

    def __init__(self, start: Tensor) -> None:
        """`start` is [n, k, d], linearly independent."""
        n, self.k, d = start.shape
        columns = SEARCH_SPACE_BLOCKS * self.k
        # The largest |Ritz value| seen of each S.
        self.norms = start.new_zeros(n)
        self.count = 0
        self.unit = start.new_ones(n)
        self._basis = start.new_empty(n, columns, d)
        self._images = start.new_empty(n, columns, d)
        self._projected = torch.zeros(n, columns, columns, dtype=torch.float64, device=start.device)
        self._dead = torch.zeros(n, columns, dtype=torch.bool, device=start.device)
        # The last Ritz vectors' coordinates in the basis, and all of the current ones'.
        self._previous = torch.zeros_like(self._projected[:, : self.k]).contiguous()
        self._coordinates = self._projected
        self._values = self._projected[:, 0]
        self._orthonormalise(start, start.norm(dim=2).amax(1))

    @property
    def full(self) -> bool:
        return self.count + self.k > self._basis.shape[1]

    @property
    def direction(self) -> Tensor:
        """The directions, [n, k, d], whose images are wanted next."""
        return self._basis[:, self.count : self.count + self.k]

    def extend(self, images: Tensor) -> RitzPairs:
        """Takes S applied to `direction` and returns the best eigenpairs of the larger space."""
        if not self.count:
            largest = images.abs().amax((1, 2))
            self.unit = torch.where(largest == 0, 1, largest)
        old, self.count = self.count, self.count + self.k
        images = torch.div(images, self.unit[:, None, None], out=self._images[:, old : self.count])
        rows = bmm(images, self._basis[:, : self.count].mT).double()
        block = rows[:, :, old:]
        self._projected[:, old : self.count, :old] = rows[:, :, :old]
        self._projected[:, old : self.count, old : self.count] = 0.5 * (block + block.mT)
        self._rayleigh_ritz()
        chosen = self._coordinates[:, : self.k]
        basis, image = self._basis[:, : self.count], self._images[:, : self.count]
        vectors = bmm(chosen.to(basis.dtype), basis)
        values = self._values[:, : self.k].to(basis.dtype)
        residuals = bmm(chosen.to(basis.dtype), image).sub_(values[..., None] * vectors)
        return RitzPairs(values * self.unit[:, None], vectors, residuals)

    def add(self, residuals: Tensor) -> None:
        """Makes the residuals the next directions; a full basis is cut down first."""
        if self.full:
            self._restart()
        self._previous = self._coordinates[:, : self.k]
        self._orthonormalise(residuals, self.norms)

    def advance(self, images: Tensor) -> None:
        """`extend`, then `add` of the residuals; in one kernel where there is one."""
        if not has_search_space_step(images.device, self.k):
            self.add(self.extend(images).residuals)
            return
        search_space_step_(
            self._basis,
            self._images,
            self._projected,
            self._previous,
            self._dead,
            self.norms,
            self.unit,
            images,
            self.count,
        )
        self.count += self.k
        if self.full:
            self.count = 2 * self.k + 1

    def keep(self, neurons: Tensor) -> None:
        """Drops all neurons but those of the indices given."""
        remaining = neurons.numel()
        for state in (self._basis, self._images):
            # Only the columns in use are moved, within the memory that is there.
            for column in range(self.count):
                state[:remaining, column] = state[:, column].index_select(0, neurons)
        self._basis, self._images = self._basis[:remaining], self._images[:remaining]
        for name in (
            "norms",
            "unit",
            "_projected",
            "_dead",
            "_previous",
            "_coordinates",
            "_values",
        ):
            setattr(self, name, getattr(self, name).index_select(0, neurons))

    def _rayleigh_ritz(self) -> None:
        projected = self._projected[:, : self.count, : self.count]
        # Above every eigenvalue of the live part (Gershgorin), so that dead columns come last.
        bound = self.count * projected.abs().amax((1, 2))
        above = 2 * bound[:, None] + torch.finfo(torch.float64).tiny
        dead = torch.where(self._dead[:, : self.count], above, 0)
        self._values, self._coordinates = symmetric_eigs(projected + torch.diag_embed(dead))
        live = torch.where(self._values > bound[:, None], 0, self._values.abs())
        self.norms = torch.maximum(self.norms, live.amax(1).to(self.norms.dtype))

    def _restart(self) -> None:
        """Keeps the k + 1 smallest Ritz vectors and what the last ones add to them."""
        k, dtype = self.k, self._basis.dtype
        kept = 2 * k + 1
        # In the basis of the Ritz vectors, where the projection of S is diagonal.
        previous = torch.zeros_like(self._coordinates[:, :k])
        previous[:, :, : self._previous.shape[2]] = self._previous
        previous = bmm(previous, self._coordinates.mT)
        previous[:, :, : k + 1] = 0
        dead_values = self._dead_values()
        previous.masked_fill_(dead_values[:, None], 0)
        dead = _orthonormal_rows(previous, 1e-6)
        transform = torch.cat([self._coordinates[:, : k + 1], bmm(previous, self._coordinates)], 1)
        for state in (self._basis, self._images):
            state[:, :kept] = bmm(transform.to(dtype), state[:, : self.count])
        self._projected[:, :kept, :kept] = 0
        live_values = self._values.masked_fill(dead_values, 0)
        self._projected.diagonal(dim1=1, dim2=2)[:, : k + 1] = live_values[:, : k + 1]
        inner = bmm(previous * live_values[:, None], previous.mT)
        self._projected[:, k + 1 : kept, k + 1 : kept] = inner
        self._dead[:, : k + 1] = dead_values[:, : k + 1]
        self._dead[:, k + 1 : kept] = dead
        self._basis[:, : k + 1].masked_fill_(dead_values[:, : k + 1, None], 0)
        self._images[:, : k + 1].masked_fill_(dead_values[:, : k + 1, None], 0)
        self._coordinates = torch.eye(kept, dtype=torch.float64, device=self._dead.device).expand(
            len(self._dead), kept, kept
        )
        self.count = kept

    def _dead_values(self) -> Tensor:
        """Which of the ascending Ritz values belong to dead columns: the last ones."""
        position = torch.arange(self._values.shape[1], device=self._values.device)
        live = self.count - self._dead[:, : self.count].sum(1, keepdim=True)
        return position >= live

    def _orthonormalise(self, block: Tensor, scale: Tensor) -> None:
        """Writes the block as the next columns; dead is what is rounding beside `scale`."""
        new = slice(self.count, self.count + self.k)
        target = self._basis[:, new]
        target.copy_(block)
        earlier = self._basis[:, : self.count]
        self._dead[:, new] = False
        noise = 16 * torch.finfo(target.dtype).eps * scale
        for _ in range(2):
            if self.count:
                target.sub_(bmm(bmm(target, earlier.mT), earlier))
            self._dead[:, new] |= _orthonormal_rows(target, noise)
            # From now on the rows have unit length.
            noise = torch.full_like(scale, 0.1)
        self._projected[:, new] = 0


def _orthonormal_rows(rows: Tensor, noise: Tensor | float) -> Tensor:
    """Gram-Schmidt in place on [n, k, d]; rows no longer than `noise` become zero.

    Returns which rows did, [n, k].
    """
    dead = torch.empty(rows.shape[:2], dtype=torch.bool, device=rows.device)
    for i in range(rows.shape[1]):
        row = rows[:, i : i + 1]
        for _ in range(2 if i else 0):
            before = rows[:, :i]
            row.sub_(bmm(bmm(row, before.mT), before))
        length = row[:, 0].norm(dim=1)
        dead[:, i] = ~(length > noise)
        row.mul_(torch.where(dead[:, i], 0, 1 / length)[:, None, None])
    return dead
