"""Hooks that take h and dL/dh at every position from ordinary training passes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from growkernels.growth.gradient_sums import GradientSums
from growkernels.growth.positions import Position
from growkernels.ops.virtual_grad import virtual_grad_norms

SAMPLE_ROWS = 4  # of the last recorded h, kept to check an insertion with


class Tap:
    """A forward hook that a copied or pickled model carries along without effect."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Tensor hooks have no place in a compiled graph; the recorder reports what is missing.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        recorder = None if self._recorder is None else self._recorder()
        if recorder is not None:
            recorder.forward_ran(module, args, output)

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


@dataclass
class Arrival:
    """h of a position with dL/dh, and the versions both had when they were taken."""

    h: Tensor
    h_version: int
    grad: Tensor
    grad_version: int


class Recorder:
    """Watches the positions of one model and sums the gradients of their virtual layers.

    The hooks are on the modules as long as the recorder lives, because a forward pass may run
    before a recording begins; they keep h (an alias, never a copy) until its gradient arrived, as
    autograd does.
    """

    def __init__(
        self,
        model: nn.Module,
        positions: Sequence[Position],
        *,
        activation: str,
        scale: float,
    ) -> None:
        self.positions = list(positions)
        self.activation = activation
        self.scale = scale
        self.sums = GradientSums()
        self.samples: dict[str, Tensor] = {}
        self.recording = False
        self._model = model
        self._arrivals: dict[str, Arrival] = {}
        self._base_grads: dict[int, Tensor] = {}
        self._problems: list[str] = []
        self._unusable: dict[str, str] = {}
        self._feature_maps: dict[str | int, tuple[int, int]] = {}
        self._names: dict[nn.Module, str] = {}
        self._handles_of_batch: list[RemovableHandle] = []
        for position in self.positions:
            module = model.get_submodule(position.name)
            if module in self._names:
                raise ValueError(
                    f"Positions {self._names[module]!r} and {position.name!r} are the same module "
                    "object; give each its own (e.g. its own nn.ReLU())."
                )
            self._names[module] = position.name
        self._base: dict[nn.Module, int] = {
            layer: index for index, layer in enumerate(self._base_layers())
        }
        convolutions = [layer for layer in self._base if isinstance(layer, nn.Conv2d)]
        watched = dict.fromkeys([*self._names, *convolutions])
        self._handles = [module.register_forward_hook(Tap(self)) for module in watched]

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def watches(self, name: str) -> bool:
        """Whether the module at this path is still the one whose outputs are recorded."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        return name in modules and self._names.get(modules[name]) == name

    def reset(self) -> None:
        """Forget the recorded batches."""
        self.sums, self.samples = GradientSums(), {}

    def begin(self) -> None:
        """Start one batch."""
        self._problems = []
        self.recording = True
        self._handles_of_batch = [
            weight.register_hook(partial(self._base_grad_arrived, index))
            for layer, index in self._base.items()
            if isinstance(weight := layer.weight, Tensor) and weight.requires_grad
        ]

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        self.recording = False
        self._arrivals, self._base_grads = {}, {}
        for handle in self._handles_of_batch:
            handle.remove()

    def finish(self, loss_scale: float) -> None:
        """Add the batch to the sums.

        Raises:
            RuntimeError: a position without a gradient, with more than one, or with an h that was
                changed in place. The batch is dropped, earlier ones are kept.
        """
        self._check_arrivals()
        self.sums.rescale(loss_scale)
        try:
            for group in self._groups():
                self._add_virtual_grads(group)
        except BaseException:
            self.reset()  # no half-added batch stays behind
            raise
        for index, grad in self._base_grads.items():
            self._add_base_grad(index, grad)
        self.sums.feature_maps.update(self._feature_maps)
        self.sums.batches += 1

    def forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called by the hooks after every forward pass of a watched module."""
        index = self._base.get(module)
        if index is not None and isinstance(module, nn.Conv2d) and args:
            self._feature_maps[index] = _feature_map(args[0])
        name = self._names.get(module)
        if name is None:
            return
        if not isinstance(output, Tensor):
            self._unusable[name] = (
                f"Position {name!r} returns a {type(output).__name__}; a tensor is needed."
            )
        elif not output.requires_grad:
            self._unusable[name] = (
                f"Position {name!r} has no gradient because everything in front of it is frozen; "
                "leave it out of positions, or let an earlier parameter require a gradient."
            )
        else:
            self._unusable.pop(name, None)
            taken = [(output.detach(), output._version)]
            output.register_hook(partial(self._grad_arrived, name, taken))

    def _grad_arrived(self, name: str, taken: list[tuple[Tensor, int]], grad: Tensor) -> None:
        if not self.recording:
            taken.clear()
        elif name in self._arrivals or not taken:
            self._problems.append(
                f"Position {name!r} got more than one gradient in one recording: the module runs "
                "more than once per forward pass (give each use its own module), or several "
                "batches share one `with recording()` (use one each)."
            )
        else:
            h, version = taken.pop()
            self._arrivals[name] = Arrival(h, version, grad, grad._version)

    def _base_grad_arrived(self, index: int, grad: Tensor) -> None:
        earlier = self._base_grads.get(index)
        self._base_grads[index] = grad if earlier is None else earlier + grad

    def _check_arrivals(self) -> None:
        for position in self.positions:
            name = position.name
            arrival = self._arrivals.get(name)
            if arrival is None and name in self._unusable:
                self._problems.append(self._unusable[name])
            elif arrival is None:
                self._problems.append(
                    f"No gradient reached position {name!r}: the loss does not depend on it, no "
                    "backward pass ran inside recording(), or the model ran compiled (record with "
                    "the plain module)."
                )
            elif arrival.h._version != arrival.h_version or (
                arrival.grad._version != arrival.grad_version
            ):
                self._problems.append(
                    f"The output of {name!r} was changed in place after it was recorded; use "
                    "inplace=False in the operation behind it."
                )
        if self._problems:
            raise RuntimeError(self._problems[0])

    def _groups(self) -> list[list[Position]]:
        """The positions that one call of the op can take: same kind, same device."""
        groups: dict[tuple[str, torch.device], list[Position]] = {}
        for position in self.positions:
            device = self._arrivals[position.name].h.device
            groups.setdefault((position.kind, device), []).append(position)
        return list(groups.values())

    def _add_virtual_grads(self, group: list[Position]) -> None:
        kind = group[0].kind
        names = [position.name for position in group]
        inputs = [self._arrivals[name].h for name in names]
        grads = [self._arrivals[name].grad for name in names]
        dtype = inputs[0].dtype
        for tensor in inputs:  # under autocast positions may differ
            dtype = torch.promote_types(dtype, tensor.dtype)
        inputs = [tensor.to(dtype) for tensor in inputs]
        grads = [tensor.to(dtype) for tensor in grads]
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for name, h in zip(names, inputs, strict=True):
            self.samples[name] = h[:SAMPLE_ROWS].clone()
            if kind == "conv2d_relu":
                self._feature_maps[name] = _feature_map(h)
            if name not in self.sums.virtual:
                self.sums.virtual[name] = h.new_zeros(_gradient_shape(kind, h), dtype=sum_dtype)
                self.sums.second_moments[name] = h.new_zeros((), dtype=sum_dtype)
        moments = inputs[0].new_zeros(len(names), dtype=sum_dtype)
        virtual_grad_norms(
            inputs,
            grads,
            kind,
            [self.sums.virtual[name] for name in names],
            second_moments=moments,
            activation=self.activation,
            scale=self.scale,
        )
        for name, moment in zip(names, moments.unbind(), strict=True):
            self.sums.second_moments[name] += moment

    def _add_base_grad(self, index: int, grad: Tensor) -> None:
        total = self.sums.base.get(index)
        if total is None:
            # No copy: autograd does not hand out a tensor for .grad that somebody holds.
            keep = torch.float64 if grad.dtype == torch.float64 else torch.float32
            self.sums.base[index] = grad.to(keep)
        elif self.sums.batches == 1:
            self.sums.base[index] = total + grad  # the first batch's tensor may have other owners
        else:
            total.add_(grad)

    def _base_layers(self) -> list[nn.Linear | nn.Conv2d]:
        """The existing weight matrices that the candidates are compared with.

        Like with like: linear layers for linear and residual candidates, convolutions for
        convolutional ones.
        """
        kinds = {position.kind for position in self.positions}
        wanted: tuple[type[nn.Linear] | type[nn.Conv2d], ...] = ()
        if kinds & {"linear_relu", "residual"}:
            wanted += (nn.Linear,)
        if "conv2d_relu" in kinds:
            wanted += (nn.Conv2d,)
        layers = [m for m in self._model.modules() if isinstance(m, wanted)]
        unique = {id(layer.weight): layer for layer in layers}  # tied weights count once
        return list(unique.values())


def _feature_map(h: Tensor) -> tuple[int, int]:
    return h.shape[-2], h.shape[-1]


def _gradient_shape(kind: str, h: Tensor) -> tuple[int, ...]:
    if kind == "conv2d_relu":
        return (h.shape[1], h.shape[1], 3, 3)
    return (h.shape[-1], h.shape[-1])
