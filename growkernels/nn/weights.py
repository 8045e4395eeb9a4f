"""What a layer's weights are made of: parameters of its own, or values computed from others.

torch can put something between a parameter and the weight that a layer computes with:
parametrizations (``weight_norm``, ``spectral_norm`` and own ones), the older functions of the same
names and ``torch.nn.utils.prune``, which compute the weight in a hook before every forward pass.
There the layer's attribute is no parameter, and what trains has other names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from growkernels.nn.wrappers import is_dtensor

# torch's layers that have weight matrices (or kernels), by the names of these. Layers of this
# package say theirs in an attribute ``weight_matrices``.
WEIGHTS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("weight",)),
    (nn.modules.conv._ConvNd, ("weight",)),
    (nn.Bilinear, ("weight",)),
    (nn.RNNBase, ("weight_ih_l0", "weight_hh_l0")),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
)


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """The attributes that hold a layer's weight matrices; none for layers without such."""
    own: tuple[str, ...] | None = getattr(type(layer), "weight_matrices", None)
    if own is not None:
        return own
    return next((names for kind, names in WEIGHTS if isinstance(layer, kind)), ())


def sources(layer: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that the weight of this name is, or is computed from."""
    own = layer._parameters.get(name)
    if own is not None:
        return [own]
    if parametrize.is_parametrized(layer, name):
        return list(layer.get_submodule(f"parametrizations.{name}").parameters())
    prefix = f"{name}_"  # weight_orig, weight_g and weight_v
    return [p for key, p in layer._parameters.items() if p is not None and key.startswith(prefix)]


def weight_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that a layer's weight matrices are, or are computed from; the largest first.

    (A weight norm has one parameter per row beside one of the weight's size.)
    """
    found = [p for name in weight_names(layer) for p in sources(layer, name)]
    return sorted(found, key=torch.numel, reverse=True)


def current_value(layer: nn.Module, name: str = "weight") -> Tensor:
    """The weight that an evaluation of the layer would compute with now; reading changes nothing.

    (A spectral norm moves its vectors whenever it is asked in training mode, and a hook leaves
    behind the weight of the last forward pass, which is stale after an optimizer's step.) Of a
    sharded weight it is the whole one, and all ranks ask for it.
    """
    with torch.no_grad():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
                masked: Tensor = hook.apply_mask(layer)
                return masked.detach()
            if isinstance(hook, WeightNorm) and hook.name == name:
                value: Tensor = hook.compute_weight(layer)
                return value.detach()
            if isinstance(hook, SpectralNorm) and hook.name == name:
                value = hook.compute_weight(layer, do_power_iteration=False)
                return value.detach()
        if not parametrize.is_parametrized(layer, name):
            value = getattr(layer, name).detach()
            return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]
        steps = list(layer.get_submodule(f"parametrizations.{name}").modules())
        modes = [step.training for step in steps]
        try:
            for step in steps:
                step.training = False
            value = getattr(layer, name)
            return value.detach()
        finally:
            for step, mode in zip(steps, modes, strict=True):
                step.training = mode


def why_computed(layer: nn.Module) -> str | None:
    """What computes a weight or bias of this layer from other values; None: all are parameters."""
    for name in getattr(layer, "parametrizations", ()):
        return f"its {name} is computed by a parametrization (torch.nn.utils.parametrize)"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            return f"its {hook._tensor_name} is computed by a mask (torch.nn.utils.prune)"
        if isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return f"its {hook.name} is computed by torch.nn.utils.{kind}"
    for name in (*weight_names(layer), "bias"):
        if isinstance(vars(layer).get(name), Tensor):
            return f"its {name} is a tensor that something else computes, not a parameter"
    return None


def why_watched(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Which of the parameters has hooks on its gradient (masks, post-accumulate hooks)."""
    for name, parameter in parameters:
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"its {name} carries hooks on its gradient, which the new one would not have"
    return None
