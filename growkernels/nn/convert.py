"""Exchanging a model's convolutions for basis convolutions, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from growkernels.nn.basis_conv2d import (
    BasisConv2d,
    as_matrix,
    check_basis_channels,
    check_replaceable,
    weight_count,
    zeros_like_exchanged,
)
from growkernels.nn.compiled import without_compiling_wrapper
from growkernels.nn.exchange import (
    MOMENTUM,
    Places,
    check_holds_parameters,
    check_takes_parameters,
    exchange_parameters,
    obstacle,
    places_of,
    undone_on_error,
)
from growkernels.nn.kernel_factors import kernel_matrix
from growkernels.nn.module_paths import Plan
from growkernels.nn.momentum import to_factors, to_kernel
from growkernels.nn.optimizers import Optimizers, all_step_by, as_one, part_with
from growkernels.nn.record_fields import NUMBER, by_name, one_of
from growkernels.nn.records import Record, append_record, new_record, repeats
from growkernels.nn.tracing import call, evaluating, read_without_call, trace, unchanged
from growkernels.nn.wrappers import check_plain_module

Layer = nn.Conv2d | BasisConv2d
CONVERSION = "conversion"  # of this exchange's records
INITS = ("svd", "select")


@dataclass(frozen=True)
class ConvertedLayer:
    """One exchanged layer: its trained filters and weights (bias aside), before and after.

    ``error`` is the distance between the two equivalent kernels relative to the kernel's norm.
    """

    filters_before: int
    filters: int
    weights_before: int
    weights: int
    error: float


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did, by module path: the layers exchanged, and why others were not.

    ``record``: the same for ``gk.growth.rebuild`` and ``gk.growth.grow_state``; None if no layer
    was exchanged.
    """

    converted: dict[str, ConvertedLayer]
    skipped: dict[str, str]
    record: Record | None = None

    def __str__(self) -> str:
        lines = [
            f"{path}: {layer.filters_before} -> {layer.filters} trained filters, "
            f"{layer.weights_before:,} -> {layer.weights:,} weights, "
            f"kernel changed by {layer.error:.1%}"
            for path, layer in self.converted.items()
        ]
        lines += [f"{path}: skipped, {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines) or "nothing to convert"


def convert(
    model: nn.Module,
    plan: Mapping[str, int | float],
    optimizer: Optimizers | None = None,
    init: str = "svd",
    *,
    record_only: bool = False,
    sample: Any = None,
) -> Conversion:
    """Exchange the layers a plan names for basis convolutions, or back, in place.

    A plan maps module paths to numbers of trained filters R (int), or fractions of the output
    channels (float in (0, 1], rounded to the nearest number from 1 up). An nn.Conv2d becomes
    ``BasisConv2d.from_conv(conv, R, init)``; a BasisConv2d of another R becomes one of this R; a
    BasisConv2d whose R is all its output channels becomes the equivalent nn.Conv2d. Skipped, with
    the reason in the result: layers that have that many filters already, and numbers of filters
    that need no fewer weights and multiplications than the full kernel.

    Every other parameter stays the same object, biases of exchanged layers included. In the
    optimizer the new parameters take the place of the old ones in their group, and all others keep
    their state. For torch.optim.SGD the momentum goes along: a buffer is a weighted sum of
    gradients, so the factors' buffers are what those gradients would have left at the new values by
    the chain rule, and a kernel's buffer is the smallest one from which the chain rule gives the
    factors' (exchanging a layer back and forth restores the momentum that the factors had; the
    weight decay inside a buffer is carried as if it were a gradient). Other optimizers keep squares
    of gradients too, which have no such rule, so there new parameters start without state, as do
    those of an SGD without momentum. Gradients (``.grad``) of exchanged parameters are dropped.

    The whole plan is checked first, and on any error model and optimizer are as before. Compiled
    models compile again at the next call. The exchange is noted among the model's records
    (``gk.growth.insertions``), and ``gk.growth.rebuild`` repeats it.

    Args:
        model: any module, compiled or not; not a DataParallel wrapper.
        plan: {module path: R or fraction}. One from ``BasisSearch.plan`` is carried out on the
            layers it was made for, wherever in the model they are by now.
        optimizer: the model's optimizer, a list of them, or None.
        init: ``"svd"`` or ``"select"``, see :meth:`BasisConv2d.from_conv`.
        record_only: say what would be done, and leave model and optimizer as they are.
        sample: an input (a tensor, a tuple of arguments, or a dict of keyword arguments). A pass on
            it shows whether the model reads the weights of a named layer without calling it, and
            one afterwards whether it runs with the new layers.

    Raises:
        TypeError: an optimizer whose state can take no parameter; a model that is none, or has a
            wrapped or sharded part.
        ValueError: a path that is not there, is the model itself, is no convolution that a basis
            convolution can replace (from_conv says which), is used in several places, shares its
            weights or carries hooks; a kernel with NaN or infinity, or one that its basis and
            coefficients make and that overflows; an R or fraction out of range; an unknown init; an
            optimizer that holds no parameter of the model; with a sample, a layer whose weight the
            model reads itself, or an error of the model on the sample, before or afterwards.
    """
    check_plain_module(model)
    model = without_compiling_wrapper(model)
    if not isinstance(plan, Mapping):
        raise TypeError(
            f"The plan is a {type(plan).__name__}; pass a dictionary of module paths and numbers "
            "or fractions of filters."
        )
    if init not in INITS:
        raise ValueError(f"Unknown init {init!r}; choose 'svd' or 'select'.")
    optimizer = as_one(optimizer)
    wanted, skipped = _read(model, _followed(model, plan), init)
    if sample is not None:
        for path, user in weights_read_elsewhere(model, sample).items():
            if path in wanted:
                raise ValueError(
                    f"{path!r} cannot be converted. Its weight is also used in {user}."
                )
    exchanged = _all_exchanged(model, wanted, init, optimizer)
    record = new_record(CONVERSION, plan=wanted, init=init) if wanted else None
    done = Conversion({path: _compared(*pair) for path, pair in exchanged.items()}, skipped, record)
    if record_only or record is None:
        return done
    with undone_on_error(model, optimizer):
        _exchange(model, exchanged, optimizer)
        append_record(model, record)
        if sample is not None:
            _check_runs(model, sample, wanted)
        return done


def weights_read_elsewhere(model: nn.Module, sample: Any) -> dict[str, str]:
    """{path: what reads its weight without calling it, in words} of a model's convolutions.

    Raises:
        ValueError: the model raises an error on the sample.
    """
    layers = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d | BasisConv2d)}
    return read_without_call(trace(model, sample), layers)


