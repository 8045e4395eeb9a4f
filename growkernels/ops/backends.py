"""Which backend every op uses for a device and dtype, and why not the others.

Nothing is decided here: the families' plans, by which the ops are dispatched, are asked about calls
of the size that decides about speed.
"""

from __future__ import annotations

import torch

from growkernels.ops.basis_conv import plan as basis_conv
from growkernels.ops.eigen import plan as eigen
from growkernels.ops.gpu_support import no_gpu
from growkernels.ops.plan import Plan
from growkernels.ops.splitting import plan as splitting
from growkernels.ops.virtual_grad import plan as virtual_grad

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Every op, kinds of calls that fare otherwise apart.
EXAMPLES = {
    **virtual_grad.EXAMPLES,
    **basis_conv.EXAMPLES,
    **splitting.EXAMPLES,
    **eigen.EXAMPLES,
}


def choose_backend(op: str, device: torch.device | str, dtype: torch.dtype) -> Plan:
    """The backend that `op` uses for tensors of `dtype` on `device`, and why not those before it.

    Raises ValueError for an op that is not in the table, TypeError for a dtype no op takes.
    """
    if op not in EXAMPLES:
        raise ValueError(f"{op!r} is not an op of growkernels; choose from {', '.join(EXAMPLES)}")
    if dtype not in DTYPES:
        raise TypeError(f"{op} takes {', '.join(map(_name, DTYPES))}, not {_name(dtype)}")
    device = torch.device(device)
    example = EXAMPLES[op]
    reasons = {
        name: f"the tensors are on {device.type}"
        for name, devices in example.backends.items()
        if devices and device.type not in devices
    }
    if device.type == "cuda" and (reason := no_gpu()):
        everywhere = dict.fromkeys(example.backends, reason)
        return Plan(None, None, tuple({**everywhere, **reasons}.items()))
    chosen = example.plan(device, dtype)
    reasons |= chosen.refused
    names = list(example.backends)
    before = names[: names.index(chosen.backend)] if chosen.backend in names else names
    refused = tuple((name, reasons[name]) for name in before if name in reasons)
    return Plan(chosen.backend, chosen.parameters, refused)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
