"""growkernels: fast ops and drivers for neural networks that grow while they train."""

from growkernels import ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]