def _check_runs(model: nn.Module, sample: Any, paths: Collection[str]) -> None:
    try:
        with unchanged(model), evaluating(model):
            call(model, sample)
    except Exception as error:
        raise ValueError(
            f"The model does not run on the sample with {', '.join(map(repr, paths))} converted: "
            f"{type(error).__name__} ({error}). It needs more of a layer than to call it; leave "
            "that one out. Model and optimizer are as before."
        ) from error


@repeats(CONVERSION, fields={"plan": by_name(NUMBER), "init": one_of(INITS)})
def repeat_conversion(
    model: nn.Module, record: Mapping[str, Any], optimizer: Optimizer | None
) -> None:
    """Exchange the layers that a record names; not undone on error.

    Where weights have no finite values (on the meta device, or before a checkpoint is loaded),
    there is nothing to approximate, and the new ones are 0.
    """
    wanted, skipped = _read(model, record["plan"], record["init"])
    for path, reason in skipped.items():
        raise ValueError(
            f"The record converts {path!r} to {record['plan'][path]} filters, which this model "
            f"does not need: {reason}; it belongs to another model."
        )
    exchanged = _all_exchanged(model, wanted, record["init"], optimizer, or_zeros=True)
    _exchange(model, exchanged, optimizer)


def _all_exchanged(
    model: nn.Module,
    wanted: Mapping[str, int],
    init: str,
    optimizer: Optimizer | None,
    or_zeros: bool = False,
) -> dict[str, tuple[Layer, Layer]]:
    """path -> the old layer and the new one, which is in no model yet."""
    if optimizer is not None:
        check_takes_parameters(optimizer)
        check_holds_parameters(model, optimizer)
    exchanged: dict[str, tuple[Layer, Layer]] = {}
    for path, filters in wanted.items():
        try:
            old = model.get_submodule(path)
            assert isinstance(old, Layer)
            as_zeros = or_zeros and not _has_values(old)
            exchanged[path] = old, _exchanged(old, filters, init, as_zeros)
        except ValueError as error:
            raise ValueError(f"{path!r} cannot be converted. {error}") from None
    if optimizer is not None:
        _check_momentum(optimizer, [old for old, _ in exchanged.values()])
    return exchanged


