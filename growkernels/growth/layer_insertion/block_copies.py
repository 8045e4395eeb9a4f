"""A copy of a residual block that is the identity: made, checked, and put into its stack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.layer_insertion.fresh_blocks import initialise
from growkernels.growth.same_function import TOLERANCE
from growkernels.growth.surgery import groups_for_new_layer, insert_child, join_group_of_each
from growkernels.nn.exchange import (
    check_takes_parameters,
    configurations,
    group_of_each,
    places_of,
)
from growkernels.nn.hooks import DriverHook, forget_left_overs, hooks_of
from growkernels.nn.optimizers import ParamGroup
from growkernels.nn.record_fields import SEED, TEXT, WHOLE, list_of, or_none
from growkernels.nn.records import Record, new_record, repeats
from growkernels.nn.tracing import tensors_in
from growkernels.nn.weights import why_computed

BLOCK = "block"


def block_record(
    model: nn.Module, position: str, template: str, zero: Sequence[str], seed: int | None
) -> Record:
    """What `insert_block` is called with, as a record; and whether a configuration counts it."""
    stack, _, child = position.rpartition(".")
    counted = _counting(model, stack, len(model.get_submodule(stack)._modules)) is not None
    place = list(model.get_submodule(stack)._modules).index(child) + 1
    fresh = {} if seed is None else {"seed": seed}
    return new_record(
        BLOCK,
        **fresh,
        position=position,
        template=template,
        zero=list(zero),
        counted_at=place if counted else None,
    )


def config_before(config: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Take out of a configuration of transformers what insertions of blocks added to it.

    A model that has grown says so in its configuration, from which transformers builds all blocks;
    what repeats its records needs the model as it was before.
    """
    for record in reversed(records):
        place = record.get("counted_at") if record["kind"] == BLOCK else None
        if place is not None:
            count = config.num_hidden_layers
            for key, value in _lists(config, count).items():
                setattr(config, key, [*value[:place], *value[place + 1 :]])
            config.num_hidden_layers = count - 1


@repeats(
    BLOCK,
    fields={
        "position": TEXT,
        "template": TEXT,
        "zero": list_of(TEXT),
        "seed": SEED,
        "counted_at": or_none(WHOLE),
    },
)
def repeat_block(model: nn.Module, record: Mapping[str, Any], optimizer: Optimizer | None) -> None:
    """Insert what a record says; not undone on error."""
    place, template, zero = record["position"], record["template"], record["zero"]
    insert_block(model, place, template, zero, optimizer, record.get("seed"))


def identity_copy(
    model: nn.Module, template: str, zero: Sequence[str], seed: int | None = None
) -> nn.Module:
    """A copy of the block at a path with the named parameters at zero; no gradients, no hooks.

    With a ``seed`` its other values are drawn anew.

    What is trained in the block is trained in the copy, and so are the parameters at zero; if none
    is trained in the block, then all are in the copy. A configuration is shared with it.

    Raises:
        ValueError: the block cannot be copied, or drawn anew, or has no parameter of such a name.
    """
    block = model.get_submodule(template)
    if (reason := why_not_copied(model, template)) is not None:
        raise ValueError(f"Block {template!r} cannot be copied: {reason}.")
    shared = {id(config): config for config in configurations(block)}
    try:
        new = copy.deepcopy(block, shared)
    except Exception as error:
        raise ValueError(
            f"Block {template!r} cannot be copied: copy.deepcopy raises {type(error).__name__} "
            f"({error})."
        ) from error
    forget_left_overs(new)
    held = dict(new.named_parameters())
    for name in zero:
        if name not in held:
            raise ValueError(
                f"Block {template!r} has no parameter {name!r} that could be zero; its parameters "
                f"are {', '.join(map(repr, held))}."
            )
    if seed is not None:
        initialise(model, template, new, zero, seed)
    with torch.no_grad():
        for name in zero:
            held[name].zero_()
    frozen = not any(parameter.requires_grad for parameter in held.values())
    for name, parameter in held.items():
        parameter.grad = None
        if frozen or name in zero:
            parameter.requires_grad_(True)
    return new


