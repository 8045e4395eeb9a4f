"""Floor 1: the ops. Importing this package loads the compiled op library."""

from growkernels.ops.library import load_library

load_library()

from growkernels.ops.basis_conv import basis_conv2d  # noqa: E402
from growkernels.ops.convolution import conv_algorithm, set_conv_algorithm  # noqa: E402
from growkernels.ops.splitting import (  # noqa: E402
    splitting_hvp,
    splitting_hvp_conv2d,
    splitting_weight,
)
from growkernels.ops.virtual_grad import virtual_grad_norms, virtual_grads  # noqa: E402

__all__ = [
    "basis_conv2d",
    "conv_algorithm",
    "set_conv_algorithm",
    "splitting_hvp",
    "splitting_hvp_conv2d",
    "splitting_weight",
    "virtual_grad_norms",
    "virtual_grads",
]
