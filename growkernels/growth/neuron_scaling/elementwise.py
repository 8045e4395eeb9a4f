"""The functions that activations are, as far as they are known, with values and slopes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINK = 1e-6  # beside 0, where a derivative that jumps there has its other value

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}
_MODULES = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish, nn.ELU, nn.LeakyReLU),
)


def function_of(
    model: nn.Module, activation: str | None, traced: bool
) -> Callable[[Tensor], Tensor] | None:
    """The activation of a candidate (see Widening.activation), or None where it is not known.

    What was seen to act on single elements in a traced pass may be a module of any type.
    """
    if activation is None:
        return lambda z: z
    if activation.startswith("function "):
        return _FUNCTIONS.get(activation.removeprefix("function "))
    module = model.get_submodule(activation)
    trained = next(module.parameters(), None) is not None
    if trained or not (traced or type(module) in _MODULES):
        return None
    return lambda z: module(z.clone())  # some overwrite their input


def value_and_slope(f: Callable[[Tensor], Tensor], at: float) -> tuple[float, float]:
    """f and its derivative."""
    z = torch.tensor(at, dtype=torch.float64, device="cpu").requires_grad_()
    with torch.enable_grad():
        value = f(z)
        (slope,) = torch.autograd.grad(value, z)
    return float(value.detach()), float(slope)