def _exchange(
    model: nn.Module,
    exchanged: Mapping[str, tuple[Layer, Layer]],
    optimizer: Optimizer | None,
) -> None:
    for path, (old, new) in exchanged.items():
        parent, _, child = path.rpartition(".")
        model.get_submodule(parent)._modules[child] = new
        if optimizer is not None:
            momentum = _momentum(optimizer, old, new)
            exchange_parameters(optimizer, _weights(old), _weights(new))
            for parameter, buffer in momentum:
                optimizer.state[parameter][MOMENTUM] = buffer


def _followed(model: nn.Module, plan: Mapping[str, int | float]) -> Mapping[str, int | float]:
    """The plan at the paths where its layers are now, if it knows which layers these are."""
    if not isinstance(plan, Plan):
        return plan
    followed: dict[str, int | float] = {}
    for path, filters in plan.items():
        now = plan.place_now(model, path)
        if now is None:
            raise ValueError(
                f"The plan names {path!r}, where the model has another layer than it was made "
                "for: the model was changed since. Plan anew."
            )
        followed[now] = filters
    return followed


def _read(
    model: nn.Module, plan: Mapping[str, int | float], init: str
) -> tuple[dict[str, int], dict[str, str]]:
    """The plan as numbers of filters, and what is left out for which reason."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places = places_of(model)
    wanted: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for path, value in plan.items():
        layer = modules.get(path)
        if layer is None:
            raise ValueError(f"The plan names {path!r}, which is not a module of the model.")
        if layer is model:
            raise ValueError(
                "The plan names the model itself, which cannot be exchanged inside itself; call "
                "BasisConv2d.from_conv, or put the layer into an nn.Sequential."
            )
        try:
            filters = _check_layer(layer, value, places)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path!r} cannot be converted. {error}") from None
        reason = _reason_to_skip(layer, filters, init)
        if reason:
            skipped[path] = reason
        else:
            wanted[path] = filters
    return wanted, skipped


def _check_layer(layer: nn.Module, value: int | float, places: Places) -> int:
    """The number of filters that a plan's value means for a layer; raises where it cannot be."""
    if not isinstance(layer, BasisConv2d):
        check_replaceable(layer)
    assert isinstance(layer, Layer)
    if reason := obstacle(layer, places, kept=[layer.bias]):
        raise ValueError(f"{reason[0].upper()}{reason[1:]}.")
    more = {*layer._parameters, *layer._buffers, *layer._modules} - {*_weights(layer), "bias"}
    if more:
        raise ValueError(
            f"It has members of its own ({', '.join(sorted(more))}), which the new layer would not "
            "have; keep them in another module."
        )
    if isinstance(value, int) and not isinstance(value, bool):
        filters = value
    elif isinstance(value, float) and 0 < value <= 1:
        filters = max(1, round(value * layer.out_channels))
    else:
        raise ValueError(
            f"The plan asks for {value!r}; give a number of filters (int), or a fraction of the "
            "output channels (float) above 0 and up to 1."
        )
    check_basis_channels(filters, layer.out_channels)
    return filters


