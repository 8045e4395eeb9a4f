"""What new neurons start with: a share of their parent's weights, or an eigenvector."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from growkernels.growth.neuron_scaling.criteria import DECREASES
from growkernels.growth.neuron_scaling.neuron_rows import current_rows, has_neurons
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons, share_of_parents
from growkernels.growth.neuron_scaling.selection import Selection

INITS = ("parent", "eigenvector", *DECREASES)


@torch.no_grad()
def initial_values(
    model: nn.Module, selection: Selection, init: str, scale: float, must_move: Collection[str]
) -> Mapping[str, NewNeurons]:
    """Incoming weights and biases for every selected neuron.

    * ``"parent"``: scale * (w_i, b_i) of the neuron itself.
    * ``"eigenvector"``: the unit eigenvector of its splitting matrix times scale times the root
      mean square norm of the layer's rows w; bias 0.
    * ``"gradmax"``, ``"tiny"``: what the criterion of that name found, see ``closed_form``; of
      TINY both sides times the root of scale, behind a batch norm the outgoing side times scale.

    Args:
        must_move: layers that grow in a form in which weights of 0 would never get a gradient.

    Raises:
        ValueError: unknown init, a scale that is not positive, no eigenvectors, a parent of 0, or
            a layer that has fewer outputs than were chosen from.
    """
    if init not in INITS:
        raise ValueError(f"Unknown init {init!r}; choose one of {', '.join(INITS)}.")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; it must be a positive number.")
    if init == "eigenvector" and not selection.scores.directions:
        raise ValueError(
            f"Criterion {selection.scores.criterion!r} has no eigenvectors to start from; use "
            "init='parent', or choose by 'splitting' or 's2d'."
        )
    criterion = selection.scores.criterion
    if init in DECREASES and criterion != init:
        raise ValueError(
            f"init={init!r} takes the neurons that criterion {init!r} finds, and these are chosen "
            f"by {criterion!r}; choose by criterion {init!r}."
        )
    if criterion in DECREASES and init != criterion:
        raise ValueError(
            f"Criterion {criterion!r} chooses directions and no neurons, so none is a parent; pass "
            f"init={criterion!r}."
        )
    if init in DECREASES:
        return {
            name: _found(selection.scores.starts[name], outputs, scale if init == "tiny" else 1.0)
            for name, outputs in selection.neurons.items()
        }
    return {
        name: _of_layer(model, name, outputs, selection, init, scale, name in must_move)
        for name, outputs in selection.neurons.items()
    }


def _found(start: NewNeurons, outputs: tuple[int, ...], scale: float) -> NewNeurons:
    index = torch.tensor(outputs, device=start.weight.device)
    side, other = (1.0, scale) if start.normed else (scale**0.5, scale**0.5)
    assert start.outgoing is not None
    assert start.reader_bias is not None
    return NewNeurons(
        start.weight[index] * side,
        start.bias[index] * side,
        start.outgoing[:, index] * other,
        start.reader_bias[:, index].sum(1) * other if bool(start.reader_bias.any()) else None,
        None if start.mean is None else start.mean[index],
        None if start.variance is None else start.variance[index],
    )


def _of_layer(
    model: nn.Module,
    name: str,
    outputs: tuple[int, ...],
    selection: Selection,
    init: str,
    scale: float,
    must_move: bool,
) -> NewNeurons:
    layer = model.get_submodule(name)
    assert has_neurons(layer)
    weight = current_rows(layer)
    if max(outputs) >= len(weight):
        raise ValueError(
            f"The choice names output {max(outputs)} of layer {name!r}, which has {len(weight)} "
            "now: the model was changed by others. Build a new NeuronScaling for it."
        )
    if init == "parent":
        new = share_of_parents(layer, outputs, scale)
        if must_move and not bool(new.weight.flatten(1).any(dim=1).all()):
            raise ValueError(
                f"A chosen neuron of layer {name!r} has weights of 0, so a copy of it would never "
                "get a gradient; train the layer first, or use init='eigenvector'."
            )
        return new
    norm = float(weight.flatten(1).norm(dim=1).square().mean().sqrt())
    directions = selection.scores.directions[name]
    direction = directions[torch.tensor(outputs, device=directions.device)]
    return NewNeurons(
        direction.to(weight) * (scale * (norm or 1.0)), weight.new_zeros(len(outputs))
    )
