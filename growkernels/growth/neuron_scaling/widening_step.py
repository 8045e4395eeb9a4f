"""Widening layers, with what stands between them and the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.neuron_scaling.neuron_rows import (
    Layer,
    as_rows,
    can_be_widened,
    current_rows,
    has_neurons,
    output_axis,
    resize,
    rows_of,
)
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons, share_of_parents
from growkernels.growth.neuron_scaling.widenings import OF_ALL, OF_EACH
from growkernels.nn.exchange import exchange_with_state, state_obstacle
from growkernels.nn.grown_layers import Branch, GrownConv2d, GrownLinear
from growkernels.nn.new_entries import note_widened, start_scales
from growkernels.nn.weights import why_computed, why_watched


@dataclass(frozen=True)
class Width:
    """One entry of a record's ``width``: see Widening, and for ``parents`` growth_step.plan."""

    layer: str
    role: str
    follower: str
    heads: int
    neurons: int
    parents: tuple[int, ...]
    readers: tuple[str, ...]
    partners: tuple[str, ...]
    norms: tuple[str, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Width:
        return cls(
            *(entry[key] for key in ("layer", "role", "follower", "heads", "neurons")),
            *(tuple(entry.get(key, ())) for key in ("parents", "readers", "partners", "norms")),
        )

    @property
    def all_readers(self) -> tuple[str, ...]:
        return () if self.role == "qk" else (self.follower, *self.readers)


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


@dataclass(frozen=True)
class Relatives:
    """What goes with copies of parents: their partners, and what a norm has seen of them.

    ``statistics``: mean and variance of the first norm's new features; None: it has not seen them.
    ``start``: with which new neurons add nothing to what a norm of all features divides by, in
    place of copies of parents; None: there is no such norm. ``columns``: their outgoing weights
    then, reader by reader.
    """

    partners: tuple[NewNeurons, ...]
    statistics: tuple[Tensor, Tensor] | None
    start: NewNeurons | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)


def check_widened(model: nn.Module, width: Width, optimizer: Optimizer | None) -> None:
    """Raise unless the layers of one entry of ``width`` can get new rows and columns."""
    linear = width.role != "conv"
    for name in (width.layer, *width.partners):
        if linear and isinstance(layer_at(model, name), nn.Conv2d):
            raise ValueError(f"Layer {name!r} is no linear layer, so it cannot be widened.")
    edited: dict[str, list[nn.Module]] = {
        name: [layer_at(model, name)] for name in (width.layer, *width.partners)
    }
    if width.role == "qk":
        edited[width.follower] = [layer_at(model, width.follower)]
    for name in width.all_readers:  # their branches read the new features too
        edited[name] = [*layer_at(model, name).modules()]
    for name in width.norms:
        edited[name] = [_norm_at(model, name, width)]
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


def relatives_of(model: nn.Module, width: Width, record: Mapping[str, Any]) -> Relatives:
    """What goes with the new neurons of a layer, as the model is before it grows."""
    scale = record.get("scale", 1.0)
    partners = tuple(
        share_of_parents(layer_at(model, name), width.parents, scale) for name in width.partners
    )
    statistics = None
    if width.norms and record.get("init") == "parent":
        norm = model.get_submodule(width.norms[0])
        mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
        if mean is not None and variance is not None:
            index = torch.tensor(width.parents, device=mean.device)
            statistics = mean[index] * scale, variance[index] * scale**2
    norms = [model.get_submodule(name) for name in width.norms]
    over_all = [norm for norm in norms if type(norm) in OF_ALL]
    if not over_all:
        return Relatives(partners, statistics)
    columns: dict[str, Tensor] = {}
    for name in width.all_readers:
        rows = current_rows(layer_at(model, name))
        columns[name] = scale * rows[:, torch.tensor(width.parents, device=rows.device)]
        if not bool(columns[name].transpose(0, 1).flatten(1).any(1).all()):
            raise ValueError(
                f"{name!r} reads a chosen neuron of layer {width.layer!r} with weights of 0, so a "
                "new one that is read alike would never get a gradient; train the model first."
            )
    start = _unseen_by(over_all[0], layer_at(model, width.layer), width.neurons)
    return Relatives(partners, None, start, columns)


