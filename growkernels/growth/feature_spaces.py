"""Which layers make the features at each place of a traced pass, and which layers read them.

A feature space is a set of features that belong together because the model treats them feature by
feature: what one layer makes, or several whose outputs are added or multiplied (a residual stream,
the gate and the other half of a gated MLP). It lies along one axis of the values that carry it.
Operations on single elements keep it, normalisation keeps it, and views keep it as long as that
axis stays whole. Whatever else is done with it is a reason not to change its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from growkernels.growth import axes
from growkernels.nn.linear_from_conv1d import is_transposed_linear
from growkernels.nn.tracing import OVERWRITTEN, Operation, Trace, read_without_call
from growkernels.nn.weights import weight_names


@dataclass(frozen=True)
class Step:
    """What happens to features between the layer that makes them and the layers that read them.

    Attributes:
        kind: ``"activation"``, ``"norm"``, ``"dropout"``, ``"arithmetic"`` (with numbers and
            parameters), ``"add"`` or ``"multiply"`` (with features of other makers), ``"view"``,
            ``"pool"``, or ``"depthwise"`` (a convolution of each feature by itself).
        name: the function's, such as ``"gelu"`` or ``"batch_norm"``; where a module of its own
            computes it in several operations, the name of its class.
        module: path of the module that does this and nothing else, or None: the forward of a
            larger module calls the function.
        makers: layers whose outputs have come together by then.
        arguments: of the function, see ``Operation``.
    """

    kind: str
    name: str
    module: str | None
    makers: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Place:
    """A space, and the axis of a value along which it lies, counted from the front."""

    space: int
    axis: int


@dataclass
class _Space:
    makers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    steps: list[tuple[int, Step]] = field(default_factory=list)  # when, what
    parts: tuple[int, ...] = ()
    became: int | None = None


class Spaces:
    """Reads a trace operation by operation and knows which features every value carries.

    Attributes:
        places: of values, by number.
        read: layer -> the place of what it reads, or None where that is not known.
        made: layer -> the place of what it makes.
        inputs: layer -> the value that it was given first.
        runs: layer -> how often it ran.
        bypassed: layer -> what uses its weight without calling it.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.places: dict[int, Place] = {}
        self.read: dict[str, Place | None] = {}
        self.made: dict[str, Place] = {}
        self.inputs: dict[str, int] = {}
        self.runs: dict[str, int] = {}
        self._trace = trace
        self._spaces: list[_Space] = []
        self._overwritten: dict[int, tuple[int, ...]] = {}  # value -> what it was made of
        self._modules = dict(model.named_modules())
        self._layers = {path for path, module in self._modules.items() if is_layer(module)}
        self.bypassed = read_without_call(trace, self._layers)
        seen: set[int] = set()
        for moment, operation in enumerate(trace.operations):
            calls = [trace.calls[number] for number in operation.calls]
            inside = [call for call in calls if call.module in self._layers]
            if operation.name == OVERWRITTEN:
                self._overwritten[operation.outputs[0]] = operation.inputs
                continue
            for number in operation.inputs:
                self._note_use(number)
            if not inside:
                self._operation(moment, operation)
            elif id(inside[0]) not in seen:
                seen.add(id(inside[0]))
                self._layer(moment, inside[0].module, inside[0].given, inside[0].outputs)
        for number in trace.escaped:
            self._block(
                number, "goes into code that cannot be followed, such as scripted functions"
            )
        for number in trace.outputs:
            self._note_use(number)
            self._block(number, "is an output of the model")

    def root(self, space: int) -> int:
        """The space that a space has become a part of, or is."""
        while (larger := self._spaces[space].became) is not None:
            space = larger
        return space

    def makers(self, space: int) -> tuple[str, ...]:
        """The layers whose outputs came together in a space, in the order in which they ran."""
        found = {maker for part in self._within(space) for maker in part.makers}
        return tuple(layer for layer in self.runs if layer in found)

    def readers(self, space: int) -> tuple[str, ...]:
        """The layers that read it."""
        found = {reader for part in self._within(space) for reader in part.readers}
        return tuple(layer for layer in self.runs if layer in found)

    def parameters(self, space: int) -> tuple[str, ...]:
        """Parameters with one entry per feature, such as those of norms and layer scales."""
        return tuple(dict.fromkeys(p for part in self._within(space) for p in part.parameters))

    def reasons(self, space: int) -> tuple[str, ...]:
        """Why its width cannot be changed: clauses whose subject is what its makers make."""
        return tuple(dict.fromkeys(r for part in self._within(space) for r in part.reasons))

    def steps(self, space: int) -> tuple[Step, ...]:
        """What happens to it between makers and readers, in order."""
        found = sorted(
            ((moment, step) for part in self._within(space) for moment, step in part.steps),
            key=lambda entry: entry[0],
        )
        return tuple(step for _, step in found)

    def _within(self, space: int) -> Iterator[_Space]:
        for part in self._spaces[space].parts:
            yield from self._within(part)
        yield self._spaces[space]

    def _new(self, **content: Any) -> int:
        self._spaces.append(_Space(**content))
        return len(self._spaces) - 1

    def _join(self, spaces: Sequence[int]) -> int:
        roots = list(dict.fromkeys(self.root(space) for space in spaces))
        if len(roots) == 1:
            return roots[0]
        joined = self._new(parts=tuple(roots))
        for part in roots:
            self._spaces[part].became = joined
        return joined

    def _block(self, number: int, reason: str) -> None:
        place = self.places.get(number)
        if place is not None:
            self._spaces[self.root(place.space)].reasons.append(reason)

    def _note_use(self, number: int) -> None:
        for source in self._overwritten.get(number, ()):
            self._block(source, "is overwritten through a view of it")
            self._note_use(source)

    def _layer(self, moment: int, path: str, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        module = self._modules[path]
        self.runs[path] = self.runs.get(path, 0) + 1
        if self.runs[path] > 1:
            for place in (self.read.get(path), self.made.get(path)):
                if place is not None:
                    self._spaces[self.root(place.space)].reasons.append(
                        f"has to do with {path!r}, which runs several times in one pass"
                    )
        if inputs:
            self.inputs.setdefault(path, inputs[0])
        spatial = spatial_axes(module)
        for number in () if isinstance(module, nn.Embedding | nn.EmbeddingBag) else inputs:
            where = self.places.get(number)
            wanted = len(self._trace.values[number].shape) - 1 - spatial
            if where is None:
                self.read.setdefault(path, None)
            elif where.axis != wanted:
                self._block(number, f"is read by {path!r} along another axis")
                self.read.setdefault(path, None)
            elif is_depthwise(module) and outputs:
                self._add_step(moment, where, "depthwise", "conv", path, {})
                self.places[outputs[0]] = where
                self.made[path] = self.read[path] = where
                return
            else:
                if getattr(module, "groups", 1) != 1:
                    self._block(number, f"is read in groups by {path!r}")
                self._spaces[self.root(where.space)].readers.append(path)
                self.read[path] = where
        if outputs:
            axis = len(self._trace.values[outputs[0]].shape) - 1 - spatial
            made = Place(self._new(makers=[path]), axis)
            self.made[path] = self.places[outputs[0]] = made
            if getattr(module, "groups", 1) != 1:
                self._block(outputs[0], f"is made in groups by {path!r}")

    def _operation(self, moment: int, operation: Operation) -> None:
        carried = [number for number in operation.inputs if number in self.places]
        if not carried or not operation.outputs:
            return
        outcome = axes.after(
            operation,
            {number: self.places[number].axis for number in carried},
            self._trace.values,
        )
        module = self._own_module(operation)
        normalises = module is not None and "norm" in type(self._modules[module]).__name__.lower()
        if outcome.reason is not None:
            if outcome.reduces and normalises:  # a norm written in Python
                place = self.places[carried[0]]
                self._add_step(moment, place, "norm", operation.name, module, {})
                return
            for number in carried:
                self._block(number, outcome.reason)
        for number in outcome.spread:
            self._block(number, f"is spread over other features by {operation.name}")
        if outcome.axes is None:
            return
        together = [number for number in carried if number in outcome.joined]
        before = dict.fromkeys(self.root(self.places[number].space) for number in together)
        space = self._join(list(before))
        kind = outcome.kind
        if len(before) > 1:
            kind = {"mul": "multiply", "add": "add"}.get(operation.name, operation.name)
        elif normalises:
            kind = "norm"
        for number, axis in zip(operation.outputs, outcome.axes, strict=True):
            if axis is not None:
                self.places[number] = Place(space, axis)
        place = Place(space, 0)
        self._add_step(moment, place, kind, operation.name, module, dict(operation.arguments))
        parameters = [self._trace.values[number].name for number in outcome.parameters]
        self._spaces[space].parameters += parameters

    def _add_step(
        self,
        moment: int,
        place: Place,
        kind: str,
        name: str,
        module: str | None,
        arguments: dict[str, Any],
    ) -> None:
        space = self.root(place.space)
        steps = self._spaces[space].steps
        makers = self.makers(space)
        if steps and module is not None and steps[-1][1].module == module:
            last = steps.pop()[1]  # one module, several operations
            kinds = {last.kind, kind}
            kind = next((k for k in ("norm", "activation") if k in kinds), last.kind)
            name, arguments = type(self._modules[module]).__name__, {}
            makers = last.makers
        steps.append((moment, Step(kind, name, module, makers, arguments)))

    def _own_module(self, operation: Operation) -> str | None:
        """The module that an operation is the work of: it has no children, or these parameters."""
        if not operation.calls:
            return None
        path = self._trace.calls[operation.calls[-1]].module
        values = (self._trace.values[number] for number in operation.inputs)
        owned = any(v.source == "parameter" and v.name.rpartition(".")[0] == path for v in values)
        has_children = next(self._modules[path].children(), None) is not None
        return path if (operation.name in axes.NORMS and owned) or not has_children else None


def is_layer(module: nn.Module) -> bool:
    """Whether a module mixes features by weights: it reads some and makes others."""
    return (
        bool(weight_names(module))
        or isinstance(module, nn.Embedding | nn.EmbeddingBag)
        or is_transposed_linear(module)
    )


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution of each channel by itself."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.transposed:
        return False
    return module.groups == module.in_channels == module.out_channels > 1


def spatial_axes(module: nn.Module) -> int:
    """How many axes lie behind that of the features in what a layer reads and makes."""
    kernel = getattr(module, "kernel_size", None)
    return len(kernel) if isinstance(kernel, tuple) else 0
