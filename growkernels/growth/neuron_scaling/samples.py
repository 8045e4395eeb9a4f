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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.taps import Tap


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
        gradient_sums: [n], sum over all rows seen and over j of dL/dW_ij.
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
    """x of a layer that waits for its gradient, with the version it had."""

    x: Tensor
    version: int


@dataclass
class Recording:
    """The layers' samples over the batches so far."""

    layers: dict[str, LayerSample] = field(default_factory=dict)
    batches: int = 0


class SampleRecorder:
    """Watches the candidates of one model; hooks stay on the modules as long as it lives.

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
        self.recording = False
        self.kept = Recording()
        self._rows = rows
        self._generator = generator
        self._names = {model.get_submodule(c.name): c.name for c in candidates}
        self._activations: dict[nn.Module, nn.Module] = {}  # activation -> the layer before it
        if own_activation:
            for candidate in candidates:
                if candidate.activation is not None:
                    activation = model.get_submodule(candidate.activation)
                    self._activations[activation] = model.get_submodule(candidate.name)
        self._inputs: dict[nn.Module, Input] = {}
        self._batch: dict[str, LayerSample] = {}
        self._problems: list[str] = []
        watched = [*self._names, *self._activations]
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(Tap(self)) for module in watched
        ]

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def reset(self) -> None:
        """Forget the recorded batches."""
        self.kept = Recording()

    def begin(self) -> None:
        """Start one batch."""
        self._batch, self._problems = {}, []
        self.recording = True

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        self.recording = False
        self._batch = {}
        self._inputs.clear()

    def finish(self, loss_scale: float) -> None:
        """Add the batch to what is kept.

        Raises:
            RuntimeError: a layer without a gradient, or with an input changed in place. The batch
                is dropped, earlier ones are kept.
        """
        for name in self._names.values():
            sample, kept = self._batch.get(name), self.kept.layers.get(name)
            if sample is not None and kept is not None:
                self._compare_sizes(name, kept, sample)
            elif sample is None:
                self._problems.append(
                    f"No gradient reached layer {name!r}: the loss does not depend on it, no "
                    "backward pass ran inside recording(), the layer and everything in front of it "
                    "are frozen, its input was passed by keyword, or the model ran compiled. Leave "
                    "it out of layers=, or record with the plain module."
                )
        if self._problems:
            raise RuntimeError(self._problems[0])
        layers = dict(self.kept.layers)
        for name, sample in self._batch.items():
            new = sample.times(1 / loss_scale)
            old = layers.get(name)
            layers[name] = new if old is None else old.joined(new, self._limit(new))
        self.kept = Recording(layers, self.kept.batches + 1)

    def forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called by the hooks after every forward pass of a watched module."""
        if not isinstance(output, Tensor) or not output.requires_grad or not args:
            return
        if module in self._names:
            taken = Input(args[0].detach(), args[0]._version)
            if self._activations:
                self._inputs[module] = taken
            else:
                output.register_hook(partial(self._grad_arrived, module, taken, None))
        layer = self._activations.get(module)
        if layer is not None and layer in self._inputs:
            preact = args[0].detach()
            output.register_hook(
                partial(self._grad_arrived, layer, self._inputs.pop(layer), preact)
            )

    def _grad_arrived(
        self, layer: nn.Module, taken: Input, preact: Tensor | None, grad: Tensor
    ) -> None:
        if not self.recording:
            return
        name = self._names[layer]
        if taken.x._version != taken.version:
            self._problems.append(
                f"The input of layer {name!r} was changed in place after the layer had used it; "
                "use inplace=False there."
            )
            return
        # Under autocast the sums would be rounded to 16 bits.
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            sample = self._sample(layer, taken.x, preact, grad)
        old = self._batch.get(name)  # a layer that runs several times is one layer with more rows
        if old is None:
            self._batch[name] = sample
        elif self._compare_sizes(name, old, sample):
            self._batch[name] = old.joined(sample, self._limit(sample))

    def _compare_sizes(self, name: str, old: LayerSample, new: LayerSample) -> bool:
        """Whether rows can be joined; if not, that is a problem of the batch."""
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
        dtype = _sum_dtype(torch.promote_types(x.dtype, grad.dtype))
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
        keys = torch.rand(len(x), generator=self._generator, dtype=torch.float64)
        rows = _smallest(keys, self._limit_of(grad))
        return LayerSample(
            x=_pick(x, rows).to(dtype),
            grad=_pick(grad, rows).to(dtype),
            preact=x.new_zeros(len(rows), 0) if preact is None else _pick(preact, rows).to(dtype),
            keys=keys[rows],
            seen=len(x),
            gradient_sums=sums,
        )

    def _limit(self, sample: LayerSample) -> int:
        return self._limit_of(sample.grad)

    def _limit_of(self, grad: Tensor) -> int:
        """Rows to keep; of a convolution images with about as many positions."""
        return self._rows if grad.dim() == 2 else max(1, self._rows // math.prod(grad.shape[2:]))


def _smallest(keys: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` smallest keys, in order of appearance."""
    if len(keys) <= keep:
        return torch.arange(len(keys))
    return keys.topk(keep, largest=False).indices.sort().values


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    return rows.clone() if len(index) == len(rows) else rows[index.to(rows.device)]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
