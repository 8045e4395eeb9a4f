"""Where a layer can be inserted: candidate positions in a model and what kind of layer fits there.

A position is the path of a module; the new layer goes behind it, on its output h.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from growkernels.growth.layouts import layout_behind, runs_as
from growkernels.growth.module_graph import chains, is_plain_sequential, weight_layers
from growkernels.nn import ResidualBlock
from growkernels.nn.grown_layers import ENDING_IN_RELU
from growkernels.nn.weights import weight_names

KINDS = ("linear_relu", "residual", "conv2d_relu")
ALL_KINDS = (*KINDS, "block")
KIND_BEHIND_RELU = {"features": "linear_relu", "images": "conv2d_relu"}


@dataclass(frozen=True)
class Position:
    """The path of the module whose output is h, and the kind of virtual layer that acts on it.

    Attributes:
        template: of the kind ``"block"``, the path of the block that is copied.
        zero: of the same, the names of the parameters in it that start at zero.
        seed: of the same, where the copy's other values are drawn anew.
        relu_called: h is not the module's output, but what relu makes of it, which a forward calls
            as a function. Behind the module come a ReLU and the new layer, which needs none of its
            own: the function acts on what it makes.
    """

    name: str
    kind: str
    template: str = ""
    zero: tuple[str, ...] = ()
    seed: int | None = None
    relu_called: bool = False

    def renamed(self, paths: Mapping[str, str]) -> Position:
        """The same position in a model whose modules are at other paths now."""
        template = paths[self.template] if self.template else ""
        return replace(self, name=paths[self.name], template=template)


def find_positions(model: nn.Module, kinds: Collection[str] | None = None) -> list[Position]:
    """Every position that can be told from the model's structure, in registration order.

    * ``"linear_relu"``, ``"conv2d_relu"``: after a ReLU that follows a linear layer or 2d
      convolution (torch's or this package's) in the same (possibly nested) Sequential, and after
      every LinearReLU and Conv2dReLU. In between may be normalisation, other activations, dropout
      and, behind convolutions, pooling and the like; not what reshapes, nor modules that are not
      torch's, because then it is not known what the ReLU acts on (``growth.layouts``);
    * ``"residual"``: after every ResidualBlock, and after the module in front of one in the same
      (possibly nested) Sequential.

    ``kinds`` keeps only those kinds. Layers that a hand-written ``forward`` connects cannot be
    told: name such positions.
    """
    positions = {}
    for chain in chains("", model):
        layout: str | None = None
        for index, (name, module) in enumerate(chain):
            follower = chain[index + 1][1] if index + 1 < len(chain) else None
            layout = layout_behind(module, layout)
            kind = _kind_behind(module, layout, follower)
            if kind is not None and name and (kinds is None or kind in kinds):
                positions[name] = Position(name, kind)
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return sorted(positions.values(), key=lambda position: order.index(position.name))


def named_positions(
    model: nn.Module,
    names: Sequence[str] | Mapping[str, str],
    traced: Sequence[Position] = (),
    left_out: Mapping[str, str] | None = None,
) -> list[Position]:
    """The positions that a user named, their kinds given ({path: kind}) or inferred.

    Args:
        traced, left_out: what a pass on a sample showed, if there is one.

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
    found = {position.name: position.kind for position in (*traced, *find_positions(model))}
    shown = {(position.name, position.kind): position for position in traced}
    positions = []
    for name in names:
        if name not in modules or not name:
            raise ValueError(
                f"Position {name!r} is not in the model; its modules are: "
                f"{', '.join(repr(path) for path in list(modules)[1:13])}, ..."
            )
        kind = names[name] if isinstance(names, Mapping) else found.get(name)
        if kind is None and isinstance(modules[name], nn.ReLU):
            kind = _kind_of_named_relu(model, name)
        if kind is None:
            raise ValueError(
                f"The kind of layer to insert at {name!r} ({type(modules[name]).__name__}) cannot "
                f"be inferred; pass positions={{{name!r}: kind}} with kind one of "
                f"{', '.join(KINDS)}."
            )
        if kind not in ALL_KINDS:
            raise ValueError(
                f"Unknown kind {kind!r} for position {name!r}; choose one of "
                f"{', '.join(ALL_KINDS)}."
            )
        if (name, kind) in shown:
            positions.append(shown[name, kind])
            continue
        if kind == "block":
            reason = (left_out or {}).get(name, "no pass on a sample shows a residual block")
            raise ValueError(f"No block can be inserted behind {name!r}: {reason}.")
        if kind != "conv2d_relu" and layout_behind(modules[name], None) == "images":
            raise ValueError(
                f"Position {name!r} makes feature maps [N, C, H, W], whose last axis are no "
                f"features, so that no layer of the kind {kind!r} fits; use 'conv2d_relu' or a "
                "position behind a block."
            )
        positions.append(Position(name, kind))
    return positions


def _kind_behind(module: nn.Module, layout: str | None, follower: nn.Module | None) -> str | None:
    if isinstance(module, ResidualBlock) or isinstance(follower, ResidualBlock):
        return "residual"
    if runs_as(module, (nn.ReLU, *ENDING_IN_RELU)) and layout is not None:
        return KIND_BEHIND_RELU[layout]
    return None


def _kind_of_named_relu(model: nn.Module, name: str) -> str | None:
    """What a ReLU between layers that a hand-written forward connects acts on, if that is clear.

    It is where all that is registered between it and the next layer in front keeps the axes, or
    where no layer is in front and all layers of the model agree.
    """
    layout: str | None = None
    layer_in_front = False
    for path, module in _registered("", model, name):
        if path == name:
            break
        layout = layout_behind(module, layout)
        layer_in_front |= any(weight_names(part) for part in module.modules())
    if not layer_in_front:
        _, behind = weight_layers(model, name)
        layouts = {layout_behind(layer, None) for layer in behind}
        layout = layouts.pop() if len(layouts) == 1 else None
    return None if layout is None else KIND_BEHIND_RELU[layout]


def _registered(prefix: str, parent: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules in registration order, taken apart where `name` is inside, and Sequentials."""
    for child_name, child in parent.named_children():
        path = f"{prefix}{child_name}"
        if name.startswith(f"{path}.") or is_plain_sequential(child):
            yield from _registered(f"{path}.", child, name)
        else:
            yield path, child
