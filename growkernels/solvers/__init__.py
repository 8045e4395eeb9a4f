"""Floor 2: eigensolvers that advance all neurons together on the ops of floor 1."""

from growkernels.solvers.batched_lanczos import smallest_eigenpairs
from growkernels.solvers.splitting_matrices import splitting_eigs

__all__ = ["smallest_eigenpairs", "splitting_eigs"]
