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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.taps import BackwardPasses, ForwardPass, remove, sum_dtype, watch
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


@dataclass
class Recording:
    """The layers' samples over the batches so far.

    ``overflowed``: how many batches were left out because a loss scale made them infinite.
    """

    layers: dict[str, LayerSample] = field(default_factory=dict)
    batches: int = 0
    overflowed: int = 0


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
        self._own_activation = own_activation
        self._names: dict[nn.Module, str] = {}
        self._activations: dict[nn.Module, nn.Module] = {}  # activation -> the layer before it
        self._inputs: dict[nn.Module, Input] = {}
        self._batch: dict[str, LayerSample] = {}
        self._weight_gradients: dict[str, Tensor] = {}  # sums of their rows and of |rows|, [2, n]
        self._rounding: dict[str, float] = {}  # relative, of those where it is not that of dtypes
        self._passes = BackwardPasses()
        self._problems: list[str] = []
        self._handles_of_batch: list[RemovableHandle] = []
        self.remove: Callable[[], object] = lambda: None  # takes all hooks off the model
        self._closed = False
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
        if not self._closed:
            remove_new = watch(self, [*names, *activations])
            self.remove()
            self.remove = remove_new
        self._names, self._activations = names, activations
        self.kept = Recording()

    def rename(self, paths: Mapping[str, str]) -> None:
        """Follow layers to the paths at which they are now."""
        names = {layer: paths[name] for layer, name in self._names.items()}
        layers = {paths[name]: sample for name, sample in self.kept.layers.items()}
        self._names, self.kept = names, replace(self.kept, layers=layers)

    def close(self) -> None:
        """Take all hooks off the model, for good."""
        self._closed = True
        self.remove()

    def reset(self) -> None:
        """Forget the recorded batches."""
        self.kept = Recording()

    def load(self, kept: Sequence[Recording]) -> None:
        """Go on from the samples of other recorders of such a model, joined."""
        joined = Recording()
        for other in kept:
            layers = dict(joined.layers)
            for name, sample in other.layers.items():
                old = layers.get(name)
                layers[name] = sample if old is None else old.joined(sample, self._limit(sample))
            batches, overflowed = other.batches, other.overflowed
            joined = Recording(layers, joined.batches + batches, joined.overflowed + overflowed)
        self.kept = joined

    def begin(self) -> None:
        """Start one batch."""
        self.end()  # whatever an interrupt left
        self._problems = []
        self._passes = BackwardPasses()
        for layer, name in self._names.items():
            weight = layer._parameters.get("weight")
            if weight is not None and weight.requires_grad:
                hook = partial(self._weight_gradient_arrived, name)
                self._handles_of_batch.append(weight.register_hook(hook))
        self.recording = True

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        self.recording = False
        self._batch, self._weight_gradients, self._rounding = {}, {}, {}
        self._inputs.clear()
        remove(self._handles_of_batch)
        self._handles_of_batch = []

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
        if loss_scale != 1.0 and not self._batch_is_finite():  # a GradScaler skips this step too
            self.kept = replace(self.kept, overflowed=self.kept.overflowed + 1)
            return
        layers = dict(self.kept.layers)
        for name, sample in self._batch.items():
            sums = self._of_weight(name, sample.gradient_sums)
            new = replace(sample, gradient_sums=sums).times(1 / loss_scale)
            old = layers.get(name)
            layers[name] = new if old is None else old.joined(new, self._limit(new))
        self.kept = replace(self.kept, layers=layers, batches=self.kept.batches + 1)

    def _batch_is_finite(self) -> bool:
        tensors = [t for s in self._batch.values() for t in (s.grad, s.gradient_sums)]
        return all(bool(t.isfinite().all()) for t in tensors)

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
            self._batch[name] = old.joined(sample, self._limit(sample))

    def _weight_gradient_arrived(self, name: str, grad: Tensor) -> None:
        if not self.recording:
            return
        if (obstacle := self._passes.obstacle_of_weight(name, grad)) is not None:
            self._problems.append(f"The weight of layer {name!r} {obstacle}")
            return
        with torch.no_grad():
            rows = grad.detach().flatten(1).to(sum_dtype(grad.dtype))
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

    def _limit(self, sample: LayerSample) -> int:
        return self._limit_of(sample.grad)

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
