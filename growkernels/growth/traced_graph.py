"""What a model's structure is, learned from one pass on a sample: who makes what who reads.

``traced(model, sample)`` is the door for drivers. Where ``module_graph`` reads registered modules
and knows Sequentials and a few patterns by name, this knows what ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from growkernels.growth.feature_spaces import Spaces, Step
from growkernels.nn.tracing import Trace, trace


@dataclass(frozen=True)
class Features:
    """Features that belong together: one width, which can only change in all layers at once.

    Attributes:
        makers: paths of the layers whose outputs they are, or are added or multiplied into, in the
            order in which they ran. Two for a gated MLP (gate and up), many for a residual stream.
        readers: paths of the layers whose inputs they are.
        steps: what is done with them between, in order.
        gated: there are two makers, which read the same, and their outputs are multiplied.
        parameters: names of parameters with one entry per feature: of norms, layer scales, tokens.
        reasons: why their width cannot be changed, apart from what their layers are; clauses whose
            subject is the features. Empty: every use of them is in ``readers`` and ``steps``.
    """

    makers: tuple[str, ...]
    readers: tuple[str, ...]
    steps: tuple[Step, ...]
    gated: bool
    parameters: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def hidden(self) -> bool:
        """Whether one layer makes them, or a gate and its partner do, and others read them."""
        return (len(self.makers) == 1 or self.gated) and bool(self.readers) and not self.reasons

    def of_kind(self, kind: str, maker: str | None = None) -> tuple[Step, ...]:
        """The steps of a kind; with ``maker``, those that its outputs go through."""
        return tuple(
            step
            for step in self.steps
            if step.kind == kind and (maker is None or maker in step.makers)
        )


class TracedGraph:
    """A model's layers and what is between them, as they ran on a sample.

    Layers are modules that mix features by weights: linear layers (transformers' Conv1D too),
    convolutions, embeddings, torch's attention and recurrent layers, and this package's.

    Attributes:
        trace: the pass, operation by operation.
        layers: paths of the layers that ran, in order.
        features: each set of features, in the order in which their first makers ran.
    """

    def __init__(self, model: nn.Module, sample: Any) -> None:
        self.trace: Trace = trace(model, sample)
        self._spaces = Spaces(model, self.trace)
        self.layers: tuple[str, ...] = tuple(self._spaces.runs)
        places = [*self._spaces.made.values(), *self._spaces.read.values()]
        roots = [self._spaces.root(place.space) for place in places if place is not None]
        self._features = {root: self._of_space(root) for root in sorted(set(roots))}
        self.features: tuple[Features, ...] = tuple(self._features.values())

    def made_by(self, layer: str) -> Features | None:
        """The features that a layer makes, or helps to make; None: it did not run."""
        place = self._spaces.made.get(layer)
        return None if place is None else self._features[self._spaces.root(place.space)]

    def read_by(self, layer: str) -> Features | None:
        """The features that a layer reads; None: it did not run, or reads something else.

        Something else is the model's input, or what cannot be followed to layers, such as what
        attention makes of its heads.
        """
        place = self._spaces.read.get(layer)
        return None if place is None else self._features[self._spaces.root(place.space)]

    def producers(self, layer: str) -> tuple[str, ...]:
        """The layers whose outputs a layer reads, through what acts on single features."""
        features = self.read_by(layer)
        return () if features is None else features.makers

    def consumers(self, layer: str) -> tuple[str, ...]:
        """The layers that read a layer's outputs, through what acts on single features."""
        features = self.made_by(layer)
        return () if features is None else features.readers

    def activation_behind(self, layer: str) -> Step | None:
        """The first activation on a layer's outputs: a module's, or a function called on them."""
        features = self.made_by(layer)
        found = () if features is None else features.of_kind("activation", layer)
        return found[0] if found else None

    def norm_behind(self, layer: str) -> Step | None:
        """The first normalisation on a layer's outputs."""
        features = self.made_by(layer)
        found = () if features is None else features.of_kind("norm", layer)
        return found[0] if found else None

    def weight_read_in(self, layer: str) -> str | None:
        """What uses a layer's weight without calling the layer, such as ``"'head'"``; or None."""
        return self._spaces.bypassed.get(layer)

    def axis_of(self, number: int) -> tuple[int, Features] | None:
        """Along which axis the features of a value of the trace lie, and which these are."""
        place = self._spaces.places.get(number)
        if place is None:
            return None
        return place.axis, self._of_space(self._spaces.root(place.space))

    def why_fixed(self, layer: str) -> str | None:
        """Why the number of a layer's outputs cannot be changed, as a clause; None: it can.

        That is as far as the pass tells: layers have reasons of their own, such as hooks.
        """
        if layer not in self._spaces.runs:
            return "it did not run on the sample as a module of its own"
        if (count := self._spaces.runs[layer]) > 1:
            return f"it runs {count} times in one pass"
        if (user := self.weight_read_in(layer)) is not None:
            return f"its weight is also used in {user}"
        features = self.made_by(layer)
        if features is None:
            return "its output is no tensor"
        if layer not in features.makers:
            return f"it convolves each channel by itself, and {features.makers[0]!r} makes these"
        if features.reasons:
            return f"what it makes {features.reasons[0]}"
        if not features.readers:
            return "no layer reads what it makes"
        if not features.hidden:
            others = [maker for maker in features.makers if maker != layer]
            how = {step.kind for step in features.steps if step.kind in ("add", "multiply")}
            count = len(others) - 1
            more = f" and {count} more layer{'s' * (count > 1)} make" if count else " makes"
            return (
                f"what it makes is {'multiplied by' if how == {'multiply'} else 'added to'} what "
                f"{others[0]!r}{more}"
            )
        for reader in features.readers:
            if (count := self._spaces.runs[reader]) > 1:
                return f"{reader!r}, which reads it, runs {count} times in one pass"
            if (user := self.weight_read_in(reader)) is not None:
                return f"the weight of {reader!r}, which reads it, is also used in {user}"
        return None

    def _of_space(self, root: int) -> Features:
        spaces = self._spaces
        makers, steps = spaces.makers(root), spaces.steps(root)
        sources = [spaces.inputs.get(maker) for maker in makers]
        joins = [step.kind for step in steps if step.kind in ("add", "multiply")]
        return Features(
            makers=makers,
            readers=spaces.readers(root),
            steps=steps,
            gated=len(makers) == 2
            and joins == ["multiply"]
            and sources[0] is not None
            and sources[0] == sources[1],
            parameters=spaces.parameters(root),
            reasons=spaces.reasons(root),
        )


def traced(model: nn.Module, sample: Any) -> TracedGraph:
    """Learn a model's structure from one forward pass, in eval mode and without gradients.

    Args:
        model: any module; it stays as it is.
        sample: an input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        ValueError: the model raises an error on the sample, or has lazy parameters.
    """
    return TracedGraph(model, sample)
