"""Attention modules of torch, torchvision and timm with q, k, v and proj as linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.nn.attention import Attention
from growkernels.nn.exchange import (
    Places,
    check_takes_parameters,
    exchange_with_state,
    obstacle,
    order_as_registered,
)
from growkernels.nn.module_exchange import FIELDS, Exchanged, ModuleExchange
from growkernels.nn.optimizers import Optimizers
from growkernels.nn.records import repeats

PROJECTIONS = ("q", "k", "v")
SEPARATION = "separate_attention"  # of this exchange's records


class Separation(Exchanged):
    """What :func:`separate_attention` did: the paths exchanged, and why others were not."""

    kind = SEPARATION


class TorchAttention(Attention):
    """Self-attention that is called like a ``batch_first`` nn.MultiheadAttention.

    ``forward(x, x, x, need_weights=False)`` gives (y, None) for x [N, T, embed]. Masks, other keys
    or values than x, and the weights of the attention raise ValueError.
    """

    dropout: float

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        _refuse_masks(key_padding_mask, attn_mask, is_causal)
        if query is not key or query is not value:
            raise ValueError(
                "Separated attention is self-attention: pass one tensor as query, key and value."
            )
        if need_weights:
            raise ValueError(
                "Separated attention does not return its weights; call it with need_weights=False."
            )
        return self.attend(query, self.dropout if self.training else 0.0), None


class TimmAttention(Attention):
    """Self-attention that is called like timm's Attention: forward(x) for x [N, T, embed].

    Masks raise ValueError.
    """

    attn_drop: nn.Dropout
    proj_drop: nn.Dropout

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        _refuse_masks(attn_mask, is_causal)
        out: Tensor = self.proj_drop(self.attend(x, self.attn_drop.p if self.training else 0.0))
        return out


def separate_attention(
    model: nn.Module, optimizer: Optimizers | None = None, *, record_only: bool = False
) -> Separation:
    """Exchange a model's packed attention for modules with q, k, v and proj, in place.

    torch's nn.MultiheadAttention (in torchvision's vision transformers) and timm's Attention keep
    the weights of q, k and v in one matrix. Their places take modules that are called in the same
    way and compute the same, with four nn.Linear ``q``, ``k``, ``v`` and ``proj``, which can grow
    one by one (``gk.growth.NeuronScaling``). The output projection keeps its parameters; those of
    q, k and v are cut from the packed ones and take their place in the optimizer, state included,
    so that training goes on as it would have. Gradients (``.grad``) of packed parameters are
    dropped. The exchange is noted among the model's records (``gk.growth.insertions``), and
    ``gk.growth.rebuild`` repeats it before a checkpoint is loaded.

    On any error model and optimizer are as before.

    Args:
        model: any module, compiled or not; not a DataParallel wrapper.
        optimizer: the model's optimizer, a list of them, or None.
        record_only: say what would be done, and leave model and optimizer as they are.

    Returns:
        The paths exchanged, and {path: reason} of attention modules that were left alone: those
        with masks of their own, other keys than queries, or normalised heads.

    Raises:
        TypeError: an optimizer whose state can take no parameter; a model that is none, or has a
            wrapped or sharded part.
        ValueError: nothing to exchange; an optimizer that holds no parameter of the model, or
            whose state is not shaped like its parameter.
    """
    return _EXCHANGE.run(model, optimizer, record_only)


def _is_packed(module: nn.Module) -> bool:
    of_timm = type(module).__name__ == "Attention" and type(module).__module__.startswith("timm.")
    return isinstance(module, nn.MultiheadAttention) or (of_timm and hasattr(module, "qkv"))


def _why_not(model: nn.Module, path: str, module: Any, places: Places) -> str | None:
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return f"torch's {type(parent).__name__} reads its packed weights or calls it with masks"
    projection = module.out_proj if isinstance(module, nn.MultiheadAttention) else module.proj
    if reason := obstacle(module, places, kept=projection.parameters()):
        return reason
    if isinstance(module, nn.MultiheadAttention):
        if type(module) is not nn.MultiheadAttention:
            return f"what the forward of a {type(module).__name__} does is not known"
        if not module._qkv_same_embed_dim:
            return "its keys and values have other widths than its queries"
        if not module.batch_first:
            return "it is not batch_first"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds keys of its own"
        return None
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(module, name, nn.Identity()), nn.Identity):
            return f"it normalises its heads ({name})"
    if getattr(module, "gate", None) is not None:
        return "it has a gate"
    if type(module.qkv) is not nn.Linear or type(module.proj) is not nn.Linear:
        return "its projections are no plain linear layers"
    embed, width = module.qkv.in_features, module.proj.in_features
    if module.qkv.out_features != 3 * width or embed % module.num_heads:
        return "its widths are no multiples of the number of heads"
    return None


def _separated(old: Any, optimizer: Optimizer | None) -> Attention:
    of_torch = isinstance(old, nn.MultiheadAttention)
    kind: type[Attention] = TorchAttention if of_torch else TimmAttention
    heads = old.num_heads
    projection = old.out_proj if of_torch else old.proj
    # On the meta device: the parameters come from the old module.
    new = kind(projection.out_features, heads, projection.in_features, device="meta")
    new.train(old.training)
    weights, packed = _packed(old)
    for kind_of, name, parameter in zip(("weight", "bias"), weights, packed, strict=True):
        parts: dict[str, nn.Parameter] = {}
        for index, projected in enumerate(PROJECTIONS):
            layer = getattr(new, projected)
            if parameter is None:
                layer.register_parameter(kind_of, None)
                continue
            value = _thirds(parameter.detach())[index]
            parts[f"{projected}.{kind_of}"] = nn.Parameter(value, parameter.requires_grad)
            layer.register_parameter(kind_of, parts[f"{projected}.{kind_of}"])
        if optimizer is not None and parameter is not None:
            exchange_with_state(optimizer, name, parameter, parts, _thirds)
    new.proj.weight, new.proj.bias = projection.weight, projection.bias
    if isinstance(new, TorchAttention):
        new.dropout = old.dropout
        _rename(optimizer, new.proj, "out_proj.", "proj.")
    elif isinstance(new, TimmAttention):
        new.scale = old.scale
        new.attn_drop, new.proj_drop = old.attn_drop, old.proj_drop
    if optimizer is not None:
        order_as_registered(optimizer, new)
    return new


def _packed(module: Any) -> tuple[tuple[str, str], tuple[nn.Parameter, nn.Parameter | None]]:
    """The names of the packed weight and bias, and these."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "in_proj_bias"), (module.in_proj_weight, module.in_proj_bias)
    return ("qkv.weight", "qkv.bias"), (module.qkv.weight, module.qkv.bias)


