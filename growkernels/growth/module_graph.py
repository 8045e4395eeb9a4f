"""What a model's structure tells: runs of modules, and which layer or activation follows what."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from growkernels.growth.layouts import ELEMENTWISE, runs_as
from growkernels.nn import ResidualBlock
from growkernels.nn.grown_layers import ENDING_IN_RELU, Branch
from growkernels.nn.weights import weight_names

Chain = list[tuple[str, nn.Module]]


def weight_layers(model: nn.Module, name: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers with weight matrices registered at or before `name`, and those behind it.

    Both nearest to `name` first.
    """
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    passed = False
    for path, module in model.named_modules():
        inside = path == name or path.startswith(f"{name}.")
        passed = passed or inside
        if weight_names(module):
            (after if passed and not inside else before).append(module)
    return before[::-1], after


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether the module's forward is just its children in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def chains(name: str, module: nn.Module) -> Iterator[Chain]:
    """Runs of modules of which each one's output is the next one's input."""
    chain = list(_flatten(name, module)) if is_plain_sequential(module) else [(name, module)]
    yield chain
    for path, link in chain:
        if isinstance(link, ResidualBlock):
            continue
        for child_name, child in link.named_children():
            yield from chains(f"{path}.{child_name}" if path else child_name, child)


def followers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(layer, what takes its outputs): its activation, and the layer behind elementwise modules.

    Known in Sequentials, and in modules with fc1, act and fc2, as timm's and this package's MLPs,
    unless something else, such as a norm, is registered between fc1 and act.
    """
    runs = [[(name, module) for name, module in chain] for chain in chains("", model)]
    for name, module in model.named_modules():
        at = f"{name}." if name else ""
        children = dict(module.named_children())
        fc1, act, fc2 = (children.get(key) for key in ("fc1", "act", "fc2"))
        if fc1 is None or act is None or _is_gated(fc1, fc2):
            continue
        others = [key for key in children if key != "fc2"]
        between = others[others.index("fc1") + 1 : others.index("act")]
        if not all(runs_as(children[key], ELEMENTWISE) for key in between):
            continue
        run = [(f"{at}fc1", fc1), (f"{at}act", act)]
        others.remove("fc1")
        if fc2 is not None and all(runs_as(children[key], ELEMENTWISE) for key in others):
            run.append((f"{at}fc2", fc2))
        runs.append(run)
    for run in runs:
        for index, (name, module) in enumerate(run):
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            first_activation = not isinstance(module, ENDING_IN_RELU)
            for follower, next_module in run[index + 1 :]:
                if isinstance(next_module, nn.Linear | nn.Conv2d):
                    yield name, follower
                    break
                if not runs_as(next_module, ELEMENTWISE):
                    break
                if first_activation and not isinstance(next_module, nn.Dropout | nn.Identity):
                    first_activation = False
                    yield name, follower


def activations(model: nn.Module) -> dict[str, str]:
    """Layer -> the activation module that takes its outputs."""
    found: dict[str, str] = {}
    for name, follower in followers(model):
        if not isinstance(model.get_submodule(follower), nn.Linear | nn.Conv2d):
            found[name] = follower
    for name, module in model.named_modules():
        if isinstance(module, Branch):
            for child in ("plus", "linear"):
                if hasattr(module, child):
                    found[f"{name}.{child}"] = f"{name}.act"
    return found


def _flatten(name: str, sequential: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in sequential._modules.items():
        path = f"{name}.{child_name}" if name else child_name
        if child is None:
            continue
        if is_plain_sequential(child):
            yield from _flatten(path, child)
        else:
            yield path, child


def _is_gated(fc1: nn.Module, fc2: nn.Module | None) -> bool:
    """Whether fc2 has another width than fc1, which halves or gates its outputs (timm's GluMlp)."""
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear):
        return False
    return fc1.out_features != fc2.in_features
