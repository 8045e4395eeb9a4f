"""What takes h and dL/dh at every position from ordinary training passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from growkernels.growth.layer_insertion.gradient_sums import GradientSums
from growkernels.growth.layer_insertion.positions import Position
from growkernels.growth.taps import Tap
from growkernels.ops.virtual_grad import virtual_grad_norms

SAMPLE_ROWS = 4  # of the last recorded h, kept to check an insertion with
# h and dL/dh waiting for the op. Small networks wait for the end of the batch, so that all their
# positions are one call; large ones do not, because memory that the step would have reused has to
# be fetched from the system instead, which costs more than the op itself.
WAITING_BYTES = 32 * 2**20


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
        self._arrivals: dict[str, Arrival] = {}  # waiting for the op
        self._batch = GradientSums()  # of the batch being recorded
        self._base_buffers: dict[int, Tensor] = {}  # kept from batch to batch
        self._base_arrived: set[int] = set()
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
        self._base_buffers.update(self.sums.base)
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
        self._arrivals, self._batch = {}, GradientSums()
        self._base_arrived.clear()
        for handle in self._handles_of_batch:
            handle.remove()

    def finish(self, loss_scale: float) -> None:
        """Add the batch to the sums.

        Raises:
            RuntimeError: a position without a gradient, with more than one, or with an h that was
                changed in place. The batch is dropped, earlier ones are kept.
        """
        self._take_arrivals()
        for position in self.positions:
            if position.name not in self._batch.virtual:
                self._problems.append(self._why_missing(position.name))
        if self._problems:
            raise RuntimeError(self._problems[0])
        self.sums.rescale(loss_scale)
        for name, gradient in self._batch.virtual.items():
            _add_to(self.sums.virtual, name, gradient)
            _add_to(self.sums.second_moments, name, self._batch.second_moments[name])
        for index in self._base_arrived:
            if index in self.sums.base:
                self.sums.base[index] += self._base_buffers[index]
            else:
                self.sums.base[index] = self._base_buffers.pop(index)
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
        elif name in self._arrivals or name in self._batch.virtual or not taken:
            self._problems.append(
                f"Position {name!r} got more than one gradient in one recording: the module runs "
                "more than once per forward pass (give each use its own module), or several "
                "batches share one `with recording()` (use one each)."
            )
        else:
            h, version = taken.pop()
            self._arrivals[name] = Arrival(h, version, grad, grad._version)
            if sum(a.h.nbytes + a.grad.nbytes for a in self._arrivals.values()) > WAITING_BYTES:
                self._take_arrivals()

    def _base_grad_arrived(self, index: int, grad: Tensor) -> None:
        if index in self._base_arrived:
            self._base_buffers[index] += grad
            return
        self._base_arrived.add(index)
        buffer = self._base_buffers.get(index)
        if buffer is None:
            buffer = self._base_buffers[index] = torch.empty_like(grad, dtype=_sum_dtype(grad))
        buffer.copy_(grad)

    def _take_arrivals(self) -> None:
        """The gradients of the virtual layers whose h and dL/dh are waiting; lets go of those.

        Runs inside backward hooks, so what is wrong is kept for `finish` to raise.
        """
        for name, arrival in self._arrivals.items():
            if arrival.h._version != arrival.h_version or (
                arrival.grad._version != arrival.grad_version
            ):
                self._problems.append(
                    f"The output of {name!r} was changed in place after it was recorded; use "
                    "inplace=False in the operation behind it."
                )
        if not self._problems:
            try:
                with torch.no_grad():
                    for group in self._groups():
                        self._add_virtual_grads(group)
            except (RuntimeError, TypeError, ValueError) as error:
                self._problems.append(str(error))
        self._arrivals = {}

    def _why_missing(self, name: str) -> str:
        return self._unusable.get(name) or (
            f"No gradient reached position {name!r}: the loss does not depend on it, no backward "
            "pass ran inside recording(), or the model ran compiled (record with the plain module)."
        )

    def _groups(self) -> list[list[Position]]:
        """The waiting positions that one call of the op can take: same kind, same device."""
        groups: dict[tuple[str, torch.device], list[Position]] = {}
        for position in self.positions:
            if position.name in self._arrivals:
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
        for name, h in zip(names, inputs, strict=True):
            self.samples[name] = h[:SAMPLE_ROWS].clone()
            if kind == "conv2d_relu":
                self._feature_maps[name] = _feature_map(h)
        sums = [h.new_zeros(_gradient_shape(kind, h), dtype=_sum_dtype(h)) for h in inputs]
        moments = inputs[0].new_zeros(len(names), dtype=sums[0].dtype)
        virtual_grad_norms(
            inputs,
            grads,
            kind,
            sums,
            second_moments=moments,
            activation=self.activation,
            scale=self.scale,
        )
        self._batch.virtual.update(zip(names, sums, strict=True))
        self._batch.second_moments.update(zip(names, moments.unbind(), strict=True))

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


def _add_to(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    if name in sums:
        sums[name] += term
    else:
        sums[name] = term


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _feature_map(h: Tensor) -> tuple[int, int]:
    return h.shape[-2], h.shape[-1]


def _gradient_shape(kind: str, h: Tensor) -> tuple[int, ...]:
    if kind == "conv2d_relu":
        return (h.shape[1], h.shape[1], 3, 3)
    return (h.shape[-1], h.shape[-1])