def _unseen_by(norm: nn.Module, layer: Layer, count: int) -> NewNeurons:
    """Neurons that a norm of all features makes 0 of: its mean, or 0; see ``widenings``."""
    rows = current_rows(layer)
    weight = rows.mean(0, keepdim=True) if isinstance(norm, nn.LayerNorm) else 0 * rows[:1]
    bias = weight.new_zeros(count)
    if layer.bias is not None and isinstance(norm, nn.LayerNorm):
        bias = bias + layer.bias.detach().mean()
    return NewNeurons(weight.expand(count, *rows.shape[1:]), bias)


def places_of(model: nn.Module, width: Width) -> Places:
    """Where the features of one entry go, in the layer as it is."""
    outputs = len(rows_of(layer_at(model, width.layer)))
    if width.neurons % width.heads or outputs % width.heads:
        raise ValueError(
            f"The record widens layer {width.layer!r} by {width.neurons} neurons in {width.heads} "
            "heads; it belongs to another model."
        )
    return Places(outputs, width.neurons, width.heads)


def widen_outputs(
    model: nn.Module,
    width: Width,
    places: Places,
    values: NewNeurons | None,
    relatives: Relatives | None,
    optimizer: Optimizer | None,
) -> None:
    """Give a layer its new neurons, and their partners and norms the same number."""
    if relatives is not None and relatives.start is not None:
        values = relatives.start
    _widen_rows(layer_at(model, width.layer), places, values, optimizer)
    if width.role == "qk":
        # The partner's new features are 0: q.k stays, and their gradient is not 0, because the
        # new features they are multiplied with are not.
        other = layer_at(model, width.follower)
        _widen_rows(other, Places(len(rows_of(other)), places.new, places.heads), None, optimizer)
    for number, name in enumerate(width.partners):
        copies = None if relatives is None else relatives.partners[number]
        _widen_rows(layer_at(model, name), places, copies, optimizer)
    for number, name in enumerate(width.norms):
        statistics = None if relatives is None or number else relatives.statistics
        if values is not None and values.mean is not None and values.variance is not None:
            statistics = values.mean, values.variance
        _widen_norm(model.get_submodule(name), places, statistics, optimizer)


def widen_readers(
    model: nn.Module,
    width: Width,
    places: Places,
    values: NewNeurons | None,
    relatives: Relatives | None,
    optimizer: Optimizer | None,
) -> None:
    """Give the layers that read the new features a column for each: 0, or their outgoing weights.

    At 0 the new features have no effect yet, but the columns a gradient.
    """
    for name in width.all_readers:
        reader = layer_at(model, name)
        for inner in reader.modules():
            if not has_neurons(inner):
                continue
            fill = None
            outgoing = None if values is None else values.outgoing
            if relatives is not None and relatives.columns:
                outgoing = relatives.columns[name]
            if inner is reader and outgoing is not None:
                # Rows that the reader itself has got in this step read nothing new.
                fill = as_rows(inner, _padded(outgoing, len(rows_of(inner))))
            _replace(inner, "weight", places, 1 - output_axis(inner), fill, optimizer)
            resize(inner, 1, places.new)
        if values is not None and values.reader_bias is not None:
            assert reader.bias is not None
            shift = _padded(values.reader_bias, len(reader.bias)).to(reader.bias)
            _replace(reader, "bias", Places(len(shift), 0, 1), 0, None, optimizer)
            reader.bias.data.add_(shift)  # of a parameter of its own by now


def _padded(values: Tensor, rows: int) -> Tensor:
    """With rows of 0 behind, so that there are as many."""
    return torch.cat([values, values.new_zeros(rows - len(values), *values.shape[1:])])