def why_not_copied(model: nn.Module, template: str) -> str | None:
    """Why a block of a model cannot be copied, as a clause; None: it can."""
    block = model.get_submodule(template)
    places = places_of(model)
    for part in (*block.modules(), *block.parameters()):
        inside = [p for p in places[id(part)] if p == template or p.startswith(f"{template}.")]
        if len(inside) < len(places[id(part)]):
            other = next(path for path in places[id(part)] if path not in inside)
            return (
                f"{inside[0]!r} is also used at {other!r}, and in a copy it would be another one; "
                "untie the weights first"
            )
    for name, module in block.named_modules():
        if (reason := why_computed(module)) is not None:
            return f"of {name!r} {reason}"
        if any(not isinstance(hook, DriverHook) for hook in hooks_of(module)):
            return f"{name or 'it'!r} carries hooks, which a copy would share; remove them first"
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            return f"{name!r} is quantised, and has no weights that could be trained"
    for name, parameter in block.named_parameters():
        if not parameter.is_floating_point():
            return f"its {name} is {parameter.dtype}, and has no gradient"
    return None


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor that a block returns, which is what goes on in the stack."""
    return next(iter(tensors_in(output)), None)


def check_identity(
    new: nn.Module, h: Tensor, run: Callable[[nn.Module, Tensor], Tensor | None]
) -> None:
    """Raise RuntimeError unless run(new, h) is h to 1e-6 of its largest number.

    In eval mode, without gradients; types with less precision are allowed four units in the last
    place.
    """
    modes = [(module, module.training) for module in new.modules()]
    try:
        new.eval()
        with torch.no_grad():
            out = run(new, h.clone())
    finally:
        for module, mode in modes:
            module.training = mode
    if out is None or out.shape != h.shape:
        raise RuntimeError("it does not return what it is given")
    error, largest = float((out.double() - h.double()).abs().max()), float(h.abs().max())
    if not error <= max(TOLERANCE, 4 * torch.finfo(h.dtype).eps) * largest:
        raise RuntimeError(
            f"with these parameters at zero it changes its input by {error:.3g} (largest "
            f"{largest:.3g})"
        )


def insert_block(
    model: nn.Module,
    position: str,
    template: str,
    zero: Sequence[str],
    optimizer: Optimizer | None,
    seed: int | None,
) -> nn.Module:
    """Put an identity copy of the block `template` behind the block at `position`.

    Its parameters join the optimizer's groups of those that they are copies of, without a state.
    Numbers that transformers' models keep per layer (``layer_idx``, ``config.num_hidden_layers``)
    follow. Not undone on error.
    """
    new = identity_copy(model, template, zero, seed)
    old = model.get_submodule(template)
    groups = None if optimizer is None else _groups(model, template, old, new, optimizer)
    stack, _, child = position.rpartition(".")
    parent = model.get_submodule(stack)
    count = len(parent._modules)
    new.train(model.get_submodule(position).training)
    insert_child(parent, child, new)
    _renumber(model, stack, list(parent._modules.values()).index(new), count)
    if optimizer is not None and groups is not None:
        join_group_of_each(model, new, optimizer, groups)
    return new


def _groups(
    model: nn.Module, template: str, old: nn.Module, new: nn.Module, optimizer: Optimizer
) -> dict[int, ParamGroup]:
    """The group of each new parameter: that of the one it is a copy of, or of a near layer."""
    check_takes_parameters(optimizer)
    held = group_of_each(optimizer)
    pairs = list(zip(new.parameters(), old.parameters(), strict=True))
    groups = {id(mine): held[id(theirs)] for mine, theirs in pairs if id(theirs) in held}
    if len(groups) < len(pairs):
        near = groups_for_new_layer(model, template, optimizer)
        for mine, _ in pairs:
            groups.setdefault(id(mine), near[1] if mine.dim() <= 1 else near[0])
    return groups


def why_not_counted(model: nn.Module, stack: str) -> str | None:
    """Why the number of blocks in a stack cannot be changed in a model's configuration, or None."""
    holder = model.get_submodule(stack.rpartition(".")[0])
    counted = vars(holder).get("config") is not None
    if counted and any(getattr(c, "is_encoder_decoder", False) for c in configurations(model)):
        return (
            "the model has an encoder and a decoder, and by which names its configuration keeps "
            "their numbers of layers is not known"
        )
    return None


def _renumber(model: nn.Module, stack: str, place: int, count: int) -> None:
    """Numbers of layers, and of how many there are, in transformers' models."""
    if (reason := why_not_counted(model, stack)) is not None:
        raise ValueError(f"No block is inserted into {stack!r}: {reason}.")
    for index, block in enumerate(model.get_submodule(stack).children()):
        for part in block.modules():
            if isinstance(vars(part).get("layer_idx"), int):
                part.layer_idx = index  # type: ignore[assignment]
    config = _counting(model, stack, count)
    if config is not None:
        for key, value in _lists(config, count).items():
            setattr(config, key, [*value[:place], value[place - 1], *value[place:]])
        config.num_hidden_layers = count + 1


def _counting(model: nn.Module, stack: str, count: int) -> Any:
    """The configuration that says how many blocks a stack of so many has, or None."""
    config = vars(model.get_submodule(stack.rpartition(".")[0])).get("config")
    return config if getattr(config, "num_hidden_layers", None) == count else None


def _lists(config: Any, count: int) -> dict[str, list[Any]]:
    """A configuration's entries that are lists with one entry per layer."""
    return {
        key: value
        for key, value in vars(config).items()
        if key.startswith("layer_") and isinstance(value, list) and len(value) == count
    }
