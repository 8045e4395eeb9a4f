"""What takes h and dL/dh at every position from ordinary training passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from growkernels.growth.layer_insertion.base_weights import BaseWeights
from growkernels.growth.layer_insertion.block_copies import BLOCK, first_tensor, identity_copy
from growkernels.growth.layer_insertion.block_merits import BlockCall, watch_calls, zero_gradient
from growkernels.growth.layer_insertion.gradient_sums import GradientSums
from growkernels.growth.layer_insertion.positions import Position
from growkernels.growth.taps import BackwardPasses, ForwardPass, remove, sum_dtype, watch
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
        self.positions: list[Position] = []
        self.activation = activation
        self.scale = scale
        self.sums = GradientSums()
        self.recording = False
        self._arrivals: dict[str, Arrival] = {}  # waiting for the op
        self._blocks: dict[str, Arrival] = {}  # the same of blocks, until the end of the batch
        self._batch = GradientSums()  # of the batch being recorded
        self._passes = BackwardPasses()  # of the same
        self._base_buffers: dict[int, Tensor] = {}  # kept from batch to batch
        self._problems: list[str] = []
        self._unusable: dict[nn.Module, str] = {}
        self._names: dict[nn.Module, str] = {}
        self._base: BaseWeights
        self._handles_of_batch: list[RemovableHandle] = []
        self._model: weakref.ref[nn.Module]
        self._calls: dict[nn.Module, BlockCall] = {}  # how blocks were called last
        self.remove: Callable[[], object] = lambda: None  # takes all hooks off the model
        self._closed = False
        self.watch(model, positions)

    def watch(self, model: nn.Module, positions: Sequence[Position]) -> None:
        """Watch these positions from now on; what was recorded is forgotten."""
        names: dict[nn.Module, str] = {}
        for position in positions:
            module = model.get_submodule(position.name)
            if module in names:
                raise ValueError(
                    f"Positions {names[module]!r} and {position.name!r} are the same module "
                    "object; give each its own (e.g. its own nn.ReLU())."
                )
            names[module] = position.name
        base = BaseWeights(model, {p.kind for p in positions}, self._base_grad_arrived)
        templates = [model.get_submodule(p.template) for p in positions if p.template]
        if not self._closed:
            remove_new = watch(self, dict.fromkeys([*names, *base.watched]))
            remove_calls = watch_calls(self, dict.fromkeys(templates))
            self.remove()
            self.remove = lambda: (remove_new(), remove_calls())
        self._model = weakref.ref(model)
        self._calls = {}
        self.positions, self._names = list(positions), names
        self._base = base
        self.sums, self._base_buffers = GradientSums(), {}

    def rename(self, paths: Mapping[str, str]) -> None:
        """Follow positions to the paths at which their modules are now."""
        positions = [position.renamed(paths) for position in self.positions]
        names = {module: paths[name] for module, name in self._names.items()}
        self.positions, self._names, self.sums = positions, names, self.sums.renamed(paths)

    def close(self) -> None:
        """Take all hooks off the model, for good."""
        self._closed = True
        self.remove()

    def reset(self) -> None:
        """Forget the recorded batches."""
        buffers = self.sums.base
        self.sums = GradientSums()
        self._base_buffers.update(buffers)

    def load(self, sums: GradientSums) -> None:
        """Go on from the sums of another recorder of such a model."""
        self.sums, self._base_buffers = sums, {}

    def begin(self) -> None:
        """Start one batch."""
        self.end()  # whatever an interrupt left
        self._problems = []
        self._passes = BackwardPasses()
        self._base.watch_parameters(self._handles_of_batch)
        self.recording = True

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        self.recording = False
        self._arrivals, self._blocks, self._batch = {}, {}, GradientSums()
        remove(self._handles_of_batch)
        self._handles_of_batch = []

    def finish(self, loss_scale: float) -> None:
        """Add the batch to the sums.

        Raises:
            RuntimeError: a position without a gradient, with more than one, or with an h that was
                changed in place. The batch is dropped, earlier ones are kept.
        """
        self._take_arrivals()
        self._take_blocks()
        self._calls = {}
        for module, name in self._names.items():
            if name not in self._batch.virtual:
                self._problems.append(self._unusable.get(module) or _why_missing(name))
        if self._problems:
            raise RuntimeError(self._problems[0])
        before, batch = self.sums, self._batch
        batch.loss_scale = loss_scale
        if loss_scale != 1.0 and not batch.finite:  # a GradScaler skips this step too
            self.sums = replace(before, overflowed=before.overflowed + 1)
            return
        batch.feature_maps.update(self._base.feature_maps)
        sums = before.with_batch(batch)
        self._base_buffers = {}  # those of the batch are parts of the sums now, those of the
        self.sums = sums  # earlier sums are free
        self._base_buffers = {i: before.base[i] for i in batch.base if i in before.base}

    def forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called by the hooks after every forward pass of a watched module."""
        if module in self._base.watched:
            self._base.forward_ran(module, args, output)
        name = self._names.get(module)
        if name is None:
            return
        kind = self._position(name).kind
        if kind == BLOCK:
            output = first_tensor(output)
        if (reason := _why_unusable(output, kind)) is not None:
            self._unusable[module] = f"Position {name!r} {reason}"
        else:
            self._unusable.pop(module, None)
            ForwardPass(module, output, (output.detach(), output._version)).tell(self, output)

    def gradient_arrived(self, forward: ForwardPass, grad: Tensor) -> None:
        """Called when dL/dh of a position's forward pass has arrived, inside a recording."""
        name = self._names.get(forward.module)
        if name is None:  # watched when it ran, but no more
            return
        if (obstacle := self._passes.obstacle(forward)) is not None:
            self._problems.append(f"Position {name!r} {obstacle}")
        elif name in self._arrivals or name in self._blocks or name in self._batch.virtual:
            self._problems.append(
                f"Position {name!r} got more than one gradient in one recording: the module runs "
                "more than once per forward pass; give each use its own module."
            )
        else:
            h, version = forward.kept
            arrival = Arrival(h, version, grad, grad._version)
            if self._position(name).kind == BLOCK:
                self._blocks[name] = arrival
                return
            self._arrivals[name] = arrival
            if sum(a.h.nbytes + a.grad.nbytes for a in self._arrivals.values()) > WAITING_BYTES:
                self._take_arrivals()

    def _base_grad_arrived(self, index: int, grad: Tensor) -> None:
        if not self.recording:
            return
        if (obstacle := self._passes.obstacle_of_weight(index, grad)) is not None:
            self._problems.append(f"An existing weight of the model {obstacle}")
            return
        arrived = self._batch.base.get(index)
        if arrived is not None:
            arrived += grad
            return
        buffer = self._base_buffers.get(index)
        if buffer is None:
            buffer = torch.empty_like(grad, dtype=sum_dtype(grad.dtype))
        self._base_buffers[index] = buffer.copy_(grad)
        self._batch.base[index] = buffer

    def _take_arrivals(self) -> None:
        """The gradients of the virtual layers whose h and dL/dh are waiting; lets go of those.

        Runs inside backward hooks, so what is wrong is kept for `finish` to raise.
        """
        self._check_unchanged(self._arrivals)
        if not self._problems:
            try:
                with torch.no_grad():
                    for group in self._groups():
                        self._add_virtual_grads(group)
            except (RuntimeError, TypeError, ValueError) as error:
                self._problems.append(str(error))
        self._arrivals = {}

    def _check_unchanged(self, arrivals: Mapping[str, Arrival]) -> None:
        for name, arrival in arrivals.items():
            writes = arrival.h._version - arrival.h_version
            # A relu that is called in place makes h of the output, where there was none before.
            expected = (0, 1) if self._position(name).relu_called else (0,)
            if writes not in expected or arrival.grad._version != arrival.grad_version:
                self._problems.append(
                    f"The output of {name!r} was changed in place after it was recorded; use "
                    "inplace=False in the operation behind it."
                )

    def _take_blocks(self) -> None:
        """The gradients of the blocks that would be inserted, from a forward of each alone."""
        self._check_unchanged(self._blocks)
        model = self._model()
        for position in self.positions:
            arrival = self._blocks.pop(position.name, None)
            if self._problems or arrival is None or model is None:
                continue
            template = model.get_submodule(position.template)
            if template not in self._calls:
                self._problems.append(
                    f"Block {position.template!r}, of which a copy would be inserted at "
                    f"{position.name!r}, did not run in this batch."
                )
                continue
            try:
                new = identity_copy(model, position.template, position.zero, position.seed)
                total = zero_gradient(
                    new, position.zero, arrival.h, arrival.grad, self._calls[template]
                )
            except (RuntimeError, TypeError, ValueError) as error:
                self._problems.append(f"Position {position.name!r}: {error}")
                continue
            self._batch.virtual[position.name] = total
            self._batch.second_moments[position.name] = total.square().sum()
            self._batch.samples[position.name] = arrival.h[:SAMPLE_ROWS].clone()

    def block_ran(self, module: nn.Module, call: BlockCall) -> None:
        """Called by the hooks after every forward pass of a block that may be copied."""
        self._calls[module] = call

    def _position(self, name: str) -> Position:
        return next(position for position in self.positions if position.name == name)

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
        inputs = [
            self._arrivals[p.name].h.relu() if p.relu_called else self._arrivals[p.name].h
            for p in group
        ]
        grads = [self._arrivals[name].grad for name in names]
        dtype = inputs[0].dtype
        for tensor in inputs:  # under autocast positions may differ
            dtype = torch.promote_types(dtype, tensor.dtype)
        # A sample without a batch dimension is a batch of one.
        inputs = [torch.atleast_2d(tensor.to(dtype)) for tensor in inputs]
        grads = [torch.atleast_2d(tensor.to(dtype)) for tensor in grads]
        for name, h in zip(names, inputs, strict=True):
            self._batch.samples[name] = h[:SAMPLE_ROWS].clone()
            if kind == "conv2d_relu":
                self._batch.feature_maps[name] = _feature_map(h)
        sums = [h.new_zeros(_gradient_shape(kind, h), dtype=sum_dtype(h.dtype)) for h in inputs]
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