def _reason_to_skip(layer: nn.Module, filters: int, init: str) -> str:
    assert isinstance(layer, Layer)
    basis = isinstance(layer, BasisConv2d)
    if filters == layer.out_channels:
        return "" if basis else f"its full kernel already trains all {filters} filters"
    if basis and filters == layer.basis_channels:
        return f"already a basis convolution with {filters} filters"
    taps = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    needed = weight_count(taps, layer.out_channels, filters, include_basis=init == "svd")
    full = taps * layer.out_channels
    if needed >= full:
        return f"{filters} filters need {needed:,} weights, the full kernel needs {full:,}"
    return ""


def _exchanged(old: Layer, filters: int, init: str, as_zeros: bool) -> Layer:
    new: Layer
    if as_zeros:
        new = zeros_like_exchanged(old, filters, init)
    else:
        conv = old.to_conv() if isinstance(old, BasisConv2d) else old
        if conv is not old and not bool(conv.weight.isfinite().all()):
            raise ValueError(
                "The kernel that its basis and coefficients make has NaN or infinity, or overflows "
                f"{conv.weight.dtype}, so no convolution computes the same; use smaller weights."
            )
        full = filters == old.out_channels
        new = conv if full else BasisConv2d.from_conv(conv, filters, init)
    new.bias = old.bias
    return new


def _has_values(layer: Layer) -> bool:
    weights = _weights(layer).values()
    return all(not w.is_meta and bool(w.isfinite().all()) for w in weights)


def _weights(layer: Layer) -> dict[str, nn.Parameter]:
    if isinstance(layer, BasisConv2d):
        return {"basis": layer.basis, "coeff": layer.coeff}
    return {"weight": cast(nn.Parameter, layer.weight)}


def _factors(layer: BasisConv2d) -> tuple[Tensor, Tensor, bool]:
    return as_matrix(layer.basis), as_matrix(layer.coeff), layer.include_basis


def _momentum(optimizer: Optimizer, old: Layer, new: Layer) -> list[tuple[nn.Parameter, Tensor]]:
    """The momentum buffers of the new layer's weights; none where the old ones had none."""
    if not all_step_by(optimizer, SGD, _weights(old).values()):
        return []
    buffers = [optimizer.state.get(p, {}).get(MOMENTUM) for p in _weights(old).values()]
    if any(buffer is None or buffer.is_meta for buffer in buffers):
        return []
    matrices = [as_matrix(buffer) for buffer in buffers]
    if isinstance(old, BasisConv2d):
        of_basis, of_coeff = matrices
        matrices = [to_kernel(of_basis, of_coeff, *_factors(old))]
    if isinstance(new, BasisConv2d):
        matrices = list(to_factors(matrices[0], *_factors(new)))
    return [
        (parameter, torch.empty_like(parameter).copy_(matrix.view(parameter.shape)))
        for parameter, matrix in zip(_weights(new).values(), matrices, strict=True)
    ]


def _check_momentum(optimizer: Optimizer, layers: Sequence[Layer]) -> None:
    """Raise TypeError if a momentum would be lost that may be worth as much as that of SGD."""
    for parameter in (p for layer in layers for p in _weights(layer).values()):
        part = part_with(optimizer, parameter)
        if isinstance(part, SGD) or type(part).__module__.partition(".optim")[0] == "torch":
            continue
        if MOMENTUM in part.state.get(parameter, {}):
            raise TypeError(
                f"{type(part).__name__} keeps a {MOMENTUM!r}, and what it is worth for other "
                "weights is known of torch's optimizers alone; pass optimizer=None and build a new "
                "optimizer afterwards."
            )


def _compared(old: Layer, new: Layer) -> ConvertedLayer:
    before, after = _kernel(old), _kernel(new)
    norm = float(before.norm())
    return ConvertedLayer(
        filters_before=_filters(old),
        filters=_filters(new),
        weights_before=sum(p.numel() for p in _weights(old).values()),
        weights=sum(p.numel() for p in _weights(new).values()),
        error=float((after - before).norm()) / norm if norm else 0.0,
    )


def _kernel(layer: Layer) -> Tensor:
    if isinstance(layer, BasisConv2d):
        return kernel_matrix(*_factors(layer))
    return as_matrix(layer.weight)


def _filters(layer: Layer) -> int:
    return layer.basis_channels if isinstance(layer, BasisConv2d) else layer.out_channels
