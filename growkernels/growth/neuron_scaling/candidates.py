"""The layers whose neurons can be grown: found in any model, with what is known around each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from growkernels.growth.module_graph import activations
from growkernels.growth.neuron_scaling.widenings import Widening, widenings
from growkernels.growth.traced_graph import TracedGraph
from growkernels.nn import BasisConv2d
from growkernels.nn.grown_layers import Branch, GrownConv2d, GrownLinear, can_have_branches
from growkernels.nn.linear_from_conv1d import is_transposed_linear
from growkernels.nn.weights import why_computed

LAYER_TYPES = ("linear", "conv2d")

_ATTENTION = (
    "it needs a growkernels.nn.Attention, which growkernels.nn.separate_attention makes of torch's "
    "and timm's."
)
NEEDS = {  # of each role, to be widened in it
    "fc1": "it needs a linear layer that only an elementwise module separates from the next one in "
    "a Sequential (or named fc1, fc2 in one module), or anywhere if sample= is given.",
    "v": _ATTENTION,
    "qk": _ATTENTION,
    "conv": "it needs sample=, kinds with 'conv2d', and a convolution whose outputs only "
    "convolutions and linear layers read, through what acts on single channels.",
    "gated": "it needs sample= and two linear layers whose outputs are multiplied.",
}

ATTENTION_INPUTS = ("q", "k", "v", "qkv", "query", "key", "value")


@dataclass(frozen=True)
class Candidate:
    """A layer whose neurons can be grown.

    Attributes:
        name: its path.
        root: the layer of the base model that it is a part of, or is.
        category: layers of one category share one part of the budget: the last name in the path
            that is not a number, q, k and v counted as ``"qkv"``.
        activation: path of the activation module that takes this layer's outputs, if known.
        widening: how the layer itself can be widened, if wished and known.
        why_not_widened: why it cannot, as a clause, where it stands in a place for it.
    """

    name: str
    root: str
    category: str
    activation: str | None
    widening: Widening | None
    why_not_widened: str | None = None


def find_candidates(
    model: nn.Module,
    layers: Sequence[str] | None,
    kinds: Collection[str],
    widen: Collection[str],
    graph: TracedGraph | None = None,
    branches: bool = True,
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates in registration order, and {path: why not} for layers left out.

    Args:
        layers: paths, or patterns of them with ``*``, of base layers; their branches come along.
            None: all of ``kinds``, except the last linear layer, whose outputs are the logits.
        kinds: which types to look for, of ``"linear"`` and ``"conv2d"``.
        widen: the roles that shall be widened.
        graph: what ran on a sample, where there is one.
        branches: whether candidates must be layers that can have branches.

    Raises:
        TypeError: layers is a single string.
        ValueError: nothing found, a pattern without a match, a layer that shares its weight, a
            wish to widen that no layer fits.
    """
    if isinstance(layers, str):
        raise TypeError(f"layers is the string {layers!r}; give a list of paths or patterns.")
    roots: dict[str, str] = {}  # of each layer found
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = why_not_grown(model, name, module, kinds)
        if is_transposed_linear(module):
            reason = "a Conv1D can be widened, with depth=False, but has no branches"
            if not branches:
                reason = None if "linear" in kinds else "layers of kind 'linear' are not asked for"
        if reason is None:
            roots[name] = _root(model, name)
        elif reason:
            left_out[name] = reason
    if layers is None:
        linear = [
            root for name, root in roots.items() if isinstance(model.get_submodule(name), nn.Linear)
        ]
        if linear and len(set(roots.values())) > 1:
            output = linear[-1]
            roots = {name: root for name, root in roots.items() if root != output}
            left_out[output] = "it is the last linear layer, whose outputs are the logits"
    else:
        for pattern in layers:
            if not any(fnmatchcase(root, pattern) for root in roots.values()):
                raise ValueError(
                    f"No layer that can be grown matches {pattern!r}"
                    + (f": {left_out[pattern]}." if pattern in left_out else ".")
                )
        roots = {
            name: root
            for name, root in roots.items()
            if any(fnmatchcase(root, pattern) for pattern in layers)
        }
    if not roots:
        raise ValueError(
            f"The model has no layer to grow: it needs nn.Linear or nn.Conv2d layers of the kinds "
            f"{tuple(kinds)} besides its output layer."
        )
    activation_of = activations(model)
    ways, unfit = widenings(model, graph)
    candidates = [
        Candidate(
            name,
            root,
            _category(root),
            activation_of.get(name),
            widening if (widening := ways.get(name)) and widening.role in widen else None,
            unfit.get(name),
        )
        for name, root in roots.items()
    ]
    _refuse_shared_weights(model, candidates)
    for role in widen:
        if not any(c.widening is not None and c.widening.role == role for c in candidates):
            reasons = [f" {n!r} would fit, but {why}." for n, why in unfit.items() if n in roots]
            raise ValueError(
                f"No layer can be widened as {role!r}: {NEEDS[role]}{''.join(reasons)}"
            )
    return candidates, left_out


def _root(model: nn.Module, name: str) -> str:
    parts = name.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if isinstance(model.get_submodule(path), GrownLinear | GrownConv2d):
            return path
    return name


def why_not_grown(
    model: nn.Module, name: str, module: nn.Module, kinds: Collection[str]
) -> str | None:
    """None for a layer to grow, a reason for one that looks like it, "" for anything else."""
    if isinstance(module, BasisConv2d):
        return (
            "its filters are mixed out of few common ones; growkernels.nn.convert gives back a "
            "convolution, which can be grown"
        )
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return ""
    kind = "linear" if isinstance(module, nn.Linear) else "conv2d"
    if kind not in kinds:
        return f"layers of kind {kind!r} are not asked for"
    if module is model:
        return "it is the whole model, in which no grown layer can take its place"
    parent, _, child = name.rpartition(".")
    if child == "minus" and isinstance(model.get_submodule(parent), Branch):
        return "it always receives the gradients of its partner, 'plus'"
    if isinstance(module.weight, UninitializedParameter):
        return "it is lazy and has no weights yet"
    if "parametrizations" in module._modules:
        return f"{why_computed(module)}, which the grown layer would not have"
    if not can_have_branches(module):
        return f"what the forward of a {type(module).__name__} does with its weights is not known"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}, and neurons are grown in real numbers alone"
    if not module.weight.numel():
        return "it has no weights: no inputs or no outputs"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros":
            return "it is a convolution with groups, or with padding other than zeros"
        if isinstance(module.padding, str):
            return f"its padding is {module.padding!r}; give numbers"
    return None


def _refuse_shared_weights(model: nn.Module, candidates: Sequence[Candidate]) -> None:
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    edited = [c.name for c in candidates]
    edited += [name for c in candidates if c.widening is not None for name in c.widening.others]
    for name in edited:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            names = holders[id(parameter)]
            if len(names) > 1:
                raise ValueError(
                    f"Layer {name!r} shares a parameter ({' is '.join(map(repr, names))}): "
                    "growing one use would not grow the others. Leave these layers, and those "
                    "that are widened in front of them, out by naming the others in layers=."
                )


def _category(root: str) -> str:
    names = [part for part in root.split(".") if not part.isdigit()]
    last = names[-1] if names else "layers"
    return "qkv" if last in ATTENTION_INPUTS else last
