"""What new neurons start with: a share of their parent's weights, or an eigenvector."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from growkernels.growth.neuron_scaling.new_neurons import NewNeurons, share_of_parents
from growkernels.growth.neuron_scaling.selection import Selection
from growkernels.nn.weights import current_value

INITS = ("parent", "eigenvector")


@torch.no_grad()
def initial_values(
    model: nn.Module, selection: Selection, init: str, scale: float, must_move: Collection[str]
) -> Mapping[str, NewNeurons]:
    """Incoming weights and biases for every selected neuron.

    * ``"parent"``: scale * (w_i, b_i) of the neuron itself.
    * ``"eigenvector"``: the unit eigenvector of its splitting matrix times scale times the root
      mean square norm of the layer's rows w; bias 0.

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
    return {
        name: _of_layer(model, name, outputs, selection, init, scale, name in must_move)
        for name, outputs in selection.neurons.items()
    }


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
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = current_value(layer)
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
