"""Linear layers and convolutions that have grown branches on some of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growkernels.nn.hooks import hooks_of
from growkernels.nn.identity_layers import Conv2dReLU, LinearReLU
from growkernels.nn.wrappers import type_of_unit

FORMS = ("pair", "single", "gated")


class Branch(nn.Module):
    """What a grown layer adds to its outputs ``index``: GELU(z) + z of new neurons, initially 0.

    Three forms (Beyond Uniform Scaling, arXiv 2402.12418, section 2, for the first):

    * ``"pair"``, the paper's: z = plus(x) + minus(x), two new neurons of opposite weights for each
      chosen output. Both always receive the same gradient, so only their sum does anything.
    * ``"single"``: z = gain * linear(x) with linear = 0, the same function at half the parameters.
      With gain = sqrt(2) it trains exactly like the pair under SGD (momentum and weight decay
      included: the pair's sum moves by twice the step of one), with gain = 2 under Adam and AdamW,
      whose step does not depend on the gradient's scale (their eps and a decay that is coupled to
      the gradient aside).
    * ``"gated"``: gate * (GELU(z) + z), z = linear(x), with one trained number gate = 0 per neuron.
      Unlike in the other two, the new weights' initial direction a matters: the gate's gradient is
      dL/dgate = sum_m delta_m (1.5 a.x_m) + a.S a / 2 + O(|a|^4), so that at a saddle, where the
      first term vanishes, the splitting matrix S alone decides, and the pair would not move.

    ``outputs`` are in the layer's own numbering. ``index`` is the same as a buffer, which is no
    part of state_dict, because the growth records of the model have the outputs; wherever the
    branch goes, its values come from ``outputs``.

    Raises:
        ValueError: unknown form, or no outputs.
    """

    index: Tensor

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, outputs: Sequence[int], form: str, gain: float = 2.0
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"Unknown form {form!r}; choose one of {', '.join(FORMS)}.")
        if not outputs:
            raise ValueError("A branch needs at least one output to be added to.")
        self.form = form
        self.gain = gain
        place = layer.weight.device
        self.register_buffer("index", None, persistent=False)
        self.set_outputs(outputs, place)
        if form == "pair":
            self.plus = _zero_layer(layer, len(outputs))
            self.minus = _zero_layer(layer, len(outputs))
        else:
            self.linear = _zero_layer(layer, len(outputs))
        if form == "gated":
            gate = torch.zeros(len(outputs), device=place, dtype=layer.weight.dtype)
            self.gate = nn.Parameter(gate)
        self.act = nn.GELU()

    def set_outputs(self, outputs: Sequence[int], device: torch.device) -> None:
        """Add to these outputs of the layer from now on."""
        self.outputs = tuple(outputs)
        self.index = torch.tensor(self.outputs, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Branch:
        """Go to another device or dtype; ``to_empty`` leaves no values in a buffer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.set_outputs(self.outputs, self.index.device)
        return self

    def index_beside_weights(self) -> Tensor:
        """``index`` on the device of the branch's parameters; it may have been left on another
        where ``load_state_dict(assign=True)`` gave values to a model on the meta device.
        """
        device = next(self.parameters()).device  # known in a symbolic trace, unlike that of y
        if self.index.device != device:
            self.set_outputs(self.outputs, device)
        return self.index

    @torch.no_grad()
    def start_at(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set the new neurons to these values; the function does not change in any form.

        pair: plus = values, minus = -values. gated: linear = values. single: nothing, because the
        pair's sum is 0 whatever they are.
        """
        if self.form == "single":
            return
        first = self.plus if self.form == "pair" else self.linear
        first.weight.copy_(weight)
        if first.bias is not None and bias is not None:
            first.bias.copy_(bias)
        if self.form == "pair":
            self.minus.weight.copy_(-first.weight)
            if self.minus.bias is not None and first.bias is not None:
                self.minus.bias.copy_(-first.bias)

    def neurons(self, x: Tensor) -> Tensor:
        """GELU(z) + z by calls of the branch's own modules."""
        if self.form == "pair":
            z = self.plus(x) + self.minus(x)
        elif self.form == "single":
            z = self.gain * self.linear(x)
        else:
            z = self.linear(x)
        out: Tensor = self.act(z) + z
        return out

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one layer that computes z."""
        if self.form == "pair":
            plus, minus = self.plus.bias, self.minus.bias
            bias = None if plus is None or minus is None else plus + minus
            return self.plus.weight + self.minus.weight, bias
        weight, bias = self.linear.weight, self.linear.bias
        if self.form == "single":
            return self.gain * weight, None if bias is None else self.gain * bias
        return weight, bias

    @property
    def is_bare(self) -> bool:
        """Whether its modules are plain ones: not grown, parametrized, sharded or hooked."""
        return all(
            type(module) in (nn.Linear, nn.Conv2d, nn.GELU) and not hooks_of(module)
            for module in self.children()
        )

    def extra_repr(self) -> str:
        gain = f", gain={self.gain:.4g}" if self.form == "single" else ""
        return f"outputs={len(self.outputs)}, form={self.form!r}{gain}"


class GrownLinear(nn.Linear):
    """x Wᵀ + b for x [..., in_features], plus, on some outputs, what its branches compute of x.

    O'[..., index] = O[..., index] + GELU(z) + z for every ``Branch`` in ``branches``, whose own
    layers may be grown in turn. Made from a layer by ``with_branches``.
    """

    branches: nn.ModuleList

    def forward(self, input: Tensor) -> Tensor:
        return _with_branches(self, super().forward(input), input, dim=-1)


class GrownConv2d(nn.Conv2d):
    """A convolution that, on some output channels, adds what its branches compute of the input.

    As GrownLinear, with convolutions of the layer's own kernel size, stride, padding and dilation.
    """

    branches: nn.ModuleList

    def forward(self, input: Tensor) -> Tensor:
        return _with_branches(self, super().forward(input), input, dim=-3)


class GrownLinearReLU(GrownLinear):
    """relu(O') of a GrownLinear, made from a LinearReLU; branches are added before the ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class GrownConv2dReLU(GrownConv2d):
    """relu(O') of a GrownConv2d, made from a Conv2dReLU."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


ENDING_IN_RELU = (LinearReLU, Conv2dReLU, GrownLinearReLU, GrownConv2dReLU)
GROWN: dict[type[nn.Module], type[GrownLinear | GrownConv2d]] = {
    nn.Linear: GrownLinear,
    nn.Conv2d: GrownConv2d,
    LinearReLU: GrownLinearReLU,
    Conv2dReLU: GrownConv2dReLU,
}


def can_have_branches(layer: nn.Module) -> bool:
    """Whether what a layer's forward does with its weights is known, by its exact type."""
    kind = type_of_unit(layer)
    return kind in GROWN or kind in GROWN.values()


def with_branches(layer: nn.Linear | nn.Conv2d) -> GrownLinear | GrownConv2d:
    """Make the layer one that can have branches.

    It stays the same object, so whoever holds or watches it goes on doing so.

    Raises:
        TypeError: not exactly an nn.Linear, nn.Conv2d, LinearReLU or Conv2dReLU, nor a grown one
            (which is returned as is).
        ValueError: a convolution with groups, or with padding other than zeros.
    """
    if isinstance(layer, GrownLinear | GrownConv2d):
        return layer
    kind = GROWN.get(type(layer))
    if kind is None:
        raise TypeError(
            f"A {type(layer).__name__} cannot be grown, because what its forward does with its "
            "weights is not known; nn.Linear and nn.Conv2d can."
        )
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise ValueError(
            f"A convolution with groups={layer.groups} and padding_mode="
            f"{layer.padding_mode!r} cannot be grown; groups=1 with zero padding can."
        )
    layer.branches = nn.ModuleList().train(layer.training)
    layer.__class__ = kind
    assert isinstance(layer, GrownLinear | GrownConv2d)
    return layer


def _with_branches(layer: GrownLinear | GrownConv2d, y: Tensor, x: Tensor, dim: int) -> Tensor:
    """A layer that grew often has many narrow branches: they share one product and one pass over y
    wherever nobody could tell.
    """
    bare: list[Branch] = []
    watched: list[Branch] = []
    for branch in layer.branches:
        if isinstance(branch, Branch):
            (bare if branch.is_bare else watched).append(branch)
    for gated in (False, True):
        alike = [branch for branch in bare if (branch.form == "gated") == gated]
        if alike:
            weights, biases = zip(*(branch.weights() for branch in alike), strict=True)
            bias = None if biases[0] is None else torch.cat(biases)
            z = _same_kind(layer, x, torch.cat(weights), bias)
            y = _add(y, F.gelu(z) + z, alike, dim)
    for branch in watched:
        y = _add(y, branch.neurons(x), [branch], dim)
    return y


def _same_kind(
    layer: GrownLinear | GrownConv2d, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if isinstance(layer, GrownLinear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def _add(y: Tensor, out: Tensor, branches: Sequence[Branch], dim: int) -> Tensor:
    """Y with the neurons of the branches, one after the other, gated or not, on their outputs."""
    if branches[0].form == "gated":
        gate = torch.cat([branch.gate for branch in branches])
        out = out * gate.to(out.dtype).view(-1, *(1,) * (-1 - dim))
    index = torch.cat([branch.index_beside_weights() for branch in branches])
    return y.index_add(dim, index, out.to(y.dtype))


def _zero_layer(layer: nn.Linear | nn.Conv2d, outputs: int) -> nn.Linear | nn.Conv2d:
    """A layer of zeros like ``layer``, but with its own number of outputs."""
    has_bias = layer.bias is not None
    new: nn.Linear | nn.Conv2d
    # Built on the meta device first: no random numbers are drawn for values that are replaced.
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, outputs, has_bias, "meta", layer.weight.dtype)
    else:
        new = nn.Conv2d(
            layer.in_channels,
            outputs,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=has_bias,
            device="meta",
            dtype=layer.weight.dtype,
        )
    new = new.to_empty(device=layer.weight.device)
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    return new
