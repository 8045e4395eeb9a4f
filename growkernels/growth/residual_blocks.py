"""Residual blocks in a traced pass: stacks of them, and what writes into their residual stream.

A block adds to its input: out = x + f(x) + ..., with any number of branches. If what each branch
ends in is zero, the block is the identity. So from the output of a block the additions are walked
back to its input, and from each other summand to the layer, norm or layer scale that made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from growkernels.growth import axes
from growkernels.growth.feature_spaces import is_layer
from growkernels.nn.tracing import PARAMETERS, Call, Operation, Trace

# What passes a tensor on so that the identity stays the identity, or zero stays zero.
_VIEWS = axes.VIEWS | axes.PERMUTES | axes.SHIFTS | axes.COPIES | axes.DROPOUTS | {"__getitem__"}
_ZERO_TO_ZERO = _VIEWS | {"relu", "gelu", "silu", "tanh", "pad", "neg", "hardswish"}
_STREAM = _VIEWS | {"relu"}


@dataclass(frozen=True)
class Block:
    """A module of a stack.

    Attributes:
        name: its path.
        stack: path of the ModuleList or Sequential that holds it.
        zero: names, below the block, of the parameters that have to be zero for it to be the
            identity, in the order in which what they belong to ran; empty if there is a reason.
        keeps_shape: whether its output is shaped like its input.
        hands_on: whether the next block is given its output as it is, or there is none.
        reason: why it cannot be made the identity, a clause whose subject is the block; or None.
    """

    name: str
    stack: str
    zero: tuple[str, ...]
    keeps_shape: bool
    reason: str | None
    hands_on: bool = True


def stacks(model: nn.Module, trace: Trace) -> Iterator[tuple[str, list[Block]]]:
    """Each ModuleList or Sequential whose children ran once, one behind the other, with these.

    A child's output is the first tensor it returns, its input the first that it is given. Stacks of
    layers and activations are not meant: a block has modules of its own.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        prefix = f"{path}." if path else ""
        children = [f"{prefix}{key}" for key, child in module._modules.items() if child is not None]
        calls = [trace.calls_of(child) for child in children]
        if not calls or any(len(made) != 1 for made in calls):
            continue
        if all(is_layer(modules[c]) or not modules[c]._modules for c in children):
            continue
        blocks = []
        for index, (call,) in enumerate(calls):
            behind = calls[index + 1][0] if index + 1 < len(calls) else None
            hands_on = behind is None or call.outputs[:1] == (stream_of(behind),)
            blocks.append(replace(_block(modules, trace, call, path), hands_on=hands_on))
        if any(block.hands_on for block in blocks[:-1]) or all(b.reason is None for b in blocks):
            yield path, blocks


def stream_of(call: Call) -> int | None:
    """The first value that a module was given."""
    return call.given[0] if call.given else None


def _block(modules: dict[str, nn.Module], trace: Trace, call: Call, stack: str) -> Block:
    def refused(reason: str) -> Block:
        return Block(call.module, stack, (), keeps_shape, reason)

    start = stream_of(call)
    keeps_shape = False
    if start is None or not call.outputs:
        return refused("takes or returns no tensor")
    out = call.outputs[0]
    keeps_shape = trace.values[start].shape == trace.values[out].shape
    if not keeps_shape:
        return refused(
            f"makes {list(trace.values[out].shape)} of {list(trace.values[start].shape)}"
        )
    walk = _Walk(modules, trace, call)
    branches = walk.branches(out, start)
    if branches is None:
        return refused(
            "does not end in adding to its input"
            + (f" (its last operation is {last!r})" if (last := walk.last_operation(out)) else "")
        )
    zero: list[str] = []
    for branch in branches:
        found = walk.zero_of(branch)
        if found is None:
            return refused("adds something that no layer, norm or layer scale ends in")
        zero += found
    if not zero:
        return refused("adds nothing to its input")
    inside = f"{call.module}."
    if any(not name.startswith(inside) for name in zero):
        return refused("adds what a layer outside of it makes")
    order = [name for name, _ in modules[call.module].named_parameters()]
    names = dict.fromkeys(name.removeprefix(inside) for name in zero)
    return Block(call.module, stack, tuple(sorted(names, key=order.index)), True, None)


class _Walk:
    """Goes back from values to what made them, within one call of a block."""

    def __init__(self, modules: dict[str, nn.Module], trace: Trace, call: Call) -> None:
        self._modules = modules
        self._trace = trace
        self._maker: dict[int, Operation] = {}
        for operation in trace.operations[call.start : call.stop]:
            for number in operation.outputs:
                self._maker.setdefault(number, operation)
        self._layer: dict[int, str] = {}
        for inner in trace.calls:
            inside = call.module in (trace.calls[number].module for number in inner.around)
            if inside and inner.outputs and is_layer(modules[inner.module]):
                self._layer.setdefault(inner.outputs[0], inner.module)

    def branches(self, value: int, start: int) -> list[int] | None:
        """What is added on the way from the input `start`; None: this is not the way."""
        if value == start:
            return []
        operation = self._maker.get(value)
        if operation is None or value in self._layer:
            return None
        if operation.name == "add" and len(operation.inputs) == 2:
            for one, other in (operation.inputs, operation.inputs[::-1]):
                found = self.branches(one, start)
                if found is not None:
                    return [*found, other]
            return None
        if operation.name in _STREAM:
            return self.branches(operation.inputs[0], start)
        return None

    def zero_of(self, value: int) -> list[str] | None:
        """The parameters that make a value zero when they are; None: not known."""
        layer = self._layer.get(value)
        if layer is not None:
            module = self._modules[layer]
            inner = "out_proj." if isinstance(module, nn.MultiheadAttention) else ""
            names = [f"{inner}weight", f"{inner}bias"]
            held = dict(module.named_parameters())
            return [f"{layer}.{name}" for name in names if name in held] or None
        operation = self._maker.get(value)
        if operation is None or not operation.inputs:
            return None
        parameters = [
            self._trace.values[number].name
            for number in operation.inputs
            if self._trace.values[number].source in PARAMETERS
        ]
        if operation.name in ("mul", *axes.NORMS) and parameters:
            return parameters
        if operation.name == "add" and len(operation.inputs) == 2:
            summands = [
                self.zero_of(number)
                for number in operation.inputs
                if self._trace.values[number].source not in PARAMETERS
            ]
            if any(names is None for names in summands):
                return None
            return [*parameters, *(name for names in summands if names for name in names)]
        if operation.name in _ZERO_TO_ZERO or (
            operation.name in ("mul", "div") and len(operation.inputs) == 1
        ):
            return self.zero_of(operation.inputs[0])
        return None

    def last_operation(self, value: int) -> str | None:
        """The name of the operation that made a value."""
        operation = self._maker.get(value)
        return None if operation is None else operation.name
