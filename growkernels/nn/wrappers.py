"""Models that cannot be edited or watched as they are, and wrappers that an edit leaves behind."""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

# Classes that a module has, or its class derives from, when it is distributed in place. Where the
# file that defines them was never imported, no module can have them.
_DISTRIBUTED = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.distributed._composable.replicate", "DDP"),
)
_REMEDY = (
    "Each rank would get new parameters of its own and drift away from the others: grow or convert "
    "the whole model before it is distributed, and distribute it afterwards."
)
_REMEDY_OF_SHARDS = (
    "Each rank would get new parameters of its own and drift away from the others: "
    "gk.distributed.regrow(model, optimizer, records, ...) grows a model that fully_shard has "
    "sharded."
)
STEPS_IN_BACKWARD = (
    "The parameters have optimizers that step in the backward pass, which new parameters would not "
    "have; use an optimizer that steps after it."
)


def check_plain_module(model: object) -> None:
    """Raise TypeError for what is no module, or has a part that is wrapped, sharded, or trained by
    optimizers that step in the backward pass.

    That is DataParallel, DistributedDataParallel, FullyShardedDataParallel, ``fully_shard``,
    ``replicate`` and any DTensor, on the model itself or anywhere inside it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}; pass a torch.nn.Module.")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(
            f"The model is wrapped in {type(model).__name__}: pass model.module (the wrapper may "
            "be called meanwhile), and afterwards wrap the module again, because the old wrapper "
            "does not know the new parameters."
        )
    for name, module in model.named_modules():
        what = f"Module {name!r}" if name else "The model"
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise TypeError(
                f"{what} is wrapped in {type(module).__name__}, which would not know the new "
                "parameters, so ranks would drift apart: put the wrapper's .module in its place, "
                "and wrap it again afterwards."
            )
        if (how := _distributed_by(module)) is not None:
            remedy = _REMEDY_OF_SHARDS if how == "FSDPModule" else _REMEDY
            raise TypeError(f"{what} is distributed by {how}. {remedy}")
        own = {**module._parameters, **module._buffers}
        for key, tensor in own.items():
            path = f"{name}.{key}" if name else key
            if tensor is not None and is_dtensor(tensor):
                raise TypeError(f"{path!r} is a DTensor. {_REMEDY_OF_SHARDS}")
            if steps_in_backward(tensor):
                raise TypeError(STEPS_IN_BACKWARD)


def steps_in_backward(parameter: object) -> bool:
    """Whether torch's `_apply_optimizer_in_backward` gave a parameter an optimizer of its own."""
    return hasattr(parameter, "_in_backward_optimizers")


def check_watchable(model: object, sharded: bool = False) -> None:
    """Raise TypeError where `check_plain_module` does, and for a model with a compiled part.

    Args:
        model: to be watched.
        sharded: whether it may be sharded by ``fully_shard``, under which passes run as ever.
    """
    if not (sharded and isinstance(model, nn.Module) and _is_fully_sharded(model)):
        check_plain_module(model)
    assert isinstance(model, nn.Module)
    for name, module in model.named_modules():
        what = f"Module {name!r}" if name else "The model"
        if "_orig_mod" in module._modules:
            remedy = (
                "pass the plain module (compiled._orig_mod), run the recorded batches with it, and "
                "go on with the compiled one, which compiles anew after growing"
                if not name
                else "put the plain one (its ._orig_mod) in its place, and compile it again after "
                "growing"
            )
            raise TypeError(
                f"{what} is compiled, and hooks do not run in a compiled graph: {remedy}."
            )
        if module._compiled_call_impl is not None:
            raise TypeError(
                f"{what} is compiled in place, by its .compile(), and hooks do not run in a "
                "compiled graph: set its ._compiled_call_impl to None, and call .compile() again "
                "after growing."
            )


def data_parallel_wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    """The DistributedDataParallel wrappers alive whose gradients are those of this model.

    A model does not know what wraps it, so they are looked for among all objects.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    kinds: list[type] = [DistributedDataParallel]
    for kind in kinds:
        kinds += kind.__subclasses__()
    wrappers = [o for o in gc.get_objects() if type(o) in kinds]
    parts = set(model.modules())
    found = []
    for wrapper in wrappers:
        inner = vars(wrapper).get("_modules", {}).get("module")
        if inner is not None and (inner in parts or any(m is model for m in inner.modules())):
            found.append(wrapper)
    return found


def outdate_wrappers(model: nn.Module) -> None:
    """Let the wrappers that do not know a model's parameters any more raise when they are called.

    They would not reduce the gradients of new parameters, so ranks would drift apart.
    """
    for wrapper in data_parallel_wrappers(model):
        if not _knows_its_parameters(wrapper):
            wrapper.register_forward_pre_hook(_refuse_outdated, prepend=True)


def _refuse_outdated(wrapper: nn.Module, _: Any) -> None:
    assert isinstance(wrapper, DistributedDataParallel)
    if not _knows_its_parameters(wrapper):
        raise RuntimeError(
            "The model in this DistributedDataParallel was grown or converted since it was "
            "wrapped, and the wrapper would not reduce the new parameters' gradients: wrap the "
            "module again and use the new wrapper, or grow by gk.distributed.growing, which keeps "
            "this one."
        )
    for key, hook in list(wrapper._forward_pre_hooks.items()):
        if hook is _refuse_outdated:
            del wrapper._forward_pre_hooks[key]


def _knows_its_parameters(wrapper: DistributedDataParallel) -> bool:
    ignored = wrapper.parameters_to_ignore
    now = [id(p) for name, p in wrapper.module.named_parameters() if name not in ignored]
    return now == [id(p) for p in wrapper._module_parameters]


def is_fully_sharded_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this module itself."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def type_of_unit(module: nn.Module) -> type:
    """The type of a module, for one that ``fully_shard`` was applied to what it was before."""
    kind = type(module)
    return kind.__bases__[-1] if is_fully_sharded_unit(module) else kind


def _is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard``, and nothing else, has distributed a model.

    Its parameters are cut along their first axis; any other cut is of tensor parallelism, whose
    layers see parts of features.
    """
    if not is_fully_sharded_unit(model):
        return False
    for module in model.modules():
        if _is_other_wrapper(module):
            return False
        if any(buffer is not None and is_dtensor(buffer) for buffer in module._buffers.values()):
            return False
        for parameter in module._parameters.values():
            if parameter is not None and is_dtensor(parameter):
                kind = getattr(sys.modules["torch.distributed.tensor"], "Shard", None)
                cuts: Any = parameter.placements  # type: ignore[attr-defined]
                if not all(
                    cut.is_replicate() or (type(cut) is kind and cut.dim == 0) for cut in cuts
                ):
                    return False
    return True


def _is_other_wrapper(module: nn.Module) -> bool:
    others = (
        known
        for file, kind in _DISTRIBUTED
        if kind != "FSDPModule"
        if (known := getattr(sys.modules.get(file), kind, None)) is not None
    )
    return isinstance(module, (nn.DataParallel, DistributedDataParallel, *others))


def _along_first_axis(cut: Any) -> bool:
    kind = getattr(sys.modules["torch.distributed.tensor"], "Shard", None)
    return type(cut) is kind and cut.dim == 0


def _distributed_by(module: nn.Module) -> str | None:
    for file, kind in _DISTRIBUTED:
        known = getattr(sys.modules.get(file), kind, None)
        if known is not None and isinstance(module, known):
            return "replicate" if kind == "DDP" else kind
    if getattr(module, "_is_fsdp_managed_module", False):
        return "FullyShardedDataParallel"
    return None


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is distributed over processes."""
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and isinstance(tensor, known)
