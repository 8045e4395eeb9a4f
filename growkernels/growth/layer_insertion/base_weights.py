"""The existing weights that candidates are compared with, and the gradients that they get.

The gradient is that of the weight that a layer computes with. Where this is a parameter, a hook on
the parameter has it. Where it is computed anew in every forward pass (a parametrization,
weight_norm, pruning), the hook is on what was computed, and the sum over the passes is taken.
A basis convolution never computes its kernel; there the gradient is made of the layer's input and
its output's gradient. A layer that ``fully_shard`` has sharded computes with a weight that is
gathered for the pass, and there the hook is on that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from growkernels.nn import BasisConv2d
from growkernels.nn.weights import sources
from growkernels.nn.wrappers import is_dtensor

Arrived = Callable[[int, Tensor], None]


class BaseWeights:
    """The weight matrices of a model that candidates of some kinds are compared with, numbered.

    Like with like: linear layers for linear and residual candidates, convolutions (basis ones
    too) for convolutional ones, both for blocks; real weights alone.

    Args:
        model: whose layers.
        kinds: of the candidates.
        arrived: a bound method, called with a number and a gradient as long as its object lives.

    Attributes:
        watched: the modules whose forward passes ``forward_ran`` must be told of.
    """

    def __init__(self, model: nn.Module, kinds: Collection[str], arrived: Arrived) -> None:
        self._arrived = weakref.WeakMethod(arrived)
        self._holders: dict[int, nn.Module] = {}  # layers whose weight is a parameter
        self._makers: dict[nn.Module, int] = {}  # modules whose passes compute with no parameter
        self._convolutions: dict[nn.Module, int] = {}
        self._last: dict[nn.Module, weakref.ref[Tensor]] = {}  # computed weights with a hook
        wanted: tuple[type[nn.Module], ...] = ()
        if {"linear_relu", "residual", "block"} & set(kinds):
            wanted += (nn.Linear,)
        if {"conv2d_relu", "block"} & set(kinds):
            wanted += (nn.Conv2d, BasisConv2d)
        numbers: dict[tuple[int, ...], int] = {}
        for layer in model.modules():
            made_of = _made_of(layer) if isinstance(layer, wanted) else []
            if not made_of:
                continue
            key = tuple(map(id, made_of))  # tied weights are one
            number = numbers.setdefault(key, len(numbers))
            parameter = None if isinstance(layer, BasisConv2d) else layer._parameters.get("weight")
            if parameter is not None and is_dtensor(parameter):
                self._makers[layer] = number  # gathers it for each pass, if need be
            elif parameter is not None:
                self._holders[number] = layer
            elif parametrize.is_parametrized(layer, "weight"):
                self._makers[layer.get_submodule("parametrizations.weight")] = number
            else:
                self._makers[layer] = number
            if not isinstance(layer, nn.Linear):
                self._convolutions[layer] = number
        self.watched = dict.fromkeys([*self._convolutions, *self._makers])
        self.feature_maps: dict[str | int, tuple[int, int]] = {}

    def watch_parameters(self, handles: list[RemovableHandle]) -> None:
        """Put hooks on the weights that are parameters, those that the layers have now.

        Each handle is in the list as soon as there is its hook, so that an interrupt loses none.
        """
        for number, layer in self._holders.items():
            parameter = layer._parameters.get("weight")
            if parameter is not None and parameter.requires_grad:
                hook = partial(_tell, self._arrived, number)
                handles.append(parameter.register_hook(hook))

    def forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward pass of a module in ``watched`` has run."""
        if module in self._convolutions and args:
            self.feature_maps[self._convolutions[module]] = (args[0].shape[-2], args[0].shape[-1])
        number = self._makers.get(module)
        if number is None:
            return
        if isinstance(module, BasisConv2d):
            if output.requires_grad and any(p.requires_grad for p in _made_of(module)):
                output.register_hook(
                    partial(_tell_kernel, self._arrived, number, module, args[0].detach())
                )
            return
        # That of a hook, what fully_shard has gathered, or the output of a parametrization.
        weight = vars(module).get("weight")
        if weight is None:
            weight = module._parameters.get("weight", output)
        last = self._last.get(module)
        if weight.requires_grad and (last is None or last() is not weight):
            self._last[module] = weakref.ref(weight)
            weight.register_hook(partial(_tell, self._arrived, number))


def _made_of(layer: nn.Module) -> list[nn.Parameter]:
    names = ("basis", "coeff") if isinstance(layer, BasisConv2d) else ("weight",)
    return [
        parameter
        for name in names
        for parameter in sources(layer, name)
        if not isinstance(parameter, UninitializedParameter) and parameter.is_floating_point()
    ]


def _tell(arrived: weakref.WeakMethod[Arrived], number: int, grad: Tensor) -> None:
    method = arrived()
    if method is not None:
        method(number, grad)


def _tell_kernel(
    arrived: weakref.WeakMethod[Arrived], number: int, layer: BasisConv2d, x: Tensor, grad: Tensor
) -> None:
    """Tell the gradient of a basis convolution's equivalent kernel."""
    method = arrived()
    if method is None:
        return
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    sizes = layer.stride, layer.padding, layer.dilation
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
    x, dy = (t.detach().to(dtype).reshape(-1, *t.shape[-3:]) for t in (x, grad))
    with torch.autocast(grad.device.type, enabled=False):
        kernel = conv2d_weight(x, shape, dy, *sizes)
    method(number, kernel)