def _thirds(packed: Tensor) -> list[Tensor]:
    return [part.clone() for part in packed.chunk(3)]


def _rename(optimizer: Optimizer | None, layer: nn.Module, old: str, new: str) -> None:
    """Where the optimizer keeps names, those of a layer's parameters."""
    names = {id(p): name for name, p in layer.named_parameters()}
    for group in () if optimizer is None else optimizer.param_groups:
        if "param_names" in group:
            group["param_names"] = [
                full.removesuffix(old + names[id(p)]) + new + names[id(p)]
                if id(p) in names
                else full
                for full, p in zip(group["param_names"], group["params"], strict=True)
            ]


def _refuse_masks(*masks: Tensor | bool | None) -> None:
    if any(isinstance(mask, Tensor) or mask for mask in masks):
        raise ValueError("Separated attention takes no masks; call it without.")


_EXCHANGE = ModuleExchange(
    done=Separation,
    nothing="no attention to separate: it needs torch's nn.MultiheadAttention or timm's Attention "
    "as a submodule",
    of_record="separates the attention",
    change="cut",
    check_optimizer=check_takes_parameters,
    applies=_is_packed,
    why_not=_why_not,
    changed=lambda module: _packed(module)[1],
    new=_separated,
)
repeats(SEPARATION, fields=FIELDS)(_EXCHANGE.repeat)
