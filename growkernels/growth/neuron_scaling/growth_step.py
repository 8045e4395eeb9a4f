"""Growing the chosen neurons: new branches, wider layers, and the same again from a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.neuron_rows import Layer
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons
from growkernels.growth.neuron_scaling.selection import Selection
from growkernels.growth.neuron_scaling.widening_step import (
    Places,
    Width,
    check_widened,
    layer_to_grow,
    places_of,
    relatives_of,
    widen_outputs,
    widen_readers,
)
from growkernels.growth.surgery import groups_for_new_layer, join_groups
from growkernels.nn.exchange import check_follows
from growkernels.nn.grown_layers import Branch, with_branches
from growkernels.nn.records import Record, new_record

RECORD_KIND = "neurons"  # of this growth's records


def plan(
    candidates: Sequence[Candidate],
    selection: Selection,
    form: str,
    gain: float,
    depth: bool,
    init: str,
    scale: float,
) -> Record:
    """The record of a growth step: everything but values, in numbers and strings.

    ``depth``: {layer: its outputs that get a branch}. ``width``: for each widened layer its path,
    its role and follower (see Widening), the number of heads, that of new neurons, and whose copies
    they are. ``init`` and ``scale``: what the new neurons start with, see ``initial_values``.
    """
    widened = [c for c in candidates if c.widening is not None and c.name in selection.neurons]
    width = [
        {
            "layer": c.name,
            "role": c.widening.role,
            "follower": c.widening.follower,
            "heads": c.widening.heads,
            "neurons": len(selection.neurons[c.name]),
            "parents": list(selection.neurons[c.name]),
            # Only where there are some: records of a plain MLP read as they always did.
            **{
                key: list(paths)
                for key, paths in (
                    ("readers", c.widening.readers),
                    ("partners", c.widening.partners),
                    ("norms", c.widening.norms),
                )
                if paths
            },
        }
        for c in widened
        if c.widening is not None
    ]
    return new_record(
        RECORD_KIND,
        form=form,
        gain=gain,
        depth={n: list(chosen) for n, chosen in selection.neurons.items()} if depth else {},
        width=width,
        init=init,
        scale=scale,
    )


def apply(
    model: nn.Module,
    record: Mapping[str, Any],
    optimizer: Optimizer | None,
    values: Mapping[str, NewNeurons] | None = None,
) -> None:
    """Carry out a growth step; not undone on error.

    Args:
        record: from ``plan``, or from a checkpoint.
        values: layer -> what its new neurons start with, in the order of its outputs; None: zeros,
            for a state that is loaded afterwards.

    Raises:
        ValueError: a record that does not fit the model.
        TypeError: an optimizer whose state cannot take new parameters.
    """
    if optimizer is not None:
        check_follows(optimizer)
    widths = [Width.of(entry) for entry in record["width"]]
    for width in widths:
        check_widened(model, width, optimizer)
    relatives = {
        width.layer: relatives_of(model, width, record) for width in widths if values is not None
    }
    for name, outputs in record["depth"].items():
        layer = layer_to_grow(model, name, outputs)
        branch = Branch(layer, outputs, record["form"], record["gain"]).train(layer.training)
        if values is not None:
            branch.start_at(values[name].weight, values[name].bias)
        _add_branch(model, name, layer, branch, optimizer)
    # All outputs before all inputs: the values were made for the inputs that the layers had.
    places: dict[str, Places] = {}
    for width in widths:
        places[width.layer] = places_of(model, width)  # q and k widen each other
        new = None if values is None else values[width.layer]
        widen_outputs(model, width, places[width.layer], new, relatives.get(width.layer), optimizer)
    for width in widths:
        new = None if values is None else values[width.layer]
        widen_readers(model, width, places[width.layer], new, relatives.get(width.layer), optimizer)


def _add_branch(
    model: nn.Module,
    name: str,
    layer: Layer,
    branch: Branch,
    optimizer: Optimizer | None,
) -> None:
    groups = None if optimizer is None else groups_for_new_layer(model, name, optimizer)
    new = with_branches(layer)
    _forbid_fused_evaluation(model, model.get_submodule(name.rpartition(".")[0]))
    new.branches.append(branch)
    if optimizer is not None and groups is not None:
        join_groups(model, branch, optimizer, groups)


def _forbid_fused_evaluation(model: nn.Module, parent: nn.Module) -> None:
    """Make torch's encoder call its layers: its kernel for evaluation reads their weights alone."""
    if not isinstance(parent, nn.TransformerEncoderLayer):
        return
    parent.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and parent in module.layers:
            module.use_nested_tensor = False
