"""Candidate positions that one traced pass on a sample shows, and why there are no others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from growkernels.growth.layer_insertion.block_positions import find_block_positions
from growkernels.growth.layer_insertion.positions import (
    KIND_BEHIND_RELU,
    Position,
    find_positions,
)
from growkernels.growth.layouts import runs_as
from growkernels.growth.traced_graph import TracedGraph, traced
from growkernels.nn.grown_layers import ENDING_IN_RELU
from growkernels.nn.tracing import Operation


def traced_positions(
    model: nn.Module,
    sample: Any,
    kinds: Collection[str] | None = None,
    zero: Sequence[str] | None = None,
    seed: int | None = None,
    graph: TracedGraph | None = None,
) -> tuple[list[Position], dict[str, str]]:
    """The positions in registration order, and {path: why not} of what looks like one.

    Besides those of ``find_positions``: behind every nn.ReLU that ran once, on features of a layer,
    wherever it is called; behind modules whose output goes into relu, called as a function, and
    nowhere else; and behind the blocks of residual stacks.

    Args:
        sample: an input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        kinds: keep only these kinds.
        zero, seed: see ``find_block_positions``.
        graph: of the model on the sample, if there is one already.

    Raises:
        ValueError: the model raises an error on the sample.
    """
    graph = traced(model, sample) if graph is None else graph
    found = {position.name: position for position in find_positions(model)}
    left_out: dict[str, str] = {}
    for path, module in model.named_modules():
        if path and path not in found and runs_as(module, (nn.ReLU, *ENDING_IN_RELU)):
            kind, reason = _behind_relu(model, graph, path)
            if kind is not None:
                found[path] = Position(path, kind)
            elif reason is not None:
                left_out[path] = reason
    for operation in graph.trace.operations:
        if operation.name != "relu" or not operation.calls:
            continue
        caller = graph.trace.calls[operation.calls[-1]].module
        if runs_as(model.get_submodule(caller), (nn.ReLU, *ENDING_IN_RELU)):
            continue
        place = _before_called_relu(model, graph, operation)
        if isinstance(place, Position):
            found.setdefault(place.name, place)
        else:
            left_out.setdefault(
                caller,
                f"its forward calls relu as a function, {place}; make it an nn.ReLU",
            )
    blocks, no_blocks = find_block_positions(model, graph.trace, sample, zero, seed)
    for position in blocks:
        found.setdefault(position.name, position)
    left_out.update(no_blocks)
    for path, reason in _at_several_places(model, found).items():
        left_out[path] = reason
        del found[path]
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    kept = [p for p in found.values() if kinds is None or p.kind in kinds]
    return sorted(kept, key=lambda position: order.index(position.name)), left_out


def _at_several_places(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Those of the paths that are of one module with others, and the reason against them."""
    places: defaultdict[nn.Module, list[str]] = defaultdict(list)
    for path in paths:
        places[model.get_submodule(path)].append(path)
    return {
        path: f"the same module is at {' and '.join(map(repr, same))}; give each place its own"
        for same in places.values()
        if len(same) > 1
        for path in same
    }


def _behind_relu(model: nn.Module, graph: TracedGraph, path: str) -> tuple[str | None, str | None]:
    """The kind of a position behind a ReLU, or why there is none."""
    if _is_of_torchs_encoder(model, path):
        return None, "torch's TransformerEncoderLayer does not call it when it evaluates"
    calls = graph.trace.calls_of(path)
    if len(calls) != 1:
        times = f"runs {len(calls)} times in one pass" if calls else "did not run on the sample"
        return None, f"it {times}, and an inserted layer would too" if calls else f"it {times}"
    return _kind_on(graph, calls[0].outputs[0])


def _kind_on(graph: TracedGraph, value: int) -> tuple[str | None, str | None]:
    """The kind of layer that fits what a ReLU makes, or why none does."""
    place = graph.axis_of(value)
    if place is None:
        return None, "what it acts on cannot be followed to a layer"
    axes = len(graph.trace.values[value].shape)
    if place[0] == axes - 1:
        return KIND_BEHIND_RELU["features"], None
    if place[0] == 1 and axes == 4:
        return KIND_BEHIND_RELU["images"], None
    return None, f"its features lie along axis {place[0]} of {axes}, where no layer fits"


def _before_called_relu(
    model: nn.Module, graph: TracedGraph, operation: Operation
) -> Position | str:
    """The position at the module whose output a call of relu takes, or why there is none.

    Nothing else may read that output: with a ReLU and the new layer behind the module, others would
    read what these make.
    """
    (value,) = operation.inputs[:1]
    trace = graph.trace
    makers = [call for call in trace.calls if call.outputs == (value,) and call.module]
    if not makers:
        return "on what is not the output of a module"
    path = max(makers, key=lambda call: len(call.around)).module
    if _is_of_torchs_encoder(model, path):
        return f"and reads the weights of {path!r} itself when it evaluates"
    if (count := len(trace.calls_of(path))) > 1:
        return f"on what {path!r} makes, which runs {count} times in one pass"
    uses = sum(value in other.inputs for other in trace.operations)
    if uses > 1 or value in trace.outputs or value in trace.escaped:
        return f"but what {path!r} makes is used elsewhere too"
    if (user := graph.weight_read_in(path)) is not None:
        return f"but the weight of {path!r} is also used in {user}"
    kind, reason = _kind_on(graph, operation.outputs[0])
    return str(reason) if kind is None else Position(path, kind, relu_called=True)


def _is_of_torchs_encoder(model: nn.Module, path: str) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
