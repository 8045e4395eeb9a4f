"""Growing the chosen neurons: new branches, wider layers, and the same again from a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.selection import Selection
from growkernels.growth.surgery import groups_for_new_layer, join_groups
from growkernels.nn.exchange import check_follows, exchange_with_state, state_obstacle
from growkernels.nn.grown_layers import Branch, GrownLinear, can_have_branches, with_branches
from growkernels.nn.new_entries import note_widened, start_scales
from growkernels.nn.records import Record, new_record
from growkernels.nn.weights import why_computed, why_watched

RECORD_KIND = "neurons"  # of this growth's records


@dataclass(frozen=True)
class NewNeurons:
    """Initial incoming weights [neurons, ...] and biases [neurons] of new neurons."""

    weight: Tensor
    bias: Tensor


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
    for width in record["width"]:
        _check_widened(model, width, optimizer)
    for name, outputs in record["depth"].items():
        layer = layer_to_grow(model, name, outputs)
        branch = Branch(layer, outputs, record["form"], record["gain"]).train(layer.training)
        if values is not None:
            branch.start_at(values[name].weight, values[name].bias)
        _add_branch(model, name, layer, branch, optimizer)
    # All outputs before all inputs: the values were made for the inputs that the layers had.
    followers: list[tuple[str, Places]] = []
    for width in record["width"]:
        name, heads, neurons = width["layer"], width["heads"], width["neurons"]
        layer = _linear(model, name)
        if neurons % heads or layer.out_features % heads:
            raise ValueError(
                f"The record widens layer {name!r} by {neurons} neurons in {heads} heads; it "
                "belongs to another model."
            )
        new = None if values is None else values[name]
        places = Places(layer.out_features, neurons, heads)
        _widen_outputs(layer, places, new, optimizer)
        if width["role"] == "qk":
            # The partner's new features are 0: q.k stays, and their gradient is not 0, because
            # the new features they are multiplied with are not.
            other = _linear(model, width["follower"])
            _widen_outputs(other, Places(other.out_features, neurons, heads), None, optimizer)
        else:
            followers.append((width["follower"], places))
    for name, places in followers:
        # Columns of 0: the new features have no effect yet, but the columns a gradient.
        for inner in _linear(model, name).modules():
            if isinstance(inner, nn.Linear):
                _replace(inner, "weight", places, 1, None, optimizer)
                inner.in_features += places.new


@dataclass(frozen=True)
class Places:
    """Where ``old`` features and ``new`` ones go: each head's new ones behind its old ones."""

    old: int
    new: int
    heads: int

    def of_old(self, device: torch.device) -> Tensor:
        """[old], the places that the features had and have now."""
        return self._all(device)[:, : self.old // self.heads].flatten()

    def of_new(self, device: torch.device) -> Tensor:
        """[new], the places of the new ones, by heads."""
        return self._all(device)[:, self.old // self.heads :].flatten()

    def _all(self, device: torch.device) -> Tensor:
        return torch.arange(self.old + self.new, device=device).view(self.heads, -1)


def _add_branch(
    model: nn.Module,
    name: str,
    layer: nn.Linear | nn.Conv2d,
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


def _widen_outputs(
    layer: nn.Linear, places: Places, values: NewNeurons | None, optimizer: Optimizer | None
) -> None:
    _replace(layer, "weight", places, 0, None if values is None else values.weight, optimizer)
    if layer.bias is not None:
        _replace(layer, "bias", places, 0, None if values is None else values.bias, optimizer)
    layer.out_features += places.new
    if isinstance(layer, GrownLinear):
        for branch in layer.branches:
            if isinstance(branch, Branch):
                outputs = places.of_old(torch.device("cpu"))[list(branch.outputs)]
                branch.set_outputs(outputs.tolist(), branch.index.device)


def _replace(
    module: nn.Module,
    name: str,
    places: Places,
    dim: int,
    values: Tensor | None,
    optimizer: Optimizer | None,
) -> None:
    """Give a parameter new entries along a dimension, `values` or 0; optimizer state comes along.

    The step count is the old one; see ``growkernels.nn.new_entries`` for the state of new entries.
    """
    old = module._parameters[name]
    assert old is not None

    def enlarged(tensor: Tensor, fill: Tensor | None = None) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] += places.new
        larger = tensor.new_zeros(shape)
        larger.index_copy_(dim, places.of_old(tensor.device), tensor.detach())
        if fill is not None:
            larger.index_copy_(dim, places.of_new(tensor.device), fill.to(larger))
        return larger

    new = nn.Parameter(enlarged(old, values), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = enlarged(old.grad)
    module._parameters[name] = new
    if optimizer is not None:
        exchange_with_state(optimizer, name, old, {name: new}, lambda value: [enlarged(value)])
        indices = places.of_old(new.device), places.of_new(new.device)
        start_scales(optimizer.state.get(new, {}), dim, *indices)
    note_widened(old, new, dim, places.of_old(torch.device("cpu")))


def _check_widened(model: nn.Module, width: Mapping[str, Any], optimizer: Optimizer | None) -> None:
    """Raise unless the layers of one entry of ``width`` can get new rows and columns."""
    follower = _linear(model, width["follower"])
    edited: dict[str, list[nn.Module]] = {width["layer"]: [_linear(model, width["layer"])]}
    # Behind fc1 and v, the branches of the follower read the new features too.
    edited[width["follower"]] = [follower] if width["role"] == "qk" else [*follower.modules()]
    for name, layers in edited.items():
        for layer in layers:
            own = list(layer.named_parameters(recurse=False))
            if reason := why_computed(layer) or why_watched(own):
                raise ValueError(
                    f"Layer {name!r} cannot be widened: {reason}; change that first, or grow with "
                    "widen=()."
                )
            for _, parameter in own if optimizer is not None else ():
                reason = None if optimizer is None else state_obstacle(optimizer, parameter)
                if reason:
                    raise TypeError(
                        f"{reason}, which cannot be widened; grow with widen=() or with "
                        "optimizer=None and a new optimizer."
                    )


def layer_to_grow(model: nn.Module, name: str, outputs: Sequence[int]) -> nn.Linear | nn.Conv2d:
    """The layer that a record grows these outputs of.

    Raises:
        ValueError: there is none with so many.
    """
    layer = _layer(model, name)
    if max(outputs) >= len(layer.weight):
        raise ValueError(
            f"The record grows output {max(outputs)} of layer {name!r}, which has "
            f"{len(layer.weight)}; it belongs to another model."
        )
    return layer


def _layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not can_have_branches(layer):
        raise ValueError(f"There is no linear layer or convolution to grow at {name!r}.")
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = _layer(model, name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"Layer {name!r} is no linear layer, so it cannot be widened.")
    return layer