def _why_unusable(output: Any, kind: str) -> str | None:
    """Why an output cannot be the h of a position of this kind, as the end of a sentence."""
    if not isinstance(output, Tensor):
        return f"returns a {type(output).__name__}; a tensor is needed."
    if output.is_complex():
        return f"returns {output.dtype}; layers are inserted on real numbers alone."
    if not output.requires_grad:
        return (
            "has no gradient because everything in front of it is frozen; leave it out of "
            "positions, or let an earlier parameter require a gradient."
        )
    if output.dim() == 0:
        return "returns a single number without axes; a layer acts on features [..., width]."
    if kind == "conv2d_relu" and output.dim() != 4:
        return (
            f"returns a tensor of shape {list(output.shape)}; a layer of kind {kind!r} acts on "
            "batches of images [N, C, H, W]."
        )
    return None


def _why_missing(name: str) -> str:
    return (
        f"No gradient reached position {name!r}: the loss does not depend on it, no backward "
        "pass ran inside recording(), or the model ran compiled (record with the plain module)."
    )


def _feature_map(h: Tensor) -> tuple[int, int]:
    return h.shape[-2], h.shape[-1]


def _gradient_shape(kind: str, h: Tensor) -> tuple[int, ...]:
    if kind == "conv2d_relu":
        return (h.shape[1], h.shape[1], 3, 3)
    return (h.shape[-1], h.shape[-1])
