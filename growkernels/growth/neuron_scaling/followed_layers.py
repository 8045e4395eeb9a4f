"""The layers that a driver watches, followed through what others change in the model."""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from growkernels.growth.neuron_scaling.activations import with_known_activation
from growkernels.growth.neuron_scaling.candidates import Candidate, find_candidates
from growkernels.growth.neuron_scaling.closed_form_scores import with_closed_form
from growkernels.growth.neuron_scaling.criteria import DECREASES, RECORDED, Scores
from growkernels.growth.neuron_scaling.cross_sums import CrossRecorder
from growkernels.growth.neuron_scaling.neuron_rows import has_neurons, rows_of
from growkernels.growth.neuron_scaling.samples import SampleRecorder
from growkernels.growth.neuron_scaling.selection import Selection
from growkernels.growth.traced_graph import traced
from growkernels.nn.module_paths import ModulePaths

OTHER_LAYERS = (
    "These scores are of other layers than the model has now; compute them anew after each growth."
)


@dataclass(frozen=True)
class Wishes:
    """Which layers, and by what: arguments of ``NeuronScaling``."""

    criterion: str
    layers: Sequence[str] | None
    kinds: Collection[str]
    widen: Collection[str]
    depth: bool
    rows: int
    relu_beta: float | None
    generator: torch.Generator | None
    sample: Any


class FollowedLayers:
    """Candidates of one model, what was recorded of them, and the paths at which they are.

    Args:
        roots: the layers that ``layers`` named when the driver was built; None: this is then.

    Attributes:
        candidates: the layers whose neurons can be grown.
        left_out: {path: reason} for layers that look like candidates and are none.
        recorder: watches them.
        paths: what the candidates' names are paths of.

    Raises:
        ValueError: see ``NeuronScaling``.
    """

    def __init__(
        self, model: nn.Module, wishes: Wishes, roots: Sequence[nn.Module] | None = None
    ) -> None:
        self.model = model
        self._wishes = wishes
        self._roots = roots
        self.candidates, self.left_out = self._find()
        if wishes.layers is not None and roots is None:
            names = dict.fromkeys(candidate.root for candidate in self.candidates)
            self._roots = [model.get_submodule(name) for name in names]
        self.recorder = self._watch()
        self.paths = ModulePaths(model)

    def found_anew(self) -> FollowedLayers:
        """Those of the model as it is now, with nothing recorded; these stay as they are."""
        return FollowedLayers(self.model, self._wishes, self._roots)

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' paths."""
        return tuple(candidate.name for candidate in self.candidates)

    def widths(self) -> dict[str, int]:
        """Layer -> how many neurons it has."""
        return {name: _width(self.model.get_submodule(name)) for name in self.names}

    def follow(self) -> None:
        """See what others changed in the model: follow its layers, or say that it was changed.

        Raises:
            RuntimeError: what was recorded is of another network.
        """
        recorder = self.recorder
        if recorder.recording or self.paths.is_current(self.model):
            return
        if recorder.kept.layers:
            self._refuse(self.paths.difference(self.model))
            now = self.paths.now(self.model)
            known = {now[candidate.name] for candidate in self.candidates}
            found, left_out = self._find()
            candidates = [candidate for candidate in found if candidate.name in known]
            if len(candidates) < len(known):
                self._refuse("a recorded layer is no candidate any more")
            recorder.rename(now)
        else:
            candidates, left_out = self._find()
            recorder.watch(self.model, self._recorded(candidates))
        self.candidates, self.left_out = candidates, left_out
        self.paths = ModulePaths(self.model)

    def now(self, scores: Scores) -> Scores:
        """The scores under the paths at which their layers are now.

        Raises:
            ValueError: they are of other layers than the candidates.
        """
        if scores.knows(self.model):
            paths: dict[str, str] = {}
            for name in scores.values:
                path = scores.path_now(self.model, name)
                if path is None:
                    raise ValueError(OTHER_LAYERS)
                paths[name] = path
            scores = scores.renamed(paths).noted(self.paths)
        if set(scores.values) != set(self.names):
            raise ValueError(OTHER_LAYERS)
        return scores

    def choice_now(self, chosen: Selection) -> Selection:
        """The choice under the paths at which its layers are now.

        Raises:
            ValueError: a chosen layer is no candidate, or has changed.
        """
        if chosen.scores.knows(self.model):
            paths: dict[str, str] = {}
            for name, outputs in chosen.neurons.items():
                path = chosen.scores.path_now(self.model, name)
                if path is None:
                    raise ValueError(_why_changed(self.model, name, outputs))
                paths[name] = path
            chosen = replace(
                chosen,
                neurons={paths[name]: outputs for name, outputs in chosen.neurons.items()},
                scores=chosen.scores.renamed(paths).noted(self.paths),
            )
        if strangers := sorted(set(chosen.neurons) - set(self.names)):
            raise ValueError(
                f"The choice names {strangers[0]!r}, which is no candidate now; select anew after "
                "each growth."
            )
        return chosen

    def _find(self) -> tuple[list[Candidate], dict[str, str]]:
        """The candidates of the model as it is, and why other layers are none."""
        wishes = self._wishes
        layers = wishes.layers
        if self._roots is not None:
            paths = {module: path for path, module in self.model.named_modules()}
            if not all(root in paths for root in self._roots):
                raise RuntimeError(
                    "A layer that layers= named is not in the model any more: it was changed by "
                    "others. Build a new NeuronScaling for it."
                )
            layers = [glob.escape(paths[root]) for root in self._roots]
        graph = None
        if wishes.sample is not None and wishes.widen:
            graph = traced(self.model, wishes.sample)
        candidates, left_out = find_candidates(
            self.model, layers, wishes.kinds, wishes.widen, graph, branches=wishes.depth
        )
        if not wishes.depth:
            for candidate in candidates:
                if candidate.widening is None:
                    why = candidate.why_not_widened or "widen= names no role that it could have"
                    left_out[candidate.name] = why
            candidates = [c for c in candidates if c.widening is not None]
        if wishes.criterion in DECREASES:
            candidates = with_closed_form(self.model, candidates, left_out, wishes.criterion)
        if wishes.criterion == "s2d":
            candidates = with_known_activation(self.model, candidates, wishes.relu_beta, left_out)
        return candidates, left_out

    def _watch(self) -> SampleRecorder | CrossRecorder:
        wishes = self._wishes
        if wishes.criterion in DECREASES:
            covariances = wishes.criterion == "tiny"
            return CrossRecorder(self.model, self.candidates, covariances=covariances)
        return SampleRecorder(
            self.model,
            self._recorded(self.candidates),
            own_activation=wishes.criterion == "s2d",
            rows=wishes.rows,
            generator=wishes.generator,
        )

    def _recorded(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return candidates if self._wishes.criterion in RECORDED else []

    def _refuse(self, difference: str | None) -> None:
        if difference is not None:
            raise RuntimeError(
                f"The model was changed since its batches were recorded: {difference}. Call "
                "reset(), or build a new NeuronScaling, and record again."
            )


def _width(layer: nn.Module) -> int:
    assert has_neurons(layer)
    return len(rows_of(layer))


def _why_changed(model: nn.Module, name: str, outputs: Sequence[int]) -> str:
    layer = dict(model.named_modules()).get(name)
    there = None if layer is None or not has_neurons(layer) else _width(layer)
    which = f"output {max(outputs)} of layer {name!r}"
    if there is not None and max(outputs) >= there:
        which += f", which has {there} now"
    else:
        which += " as it was"
    return (
        f"The choice names {which}: the model was changed by others. Select anew, or build a new "
        "NeuronScaling for it."
    )
