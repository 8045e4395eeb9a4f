"""Products of a layer's inputs with the gradients behind the layer that reads it, over batches.

For a linear layer with inputs x [M, d] whose outputs, through an activation, are the inputs h of
its reader, with g = dL/dz [M, D] at the reader's output z: what GradMax and TINY need is gᵀx, gᵀh,
xᵀx, hᵀx and hᵀh, summed over any number of batches. All five are gradients of layers that do not
exist (``gk.virtual_grads`` of the kind "linear"), so no rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.taps import BackwardPasses, ForwardPass, sum_dtype, watch
from growkernels.ops.virtual_grad import virtual_grads


@dataclass
class CrossSums:
    """Of one layer, over the batches so far.

    Where more than ``cross`` is summed, x and h have a last column of 1 where the layers have
    biases.

    Attributes:
        cross: [D, d], gᵀx.
        passed, inputs, mixed, hidden: gᵀh, xᵀx, hᵀx and hᵀh; empty where they are not needed.
        rows: M.
        squares: sum over the batches of the squared norm of a batch's own gᵀx.
    """

    cross: Tensor
    passed: Tensor
    inputs: Tensor
    mixed: Tensor
    hidden: Tensor
    rows: int
    squares: float = 0.0

    def added(self, other: CrossSums) -> CrossSums:
        """Both together."""
        return CrossSums(
            self.cross + other.cross,
            self.passed + other.passed,
            self.inputs + other.inputs,
            self.mixed + other.mixed,
            self.hidden + other.hidden,
            self.rows + other.rows,
            self.squares + other.squares,
        )


@dataclass
class Recording:
    """The layers' sums over the batches so far; ``overflowed``: see ``samples.Recording``."""

    layers: dict[str, CrossSums] = field(default_factory=dict)
    batches: int = 0
    overflowed: int = 0


@dataclass
class _Rows:
    """What a reader's gradient is multiplied with, with the versions that the tensors had."""

    x: Tensor
    x_version: int
    h: Tensor
    h_version: int


class CrossRecorder:
    """Watches layers and their readers; hooks stay on the modules as long as it lives.

    Args:
        covariances: whether xᵀx, hᵀx and hᵀh are summed too (TINY).
    """

    def __init__(
        self, model: nn.Module, candidates: Sequence[Candidate], *, covariances: bool
    ) -> None:
        self.recording = False
        self.kept = Recording()
        self._covariances = covariances
        self._names: dict[nn.Module, str] = {}
        self._read: dict[nn.Module, nn.Module] = {}  # reader -> the layer in front of it
        self._inputs: dict[nn.Module, tuple[Tensor, int]] = {}
        self._batch: dict[str, CrossSums] = {}
        self._passes = BackwardPasses()
        self._problems: list[str] = []
        self._closed = False
        self.remove: Callable[[], object] = lambda: None
        self.watch(model, candidates)

    def watch(self, model: nn.Module, candidates: Sequence[Candidate]) -> None:
        """Watch these candidates from now on; what was recorded is forgotten."""
        names: dict[nn.Module, str] = {}
        read: dict[nn.Module, nn.Module] = {}
        for candidate in candidates:
            assert candidate.widening is not None
            layer = model.get_submodule(candidate.name)
            names[layer] = candidate.name
            read[model.get_submodule(candidate.widening.follower)] = layer
        if not self._closed:
            remove_new = watch(self, dict.fromkeys([*names, *read]))
            self.remove()
            self.remove = remove_new
        self._names, self._read = names, read
        self.kept = Recording()

    def rename(self, paths: Mapping[str, str]) -> None:
        """Follow layers to the paths at which they are now."""
        self._names = {layer: paths[name] for layer, name in self._names.items()}
        layers = {paths[name]: sums for name, sums in self.kept.layers.items()}
        self.kept = replace(self.kept, layers=layers)

    def close(self) -> None:
        """Take all hooks off the model, for good."""
        self._closed = True
        self.remove()

    def reset(self) -> None:
        """Forget the recorded batches."""
        self.kept = Recording()

    def load(self, kept: Sequence[Recording]) -> None:
        """Go on from the sums of other recorders of such a model, added up."""
        joined = Recording()
        for other in kept:
            layers = dict(joined.layers)
            for name, sums in other.layers.items():
                layers[name] = layers[name].added(sums) if name in layers else sums
            batches, overflowed = other.batches, other.overflowed
            joined = Recording(layers, joined.batches + batches, joined.overflowed + overflowed)
        self.kept = joined

    def begin(self) -> None:
        """Start one batch."""
        self.end()  # whatever an interrupt left
        self._problems = []
        self._passes = BackwardPasses()
        self.recording = True

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        self.recording = False
        self._batch = {}
        self._inputs.clear()

    def finish(self, loss_scale: float) -> None:
        """Add the batch to what is kept.

        Raises:
            RuntimeError: a reader without a gradient, or an input changed in place. The batch is
                dropped, earlier ones are kept.
        """
        for name in self._names.values():
            if name not in self._batch:
                self._problems.append(
                    f"No gradient reached the layer that reads {name!r}: the loss does not depend "
                    "on it, no backward pass ran inside recording(), everything in front of it is "
                    "frozen, an input was passed by keyword, or the model ran compiled. Leave it "
                    "out of layers=, or record with the plain module."
                )
        if self._problems:
            raise RuntimeError(self._problems[0])
        finite = all(bool(sums.cross.isfinite().all()) for sums in self._batch.values())
        if loss_scale != 1.0 and not finite:  # a GradScaler skips this step too
            self.kept = replace(self.kept, overflowed=self.kept.overflowed + 1)
            return
        layers = dict(self.kept.layers)
        for name, sums in self._batch.items():
            new = replace(
                sums,
                cross=sums.cross / loss_scale,
                passed=sums.passed / loss_scale,
                squares=float((sums.cross / loss_scale).double().square().sum()),
            )
            layers[name] = layers[name].added(new) if name in layers else new
        self.kept = replace(self.kept, layers=layers, batches=self.kept.batches + 1)

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
        if rows.x.shape[:-1] != grad.shape[:-1]:
            self._problems.append(
                f"Layer {name!r} and the layer that reads it have run on other rows: shapes "
                f"{tuple(rows.x.shape)} and {tuple(grad.shape)}; leave it out of layers=."
            )
            return
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            sums = self._sums(layer, reader, rows, grad)
        old = self._batch.get(name)
        self._batch[name] = sums if old is None else old.added(sums)

    def _sums(self, layer: nn.Module, reader: nn.Module, rows: _Rows, grad: Tensor) -> CrossSums:
        dtype = sum_dtype(torch.promote_types(rows.x.dtype, grad.dtype))
        x = _with_ones(rows.x.to(dtype), self._covariances and layer.bias is not None)
        h = _with_ones(rows.h.to(dtype), reader.bias is not None)
        g = grad.detach().to(dtype).flatten(0, -2)
        pairs = [(x, g)]
        if self._covariances:
            pairs += [(h, g), (x, x), (x, h), (h, h)]
        found = virtual_grads([a for a, _ in pairs], [b for _, b in pairs], "linear")
        found += [x.new_zeros(0)] * (5 - len(found))
        cross, passed, inputs, mixed, hidden = found
        return CrossSums(cross, passed, inputs, mixed, hidden, len(x))


def _with_ones(rows: Tensor, ones: bool) -> Tensor:
    rows = rows.flatten(0, -2)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if ones else rows
