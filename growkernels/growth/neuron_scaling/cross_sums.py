"""Products of a layer's inputs with the gradients behind the layer that reads it, over batches.

For a layer with inputs x whose outputs, through an activation, are the inputs h of its reader, with
g = dL/dz [M, D] at the reader's output z: what GradMax and TINY need is gᵀx, gᵀh, xᵀx, hᵀx and
hᵀh, summed over any number of batches. All five are gradients of layers that do not exist
(``gk.virtual_grads`` of the kind "linear"), so no rows are kept. Of convolutions x and h are
patches, and products of x with what the reader computes are taken for each tap of its kernel (see
``cross_rows``), which is exact at borders and for any stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.cross_rows import outputs, patches, read_by_taps, with_ones
from growkernels.growth.neuron_scaling.neuron_rows import has_neurons
from growkernels.growth.neuron_scaling.recording import LayerRecorder
from growkernels.growth.taps import ForwardPass, sum_dtype
from growkernels.ops.virtual_grad import virtual_grads


@dataclass
class CrossSums:
    """Of one layer, over the batches so far; K is the number of taps.

    h has a last column of 1 where the reader has a bias; where more than ``cross`` is summed, and
    no batch norm follows, x has one where the layer has a bias. Behind a batch norm x is without
    its mean over the places of each forward pass.

    Attributes:
        cross: [D K, d], gᵀx by taps.
        passed, inputs: gᵀh, and xᵀx over all places; empty where they are not needed.
        mixed, hidden: [K dh, d], hᵀx by taps, and hᵀh; empty likewise.
        rows: M, the outputs of the reader.
        squares: sum over the batches of the squared norm of a batch's own ``cross``.
        places: of the layer's outputs; as many as rows of linear layers.
        totals: [d], sum of x over all places, its mean included; empty without a batch norm.
    """

    cross: Tensor
    passed: Tensor
    inputs: Tensor
    mixed: Tensor
    hidden: Tensor
    rows: int
    squares: float
    places: int
    totals: Tensor

    def added(self, other: CrossSums) -> CrossSums:
        """Both together."""
        theirs = vars(other)
        return CrossSums(**{name: value + theirs[name] for name, value in vars(self).items()})


@dataclass
class _Rows:
    """What a reader's gradient is multiplied with, with the versions that the tensors had."""

    x: Tensor
    x_version: int
    h: Tensor
    h_version: int


