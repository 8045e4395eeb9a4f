"""What computes eigenpairs, and why: C++ decides."""

from __future__ import annotations

import torch
from torch import Tensor

from growkernels.ops.gpu_support import cuda_obstacle
from growkernels.ops.plan import Example, Plan, from_library, without_data

_ops = torch.ops.growkernels
_BACKENDS = {"cuda": ("cuda",), "portable": ("cpu",), "aten": ()}


def plan_symmetric_eigs(a: Tensor, device: torch.device | None = None) -> Plan:
    """What computes `symmetric_eigs` on a device (that of a, if None).

    The tensor needs no data: see `without_data`. Raises what the op raises for shapes and dtypes.
    """
    device = device or a.device
    chosen = from_library(_ops.symmetric_eigs_plan(a, device))
    if chosen.backend == "cuda" and (reason := cuda_obstacle("eigen", device)):
        return Plan("aten", None, (("cuda", reason),))
    return chosen


def _projections(device: torch.device, dtype: torch.dtype) -> Plan:
    """Of a transformer's neurons on their search spaces."""
    if dtype.itemsize == 2:
        return Plan(None, None, tuple((name, "it takes float32 and float64") for name in _BACKENDS))
    return plan_symmetric_eigs(without_data(1536, 6, 6, dtype=dtype), device)


EXAMPLES = {"symmetric_eigs": Example(_BACKENDS, _projections)}
