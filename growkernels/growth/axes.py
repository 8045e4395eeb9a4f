"""Along which axis the features of a value lie after one of torch's functions.

What is not in these rules ends in a reason, never in a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growkernels.nn.tracing import PARAMETERS, Operation, Value


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


ACTIVATIONS = _names(
    "relu gelu silu tanh sigmoid softplus elu leaky_relu hardswish hardsigmoid hardtanh relu6 mish "
    "selu celu softsign logsigmoid prelu rrelu hardshrink softshrink tanhshrink threshold"
)
DROPOUTS = _names("dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d")
ARITHMETIC = _names(
    "add sub rsub mul div truediv true_divide pow exp log sqrt rsqrt abs neg square erf sin cos "
    "clamp clamp_min clamp_max maximum minimum where lerp addcmul addcdiv masked_fill nan_to_num "
    "round reciprocal erfc log1p expm1 sign floor float_power"
)
COPIES = _names("contiguous to float half bfloat16 double type type_as clone detach data")
NORMS = _names("batch_norm group_norm instance_norm layer_norm rms_norm")
REDUCTIONS = _names("mean sum amax amin max min var std softmax log_softmax logsumexp")
POOLS = _names(
    "max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_max_pool1d adaptive_max_pool2d lp_pool2d boolean_dispatch interpolate upsample "
    "pad"
)
VIEWS = _names("view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as")
PERMUTES = _names("permute transpose swapaxes swapdims t T mT movedim")
CUTS = _names("chunk split split_with_sizes tensor_split unbind")
SHIFTS = _names("roll flip")


@dataclass(frozen=True)
class Outcome:
    """What an operation does with features.

    Attributes:
        kind: see ``Step``.
        axes: of every output, None for one without the features; or None: no output has them.
        joined: the inputs whose features are one space from now on.
        parameters: inputs that are parameters with one entry per feature.
        spread: inputs of one feature each, which is combined with every one of the others.
        reason: why the width of these features cannot be changed, or None.
        reduces: the reason is that it sums over the features.
    """

    kind: str
    axes: tuple[int | None, ...] | None
    joined: tuple[int, ...] = ()
    parameters: tuple[int, ...] = ()
    spread: tuple[int, ...] = ()
    reason: str | None = None
    reduces: bool = False


def after(operation: Operation, places: Mapping[int, int], values: Sequence[Value]) -> Outcome:
    """What becomes of the features of an operation's inputs.

    Args:
        places: input -> the axis of its features, for inputs that have some.
        values: of the trace.
    """
    name = operation.name
    if name in ACTIVATIONS | ARITHMETIC | COPIES | DROPOUTS:
        kinds = {"activation": ACTIVATIONS, "dropout": DROPOUTS, "view": COPIES}
        kind = next((kind for kind, names in kinds.items() if name in names), "arithmetic")
        return _per_element(operation, places, values, kind)
    if name in NORMS:
        return _per_element(operation, places, values, "norm")
    if name in ("cat", "concat", "concatenate", "stack"):
        return _together(operation, places, values)
    given = [number for number in places if number in operation.inputs]
    if len(given) > 1 or given[0] != operation.inputs[0]:
        return _refused(operation)
    number, axis = given[0], places[given[0]]
    shape = values[number].shape
    shapes = [values[output].shape for output in operation.outputs]
    if name in REDUCTIONS:
        return _reduced(operation, number, axis, shape, shapes)
    found: Sequence[int | None] | None = None
    kind = "view"
    if name in POOLS:
        kind = "pool"
        found = [axis if _same_at(axis, shape, out) else None for out in shapes]
        if axis == len(shape) - 1 and name != "pad":
            found = None
    elif name in VIEWS:
        found = [axis_after_view(shape, axis, out) for out in shapes]
    elif name == "expand":
        places_after = [axis - len(shape) + len(out) for out in shapes]
        if all(out[at] == shape[axis] for at, out in zip(places_after, shapes, strict=True)):
            found = places_after
    elif name in PERMUTES:
        found = [_permuted(operation, axis, len(shape))]
    elif name in CUTS:
        cut = _axis_argument(operation, "dim", 2 if name != "unbind" else 1, len(shape), 0)
        if cut != axis:
            found = [axis - int(name == "unbind" and cut is not None and cut < axis)] * len(shapes)
    elif name in SHIFTS:
        shifted = _dims(operation.arguments.get("dims", operation.arguments.get("2")), len(shape))
        if shifted is not None and axis not in shifted:
            found = [axis]
    elif name == "__getitem__":
        index = operation.arguments.get("1")
        found = [_indexed(index, axis, len(shape))]
    elif name == "index_select":
        cut = _axis_argument(operation, "dim", 1, len(shape), 0)
        found = None if cut == axis else [axis]
    if found is None or any(entry is None for entry in found):
        return _refused(operation, shapes[0])
    return Outcome(kind, tuple(found), joined=(number,))


def axis_after_view(shape: Sequence[int], axis: int, new: Sequence[int]) -> int | None:
    """Where an axis is after a view of other sizes; None: it is not an axis of its own there."""
    before = math.prod(shape[:axis])
    for place, size in enumerate(new):
        if size == shape[axis] and math.prod(new[:place]) == before:
            return place
    return None


def _refused(operation: Operation, shape: Sequence[int] | None = None) -> Outcome:
    name = operation.name
    if name in CUTS or name == "__getitem__":
        return Outcome("", None, reason=f"is cut into pieces ({name.strip('_')})")
    if name in VIEWS and shape is not None:
        return Outcome("", None, reason=f"is reshaped to {list(shape)}, which divides its features")
    return Outcome("", None, reason=f"goes into {name}")


def _per_element(
    operation: Operation, places: Mapping[int, int], values: Sequence[Value], kind: str
) -> Outcome:
    """Elements are combined with those at the same place: sizes are aligned from the back."""
    shape = values[operation.outputs[0]].shape
    if kind == "norm":
        if operation.inputs[0] not in places:
            return _refused(operation)
        number = operation.inputs[0]
        parameters = [n for n in operation.inputs[1:] if values[n].source in PARAMETERS]
        return Outcome(kind, (places[number],), (number,), tuple(parameters))
    offsets = {number: places[number] - len(values[number].shape) for number in places}
    wide = [number for number in places if values[number].shape[places[number]] > 1] or list(places)
    if len({offsets[number] for number in wide}) > 1:
        return Outcome("", None, reason=f"is combined by {operation.name} along different axes")
    offset = offsets[wide[0]]
    axis = len(shape) + offset
    size = shape[axis]
    parameters, reason = [], None
    for number in operation.inputs:
        value = values[number]
        if number in places or len(value.shape) < -offset or value.shape[offset] != size:
            continue
        if size == 1:
            continue
        if value.source in PARAMETERS:
            parameters.append(number)
        else:
            what = (
                "the model's input"
                if value.source == "input"
                else ("values of its width that cannot be followed to a layer")
            )
            reason = f"is combined by {operation.name} with {what}"
    return Outcome(
        kind,
        tuple(axis if values[o].shape == shape else None for o in operation.outputs),
        joined=tuple(wide),
        parameters=tuple(parameters),
        spread=tuple(n for n in places if values[n].shape[places[n]] != size),
        reason=reason,
    )


def _together(operation: Operation, places: Mapping[int, int], values: Sequence[Value]) -> Outcome:
    name = operation.name
    found = {places[number] for number in places}
    shape = values[operation.inputs[0]].shape
    dim = _axis_argument(operation, "dim", 1, len(shape) + (name == "stack"), 0)
    if len(found) > 1 or dim is None:
        return _refused(operation)
    axis = found.pop()
    if name == "stack":
        axis += int(dim <= axis)
    elif dim == axis:
        return Outcome("", None, reason=f"is concatenated with other features ({name})")
    others = [number for number in operation.inputs if number not in places]
    parameters = [number for number in others if values[number].source in PARAMETERS]
    reason = None
    if len(parameters) < len(others):
        # An expanded parameter (a class token for each sample) has one entry per feature too.
        reason = f"is joined by {name} to values that cannot be followed to a layer"
    return Outcome("view", (axis,), tuple(places), tuple(parameters), reason=reason)


def _reduced(
    operation: Operation,
    number: int,
    axis: int,
    shape: Sequence[int],
    shapes: Sequence[Sequence[int]],
) -> Outcome:
    arguments = operation.arguments
    dims = _dims(arguments.get("dim", arguments.get("1")), len(shape))
    if dims is None or axis in dims:
        return Outcome(
            "", None, reason=f"is summed over its features ({operation.name})", reduces=True
        )
    gone = 0 if len(shapes[0]) == len(shape) else sum(dim < axis for dim in dims)
    return Outcome("pool", tuple(axis - gone for _ in shapes), joined=(number,))


def _permuted(operation: Operation, axis: int, count: int) -> int | None:
    arguments = operation.arguments
    if operation.name in ("t", "T", "mT"):
        if operation.name != "mT" and count != 2:
            return None
        return {count - 1: count - 2, count - 2: count - 1}.get(axis, axis)
    if operation.name == "permute":
        order = arguments.get("dims")
        if order is None:
            order = [value for key, value in arguments.items() if key != "0"]
        if len(order) == 1 and isinstance(order[0], tuple | list):
            order = order[0]
        dims = _dims(order, count)
        return None if dims is None else dims.index(axis)
    first = _axis_argument(operation, "dim0", 1, count, None)
    second = _axis_argument(operation, "dim1", 2, count, None)
    if operation.name == "movedim" or first is None or second is None:
        return None
    return {first: second, second: first}.get(axis, axis)


def _indexed(index: Any, axis: int, count: int) -> int | None:
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(entry, Value) for entry in entries):
        return None
    named = sum(entry is not None and entry is not Ellipsis for entry in entries)
    place, new = 0, 0
    if Ellipsis not in entries:
        entries.append(Ellipsis)
    for entry in entries:
        if entry is None:
            new += 1
        elif entry is Ellipsis:
            for _ in range(count - named):
                if place == axis:
                    return new
                place, new = place + 1, new + 1
        elif isinstance(entry, slice):
            if place == axis:
                return new if entry in (slice(None), slice(0, None)) else None
            place, new = place + 1, new + 1
        elif isinstance(entry, int) and not isinstance(entry, bool):
            if place == axis:
                return None
            place += 1
        else:
            return None
    return None


def _same_at(axis: int, shape: Sequence[int], new: Sequence[int]) -> bool:
    return len(shape) == len(new) and shape[axis] == new[axis]


def _axis_argument(
    operation: Operation, name: str, position: int, count: int, default: int | None
) -> int | None:
    arguments = operation.arguments
    given = arguments.get(name, arguments.get("axis", arguments.get(str(position), default)))
    return given % count if isinstance(given, int) else None


def _dims(given: Any, count: int) -> list[int] | None:
    if isinstance(given, int):
        given = (given,)
    if not isinstance(given, tuple | list):
        return None
    if not all(isinstance(dim, int) and not isinstance(dim, bool) for dim in given):
        return None
    return [dim % count for dim in given]