class CrossRecorder(LayerRecorder[CrossSums]):
    """Watches layers and their readers.

    Args:
        covariances: whether xᵀx, hᵀx and hᵀh are summed too (TINY).
    """

    def __init__(
        self, model: nn.Module, candidates: Sequence[Candidate], *, covariances: bool
    ) -> None:
        super().__init__()
        self._covariances = covariances
        self._read: dict[nn.Module, nn.Module] = {}  # reader -> the layer in front of it
        self._normed: set[nn.Module] = set()  # layers in front of a batch norm
        self._inputs: dict[nn.Module, tuple[Tensor, int]] = {}
        self.watch(model, candidates)

    def watch(self, model: nn.Module, candidates: Sequence[Candidate]) -> None:
        """Watch these candidates from now on; what was recorded is forgotten."""
        names: dict[nn.Module, str] = {}
        read: dict[nn.Module, nn.Module] = {}
        normed: set[nn.Module] = set()
        for candidate in candidates:
            assert candidate.widening is not None
            layer = model.get_submodule(candidate.name)
            names[layer] = candidate.name
            read[model.get_submodule(candidate.widening.follower)] = layer
            if candidate.widening.norms:
                normed.add(layer)
        self._watch(names, dict.fromkeys([*names, *read]))
        self._read, self._normed = read, normed

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        super().end()
        self._inputs.clear()

    def _joined(self, old: CrossSums, new: CrossSums) -> CrossSums:
        return old.added(new)

    def _of_batch(self, name: str, of_layer: CrossSums, loss_scale: float) -> CrossSums:
        cross = of_layer.cross / loss_scale
        squares = float(cross.double().square().sum())
        passed = of_layer.passed / loss_scale
        return replace(of_layer, cross=cross, passed=passed, squares=squares)

    def _of_gradients(self, of_layer: CrossSums) -> tuple[Tensor]:
        return (of_layer.cross,)

    def _no_gradient(self, name: str) -> str:
        return (
            f"No gradient reached the layer that reads {name!r}: the loss does not depend on it, "
            "no backward pass ran inside recording(), everything in front of it is frozen, an "
            "input was passed by keyword, or the model ran compiled. Leave it out of layers=, or "
            "record with the plain module."
        )

    def forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called by the hooks after every forward pass of a watched module."""
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        layer = self._read.get(module)
        if layer is not None and layer in self._inputs and output.requires_grad:
            x, version = self._inputs.pop(layer)
            h = args[0].detach()
            rows = _Rows(x, version, h, args[0]._version)
            ForwardPass(module, output, rows).tell(self, output)
        if module in self._names:
            self._inputs[module] = args[0].detach(), args[0]._version

    def gradient_arrived(self, forward: ForwardPass, grad: Tensor) -> None:
        """Called when the gradient of a reader's output has arrived."""
        reader, rows = forward.module, forward.kept
        layer = self._read.get(reader)
        name = None if layer is None else self._names.get(layer)
        if name is None or layer is None:
            return
        if (obstacle := self._passes.obstacle(forward)) is not None:
            self._problems.append(f"The layer that reads {name!r} {obstacle}")
            return
        if rows.x._version != rows.x_version or rows.h._version != rows.h_version:
            self._problems.append(
                f"The input of layer {name!r} or of the layer that reads it was changed in place "
                "after its use; use inplace=False there."
            )
            return
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            sums = self._sums(layer, reader, rows, grad)
        if sums is None:
            self._problems.append(
                f"Layer {name!r} and the layer that reads it have run on other rows: shapes "
                f"{tuple(rows.x.shape)} and {tuple(rows.h.shape)}; leave it out of layers=."
            )
            return
        old = self._batch.get(name)
        self._batch[name] = sums if old is None else old.added(sums)

    def _sums(
        self, layer: nn.Module, reader: nn.Module, rows: _Rows, grad: Tensor
    ) -> CrossSums | None:
        """None: the reader has not read what the layer made."""
        assert has_neurons(layer)
        assert has_neurons(reader)
        dtype = sum_dtype(torch.promote_types(rows.x.dtype, grad.dtype))
        x = patches(layer, rows.x.to(dtype))
        if not isinstance(layer, nn.Conv2d):
            fits = rows.h.shape[:-1] == rows.x.shape[:-1]
        else:
            fits = rows.h.shape[:-3] == rows.x.shape[:-3] and rows.h.shape[-2:] == x.shape[1:3]
        if not fits:
            return None
        places = x.shape[:-1].numel()
        empty = totals = x.new_zeros(0)
        normed = layer in self._normed
        if normed:
            totals = x.flatten(0, -2).sum(0)
            x = x - totals / places
        elif self._covariances:
            x = with_ones(x, layer.bias is not None)
        g = outputs(reader, grad.detach().to(dtype))
        h = empty
        if self._covariances:
            h = with_ones(patches(reader, rows.h.to(dtype)), reader.bias is not None).flatten(0, -2)
        cross, mixed = [], []
        for read in read_by_taps(reader, x):
            cross += virtual_grads([read], [g], "linear")
            mixed += virtual_grads([read], [h], "linear") if self._covariances else []
        x = x.flatten(0, -2)
        covariance = self._covariances or normed
        passed = hidden = empty
        if self._covariances:
            passed, hidden = virtual_grads([h, h], [g, h], "linear")
        return CrossSums(
            cross=torch.stack(cross, 1).flatten(0, 1),
            passed=passed,
            inputs=virtual_grads([x], [x], "linear")[0] if covariance else empty,
            mixed=torch.cat(mixed) if mixed else empty,
            hidden=hidden,
            rows=len(g),
            squares=0.0,
            places=places,
            totals=totals,
        )
