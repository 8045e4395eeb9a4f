"""What torch.compile holds of a model that was changed."""

from __future__ import annotations

import sys

from torch import nn


def forget_compiled(model: nn.Module) -> None:
    """Let torch.compile start anew with the forward methods of a model's modules.

    It keeps what it has compiled by the code of a method, eight times (``recompile_limit``), and
    runs the method as it is from then on: compiling again, in a new wrapper too, does nothing after
    the eighth change of a model. What was compiled before the change is of no use any more; other
    models of the same classes compile once more.
    """
    reset = getattr(sys.modules.get("torch._dynamo.eval_frame"), "reset_code", None)
    if reset is None:  # nothing was compiled in this process
        return
    for kind in {type(module) for module in model.modules()}:
        code = getattr(kind.forward, "__code__", None)
        if code is not None:
            reset(code)


def without_compiling_wrapper(model: nn.Module) -> nn.Module:
    """The model that torch.compile has wrapped, whose paths are those its user knows."""
    inner = model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None
    return model if inner is None else inner
