"""What computes virtual gradients, and why: C++ decides, one position at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from growkernels.ops.gpu_support import cuda_obstacle
from growkernels.ops.plan import Example, Plan, from_library, without_data

_ops = torch.ops.growkernels


def plan_position(
    h: Tensor, layer: str, device: torch.device | None = None, outputs: int | None = None
) -> Plan:
    """What computes the gradient at a position of input h, on a device (that of h, if None).

    The gradient there has ``outputs`` features, as many as h if None. h needs no data: see
    `without_data`. The norms are computed as the gradients are. Raises what the ops raise for
    layers and shapes that they do not take.
    """
    device = device or h.device
    if device.type == "cuda" and (reason := cuda_obstacle("virtual_grad", device)):
        return Plan("aten", None, (("cuda", reason),))
    return from_library(_ops.virtual_grad_plan(h, layer, device, outputs))


def _transformer_layer(device: torch.device, dtype: torch.dtype) -> Plan:
    return plan_position(without_data(6304, 384, dtype=dtype), "residual", device)


def _zero_layer(device: torch.device, dtype: torch.dtype) -> Plan:
    return plan_position(without_data(6304, 384, dtype=dtype), "linear", device, 1536)


def _residual_layer(device: torch.device, dtype: torch.dtype) -> Plan:
    return plan_position(without_data(128, 64, 32, 32, dtype=dtype), "conv2d_relu", device)


_BACKENDS = {
    "cuda": ("cuda",),
    "bfloat16 tiles": ("cpu",),
    "vendor's product": ("cpu",),
    "portable": ("cpu",),
    "aten": (),
}
_LINEAR = Example(_BACKENDS, _transformer_layer)
_ZERO = Example(_BACKENDS, _zero_layer)
_CONVOLUTION = Example({"cuda": ("cuda",), "winograd": ("cpu",), "aten": ()}, _residual_layer)
EXAMPLES = {
    "virtual_grad_norms": _LINEAR,
    "virtual_grads": _LINEAR,
    "virtual_grad_norms[linear]": _ZERO,
    "virtual_grads[linear]": _ZERO,
    "virtual_grad_norms[conv2d_relu]": _CONVOLUTION,
    "virtual_grads[conv2d_relu]": _CONVOLUTION,
}
