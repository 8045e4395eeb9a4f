"""Where a layer can be inserted: candidate positions in a model and what kind of layer fits there.

A position is the path of a module; the new layer goes behind it, on its output h.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from growkernels.growth.module_graph import chains, layers_before
from growkernels.nn import Conv2dReLU, LinearReLU, ResidualBlock

KINDS = ("linear_relu", "residual", "conv2d_relu")


@dataclass(frozen=True)
class Position:
    """The path of the module whose output is h, and the kind of virtual layer that acts on it."""

    name: str
    kind: str


def find_positions(model: nn.Module, kinds: Collection[str] | None = None) -> list[Position]:
    """Every position that can be told from the model's structure, in registration order.

    * ``"linear_relu"``, ``"conv2d_relu"``: after a ReLU that follows a Linear or Conv2d in the
      same (possibly nested) Sequential, normalisation and the like in between allowed, and after
      every LinearReLU and Conv2dReLU;
    * ``"residual"``: after every ResidualBlock, and after the module in front of one in the same
      (possibly nested) Sequential.

    ``kinds`` keeps only those kinds. Layers that a hand-written ``forward`` connects cannot be
    told: name such positions.
    """
    positions = {}
    for chain in chains("", model):
        producer: nn.Module | None = None
        for index, (name, module) in enumerate(chain):
            follower = chain[index + 1][1] if index + 1 < len(chain) else None
            if isinstance(module, nn.Linear | nn.Conv2d):
                producer = module
            elif isinstance(module, nn.Flatten | nn.Unflatten) or any(module.children()):
                producer = None  # what a ReLU behind it acts on is not known
            kind = _kind_behind(module, producer, follower)
            if kind is not None and name and (kinds is None or kind in kinds):
                positions[name] = Position(name, kind)
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return sorted(positions.values(), key=lambda position: order.index(position.name))


def named_positions(model: nn.Module, names: Sequence[str] | Mapping[str, str]) -> list[Position]:
    """The positions that a user named, their kinds given ({path: kind}) or inferred.

    Raises:
        TypeError: a single string instead of a list of them.
        ValueError: no names, a path that is not in the model, an unknown kind, or a kind that
            cannot be inferred.
    """
    if isinstance(names, str):
        raise TypeError(f"positions is the string {names!r}; give a list of module paths.")
    if not names:
        raise ValueError("positions is empty; name at least one module path, or pass None.")
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {position.name: position.kind for position in find_positions(model)}
    positions = []
    for name in names:
        if name not in modules or not name:
            raise ValueError(
                f"Position {name!r} is not in the model; its modules are: "
                f"{', '.join(repr(path) for path in list(modules)[1:13])}, ..."
            )
        kind = names[name] if isinstance(names, Mapping) else found.get(name)
        if kind is None and isinstance(modules[name], nn.ReLU):
            kind = _relu_kind(_last_producer(model, name))
        if kind is None:
            raise ValueError(
                f"The kind of layer to insert at {name!r} ({type(modules[name]).__name__}) cannot "
                f"be inferred; pass positions={{{name!r}: kind}} with kind one of "
                f"{', '.join(KINDS)}."
            )
        if kind not in KINDS:
            raise ValueError(
                f"Unknown kind {kind!r} for position {name!r}; choose one of {', '.join(KINDS)}."
            )
        positions.append(Position(name, kind))
    return positions


def _kind_behind(
    module: nn.Module, producer: nn.Module | None, follower: nn.Module | None
) -> str | None:
    if isinstance(module, ResidualBlock) or isinstance(follower, ResidualBlock):
        return "residual"
    if isinstance(module, LinearReLU | Conv2dReLU | nn.ReLU):
        return _relu_kind(producer)
    return None


def _relu_kind(producer: nn.Module | None) -> str | None:
    if isinstance(producer, nn.Conv2d):
        return "conv2d_relu"
    return "linear_relu" if isinstance(producer, nn.Linear) else None


def _last_producer(model: nn.Module, name: str) -> nn.Module | None:
    layers = layers_before(model, name)
    return layers[0] if layers else None
