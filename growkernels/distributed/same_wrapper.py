"""Initialising a DistributedDataParallel again, in place and with the arguments it was given.

A wrapper knows the parameters that there were when it was built. Training loops, schedulers and
trainers hold the wrapper, so a second one would leave them with the first; here the same object
learns the parameters anew. What it was given is read from its attributes; what cannot be read from
them, or would not outlive the parameters, is refused beforehand (``why_not_again``).
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from growkernels.nn.wrappers import STEPS_IN_BACKWARD, steps_in_backward

# What a module keeps beside its parts: hooks and its mode.
_OF_A_MODULE = [name for name in vars(nn.Module()) if name not in ("_parameters", "_modules")]
_UPCAST = "_AllreduceUpcastHookState"  # of the hook that mixed precision registers itself


def why_not_again(wrapper: DistributedDataParallel) -> str | None:
    """Why a wrapper cannot be initialised again, as a sentence; None: it can."""
    if wrapper._delay_all_reduce_params:
        return "The wrapper delays the reduction of some parameters; build it without that."
    if any(steps_in_backward(parameter) for parameter in wrapper.module.parameters()):
        return STEPS_IN_BACKWARD
    precision = wrapper.mixed_precision
    if precision is not None and precision.buffer_dtype is not None:
        return (
            "The wrapper's mixed precision casts buffers, those that hold indices of grown layers "
            "included; leave buffer_dtype out."
        )
    for hook, state in _own_hooks(wrapper):
        if state is not None and not isinstance(state, distributed.ProcessGroup):
            return (
                f"The communication hook {hook.__qualname__} keeps a {type(state).__name__}, which "
                "may be of the buckets there are now; train without it, or wrap the module anew "
                "after growing and register a hook with a new state."
            )
    named = wrapper._get_ddp_logging_data().get("comm_hook")
    if named and not wrapper._comm_hooks:
        return (
            f"The built-in communication hook {named} is not known to the wrapper itself, so it "
            "cannot be registered again; use that of torch.distributed.algorithms.ddp_comm_hooks."
        )
    return None


def release(wrapper: DistributedDataParallel) -> None:
    """Take what the wrapper has put on its module and parameters off them."""
    wrapper._remove_autograd_hooks()
    for handle in wrapper._accum_grad_hooks:
        handle.remove()
    for module in wrapper.module.modules():  # the copies of mixed precision
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) is wrapper:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def initialise_again(wrapper: DistributedDataParallel) -> None:
    """Let a released wrapper know its module's parameters as they are now.

    All ranks of its group call this together; the first rank's values become all ranks' again.
    """
    arguments = _arguments(wrapper)
    hooks = _own_hooks(wrapper)
    kept = {name: vars(wrapper)[name] for name in _OF_A_MODULE if name in vars(wrapper)}
    syncs = wrapper.require_backward_grad_sync
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of arguments that newer ones replace
        DistributedDataParallel.__init__(wrapper, wrapper.module, **arguments)
    vars(wrapper).update(kept)
    wrapper.require_backward_grad_sync = syncs
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


def _own_hooks(wrapper: DistributedDataParallel) -> list[tuple[Any, object]]:
    return [(h, state) for h, state in wrapper._comm_hooks if type(state).__name__ != _UPCAST]


def _arguments(wrapper: DistributedDataParallel) -> dict[str, Any]:
    sizes = list(getattr(wrapper, "bucket_bytes_cap_list", []))
    cap = None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20
    given = {
        "device_ids": wrapper.device_ids,
        "output_device": wrapper.output_device,
        "dim": wrapper.dim,
        # The name of an older argument, but it does not tell buffers that were never shared.
        "broadcast_buffers": wrapper.broadcast_buffers,
        "process_group": wrapper.process_group,
        "bucket_cap_mb": None if sizes else cap,
        "bucket_cap_mb_list": [size / 2**20 for size in sizes] or None,
        "find_unused_parameters": wrapper.find_unused_parameters,
        "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
        "static_graph": wrapper.static_graph,
        "mixed_precision": wrapper.mixed_precision,
        "skip_all_reduce_unused_params": getattr(wrapper, "skip_all_reduce_unused_params", False),
        "batched_grad_copy": getattr(wrapper, "batched_grad_copy", False),
    }
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {name: value for name, value in given.items() if name in known}