def _widen_rows(
    layer: Layer,
    places: Places,
    values: NewNeurons | None,
    optimizer: Optimizer | None,
) -> None:
    fill = None if values is None else as_rows(layer, values.weight)
    _replace(layer, "weight", places, output_axis(layer), fill, optimizer)
    if layer.bias is not None:
        _replace(layer, "bias", places, 0, None if values is None else values.bias, optimizer)
    resize(layer, 0, places.new)
    if isinstance(layer, GrownLinear | GrownConv2d):
        for branch in layer.branches:
            if isinstance(branch, Branch):
                outputs = places.of_old(torch.device("cpu"))[list(branch.outputs)]
                branch.set_outputs(outputs.tolist(), branch.index.device)


def _widen_norm(
    norm: nn.Module,
    places: Places,
    statistics: tuple[Tensor, Tensor] | None,
    optimizer: Optimizer | None,
) -> None:
    """New features are scaled by 1 and shifted by 0; what divides by all is made up for."""
    for name, start in (("weight", 1.0), ("bias", 0.0)):
        parameter = norm._parameters.get(name)
        if parameter is not None:
            fill = torch.full((places.new,), start, device=parameter.device)
            _replace(norm, name, places, 0, fill, optimizer)
    for number, (name, start) in enumerate((("running_mean", 0.0), ("running_var", 1.0))):
        buffer = norm._buffers.get(name)
        if buffer is not None:
            fill = torch.full((places.new,), start, device=buffer.device)
            fill = fill if statistics is None else statistics[number]
            norm._buffers[name] = _enlarged(buffer, places, 0, fill)
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        share = places.old / (places.old + places.new)
        assert norm.weight is not None
        with torch.no_grad():  # of a parameter of its own by now
            norm.weight[places.of_old(norm.weight.device)] *= share**0.5
        eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
        norm.eps = eps * share
        norm.normalized_shape = (places.old + places.new,)
    elif isinstance(norm, nn.GroupNorm):
        norm.num_groups += places.new // (norm.num_channels // norm.num_groups)
        norm.num_channels += places.new
    else:
        norm.num_features = int(norm.num_features) + places.new  # type: ignore[assignment,arg-type]


def _enlarged(tensor: Tensor, places: Places, dim: int, fill: Tensor | None = None) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] += places.new
    larger = tensor.new_zeros(shape)
    larger.index_copy_(dim, places.of_old(tensor.device), tensor.detach())
    if fill is not None:
        larger.index_copy_(dim, places.of_new(tensor.device), fill.to(larger))
    return larger


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
    new = nn.Parameter(_enlarged(old, places, dim, values), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = _enlarged(old.grad, places, dim)
    module._parameters[name] = new
    if optimizer is not None:
        exchange_with_state(
            optimizer, name, old, {name: new}, lambda value: [_enlarged(value, places, dim)]
        )
        indices = places.of_old(new.device), places.of_new(new.device)
        start_scales(optimizer.state.get(new, {}), dim, *indices)
    note_widened(old, new, dim, places.of_old(torch.device("cpu")))


def layer_at(model: nn.Module, name: str) -> Layer:
    """The layer of a path in a record.

    Raises:
        ValueError: there is none.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not can_be_widened(layer):
        raise ValueError(f"There is no linear layer or convolution to grow at {name!r}.")
    return layer


def layer_to_grow(model: nn.Module, name: str, outputs: Sequence[int]) -> Layer:
    """The layer that a record grows these outputs of.

    Raises:
        ValueError: there is none with so many.
    """
    layer = layer_at(model, name)
    if max(outputs) >= len(rows_of(layer)):
        raise ValueError(
            f"The record grows output {max(outputs)} of layer {name!r}, which has "
            f"{len(rows_of(layer))}; it belongs to another model."
        )
    return layer


def _norm_at(model: nn.Module, name: str, width: Width) -> nn.Module:
    try:
        norm = model.get_submodule(name)
    except AttributeError:
        norm = None
    if norm is None or type(norm) not in (*OF_EACH, *OF_ALL, nn.GroupNorm):
        raise ValueError(f"There is no normalisation to widen at {name!r}.")
    if isinstance(norm, nn.GroupNorm) and width.neurons % (norm.num_channels // norm.num_groups):
        raise ValueError(
            f"The record widens {name!r} by {width.neurons} channels, which are no whole groups of "
            f"{norm.num_channels // norm.num_groups}; it belongs to another model."
        )
    return norm
