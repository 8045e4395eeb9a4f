"""Rows of layers' inputs and gradients, taken by hooks from any number of ordinary batches.

A splitting matrix is a sum over rows, S_i = sum_m w[m, i] x_m x_m^T, and an eigensolver multiplies
by it many times, so the rows have to be at hand after the batches are gone. Keeping S itself would
take d^2 numbers per neuron (900 MB for one fc1 of DeiT-S). So each layer keeps a uniform sample,
without replacement, of all the rows it has seen, and the sums are scaled up by seen / kept: an
unbiased estimate of S, and S itself while no more rows have come than are kept. A convolution
keeps whole images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.neuron_rows import as_rows
from growkernels.growth.neuron_scaling.recording import LayerRecorder
from growkernels.growth.taps import ForwardPass, remove, sum_dtype
from growkernels.nn.grown_layers import ENDING_IN_RELU


@dataclass
class LayerSample:
    """What one layer has kept of the batches so far.

    Attributes:
        x: inputs, [rows, d], or [images, C, H, W] of a convolution.
        grad: dL/dO for the layer's output O, [rows, n] or [images, n, Ho, Wo]; for the criterion
            of the neuron's own activation: dL/d act(O).
        preact: O, for that criterion; else empty.
        keys: the random number of each kept row [rows]; those with the smallest are kept.
        seen: how many rows (or images) there were.
        gradient_sums: [n], sum over all batches and over j of dL/dW_ij.
    """

    x: Tensor
    grad: Tensor
    preact: Tensor
    keys: Tensor
    seen: int
    gradient_sums: Tensor

    def joined(self, other: LayerSample, keep: int) -> LayerSample:
        """A sample of both, of at most ``keep`` rows."""
        keys = torch.cat([self.keys, other.keys])
        rows = _smallest(keys, keep)
        return LayerSample(
            x=_pick(torch.cat([self.x, other.x]), rows),
            grad=_pick(torch.cat([self.grad, other.grad]), rows),
            preact=_pick(torch.cat([self.preact, other.preact]), rows),
            keys=keys[rows],
            seen=self.seen + other.seen,
            gradient_sums=self.gradient_sums + other.gradient_sums,
        )

    def times(self, factor: float) -> LayerSample:
        """The sample for a loss that is ``factor`` times as large."""
        return LayerSample(
            self.x,
            self.grad * factor,
            self.preact,
            self.keys,
            self.seen,
            self.gradient_sums * factor,
        )


@dataclass
class Input:
    """x of a layer that waits for its gradient, with the version it had; O where it is recorded.

    ``passes``: of a layer that ends in a ReLU of its own, where this lets gradients through.
    """

    x: Tensor
    version: int
    preact: Tensor | None = None
    passes: Tensor | None = None


class SampleRecorder(LayerRecorder[LayerSample]):
    """Watches the candidates of one model.

    Args:
        own_activation: record dL/d act(O) and O at the candidates' activation modules instead of
            dL/dO at the layers.
        rows: to keep of each layer.
        generator: a CPU generator that chooses them; None: the global one.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Sequence[Candidate],
        *,
        own_activation: bool,
        rows: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self._rows = rows
        self._generator = generator
        self._own_activation = own_activation
        self._activations: dict[nn.Module, nn.Module] = {}  # activation -> the layer before it
        self._inputs: dict[nn.Module, Input] = {}
        self._weight_gradients: dict[str, Tensor] = {}  # sums of their rows and of |rows|, [2, n]
        self._rounding: dict[str, float] = {}  # relative, of those where it is not that of dtypes
        self._handles_of_batch: list[RemovableHandle] = []
        self.watch(model, candidates)

    def watch(self, model: nn.Module, candidates: Sequence[Candidate]) -> None:
        """Watch these candidates from now on; what was recorded is forgotten."""
        names = {model.get_submodule(c.name): c.name for c in candidates}
        activations: dict[nn.Module, nn.Module] = {}
        if self._own_activation:
            for candidate in candidates:
                if candidate.activation is not None:
                    activation = model.get_submodule(candidate.activation)
                    activations[activation] = model.get_submodule(candidate.name)
        self._watch(names, [*names, *activations])
        self._activations = activations

    def begin(self) -> None:
        """Start one batch."""
        super().begin()
        for layer, name in self._names.items():
            weight = layer._parameters.get("weight")
            if weight is not None and weight.requires_grad:
                hook = partial(self._weight_gradient_arrived, layer, name)
                self._handles_of_batch.append(weight.register_hook(hook))

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        super().end()
        self._weight_gradients, self._rounding = {}, {}
        self._inputs.clear()
        remove(self._handles_of_batch)
        self._handles_of_batch = []

    def _joined(self, old: LayerSample, new: LayerSample) -> LayerSample:
        return old.joined(new, self._limit_of(new.grad))

    def _of_batch(self, name: str, of_layer: LayerSample, loss_scale: float) -> LayerSample:
        sums = self._of_weight(name, of_layer.gradient_sums)
        return replace(of_layer, gradient_sums=sums).times(1 / loss_scale)

    def _of_gradients(self, of_layer: LayerSample) -> tuple[Tensor, Tensor]:
        return of_layer.grad, of_layer.gradient_sums

    def _no_gradient(self, name: str) -> str:
        return (
            f"No gradient reached layer {name!r}: the loss does not depend on it, no backward pass "
            "ran inside recording(), the layer and everything in front of it are frozen, its input "
            "was passed by keyword, or the model ran compiled. Leave it out of layers=, or record "
            "with the plain module."
        )

    def forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called by the hooks after every forward pass of a watched module."""
        if not isinstance(output, Tensor) or not output.requires_grad or not args:
            return
        if module in self._names:
            passes = output.detach() > 0 if isinstance(module, ENDING_IN_RELU) else None
            taken = Input(args[0].detach(), args[0]._version, passes=passes)
            if self._activations:
                self._inputs[module] = taken
            else:
                ForwardPass(module, output, taken).tell(self, output)
        layer = self._activations.get(module)
        if layer is not None and layer in self._inputs:
            taken = replace(self._inputs.pop(layer), preact=args[0].detach())
            ForwardPass(layer, output, taken).tell(self, output)

    def gradient_arrived(self, forward: ForwardPass, grad: Tensor) -> None:
        """Called when the gradient of a layer's (or its activation's) forward pass has arrived."""
        layer, taken = forward.module, forward.kept
        name = self._names.get(layer)
        if name is None:  # watched when it ran, but no more
            return
        if (obstacle := self._passes.obstacle(forward)) is not None:
            self._problems.append(f"Layer {name!r} {obstacle}")
            return
        if taken.x._version != taken.version:
            self._problems.append(
                f"The input of layer {name!r} was changed in place after the layer had used it; "
                "use inplace=False there."
            )
            return
        if torch.is_autocast_enabled(grad.device.type) or grad.dtype.itemsize < 4:
            self._rounding[name] = 4 * torch.finfo(torch.bfloat16).eps
        # Under autocast the sums would be rounded to 16 bits.
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            grad = grad if taken.passes is None else grad * taken.passes
            sample = self._sample(layer, taken.x, taken.preact, grad)
        old = self._batch.get(name)  # a layer that runs several times is one layer with more rows
        if old is None:
            self._batch[name] = sample
        elif self._compare_sizes(name, old, sample):
            self._batch[name] = self._joined(old, sample)

    def _weight_gradient_arrived(self, layer: nn.Module, name: str, grad: Tensor) -> None:
        if not self.recording:
            return
        if (obstacle := self._passes.obstacle_of_weight(name, grad)) is not None:
            self._problems.append(f"The weight of layer {name!r} {obstacle}")
            return
        with torch.no_grad():
            rows = as_rows(layer, grad.detach()).flatten(1).to(sum_dtype(grad.dtype))
            sums = torch.stack([rows.sum(1), rows.abs().sum(1)])
        before = self._weight_gradients.get(name)
        self._weight_gradients[name] = sums if before is None else before + sums

    def _of_weight(self, name: str, sums: Tensor) -> Tensor:
        """Sums over the rows of dL/dW, given those of what came through the layer's outputs.

        A loss may depend on W in other ways too, by a penalty for instance. Where the two differ by
        no more than rounding the given ones are better: under autocast dL/dW is rounded to 16 bits.
        """
        if name not in self._weight_gradients:
            return sums
        of_weight, magnitudes = self._weight_gradients[name]
        rounding = self._rounding.get(name, torch.finfo(sums.dtype).eps ** 0.6)
        differs = (of_weight - sums).abs() > rounding * magnitudes
        return torch.where(differs, of_weight.to(sums.dtype), sums)

    def _compare_sizes(self, name: str, old: LayerSample, new: LayerSample) -> bool:
        sizes = [tuple(sample.x.shape[1:]) for sample in (old, new)]
        if sizes[0] != sizes[1]:
            self._problems.append(
                f"Layer {name!r} ran on inputs of shapes {sizes[0]} and {sizes[1]}, and its sample "
                "is of whole images of one shape; record at one image size, or leave the layer out "
                "of layers=."
            )
        return sizes[0] == sizes[1]

    def _sample(
        self, layer: nn.Module, x: Tensor, preact: Tensor | None, grad: Tensor
    ) -> LayerSample:
        dtype = sum_dtype(torch.promote_types(x.dtype, grad.dtype))
        if isinstance(layer, nn.Conv2d):
            if x.dim() == 3:  # one image without a batch
                x, grad = x[None], grad[None]
                preact = None if preact is None else preact[None]
            channels = x.sum(-3, keepdim=True, dtype=dtype)
            ones = channels.new_ones(1, 1, *layer.kernel_size)
            inputs = F.conv2d(channels, ones, None, layer.stride, layer.padding, layer.dilation)
            sums = (grad * inputs).sum((0, -2, -1))
        else:
            x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            preact = None if preact is None else preact.reshape(grad.shape)
            sums = grad.to(dtype).T @ x.sum(-1, dtype=dtype)
        keys = torch.rand(len(x), generator=self._generator, dtype=torch.float64, device="cpu")
        rows = _smallest(keys, self._limit_of(grad))
        return LayerSample(
            x=_pick(x, rows).to(dtype),
            grad=_pick(grad, rows).to(dtype),
            preact=x.new_zeros(len(rows), 0) if preact is None else _pick(preact, rows).to(dtype),
            keys=keys[rows],
            seen=len(x),
            gradient_sums=sums,
        )

    def _limit_of(self, grad: Tensor) -> int:
        """Rows to keep; of a convolution images with about as many positions."""
        return self._rows if grad.dim() == 2 else max(1, self._rows // math.prod(grad.shape[2:]))


def _smallest(keys: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` smallest keys, in order of appearance."""
    if len(keys) <= keep:
        return torch.arange(len(keys), device=keys.device)
    return keys.topk(keep, largest=False).indices.sort().values


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    return rows.clone() if len(index) == len(rows) else rows[index.to(rows.device)]
