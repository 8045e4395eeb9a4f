"""Floor 2: eigensolvers that advance all neurons together on the ops of floor 1."""

from growkernels.solvers.smallest_eigenpairs import smallest_eigenpairs
from growkernels.solvers.splitting_eigs import splitting_eigs

__all__ = ["smallest_eigenpairs", "splitting_eigs"]
