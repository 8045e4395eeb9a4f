"""Following modules, which keep their identity, by paths, which do not.

An insertion renumbers the children of a Sequential, users replace layers, conversions exchange
them. What is noted under a path therefore comes with a table of the modules of that time, by
which it is found again, or by which it is known that the model was changed.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

T = TypeVar("T")


class ModulePaths:
    """Which module was at which path of a model, and the shapes of its parameters.

    Modules are held weakly. A table that was copied or pickled, and ``ModulePaths()``, know of no
    model, and answer as if nothing had changed.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._modules: dict[str, weakref.ref[nn.Module]] = {}
        self._shapes: dict[str, dict[str, torch.Size]] = {}
        if model is not None:
            for path, module in model.named_modules(remove_duplicate=False):
                self._modules[path] = weakref.ref(module)
                self._shapes[path] = _shapes(module)

    def __reduce__(self) -> tuple[type[ModulePaths], tuple[()]]:
        return ModulePaths, ()

    def knows(self, model: nn.Module) -> bool:
        """Whether it is of this model object, as it is now or was earlier."""
        return self._model is not None and self._model() is model

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model has these modules, at these paths and of these sizes, now."""
        if not self.knows(model):
            return False
        modules = dict(model.named_modules(remove_duplicate=False))
        return modules.keys() == self._modules.keys() and all(
            self._shapes[path] == _shapes(module) and self.module(path) is module
            for path, module in modules.items()
        )

    def now(self, model: nn.Module) -> dict[str, str]:
        """{path then: path now} for each module that is still in the model."""
        places: defaultdict[nn.Module, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            places[module].append(path)
        now: dict[str, str] = {}
        for path, reference in self._modules.items():
            held = reference()
            if held is not None and (found := places.get(held)):
                now[path] = path if path in found else found[0]
        return now

    def path_now(self, model: nn.Module, path: str) -> str | None:
        """Where the module that was at this path is now, with parameters of the same shapes.

        None: it is not in the model any more, was resized, or there was none. A table of another
        model takes a path for what it says.
        """
        if not self.knows(model):
            return path
        now = self.now(model).get(path)
        if now is None or _shapes(model.get_submodule(now)) != self._shapes[path]:
            return None
        return now

    def module(self, path: str) -> nn.Module | None:
        """The module that was at this path."""
        reference = self._modules.get(path)
        return None if reference is None else reference()

    def path_of(self, module: nn.Module) -> str | None:
        """The path that a module had."""
        paths = (path for path, held in self._modules.items() if held() is module)
        return next(paths, None)

    def place_now(self, model: nn.Module, path: str) -> str | None:
        """Where the module that was at this path is now; if it was replaced there, the same path.

        None: it is gone, and at its path is another module of that time.
        """
        if not self.knows(model):
            return path
        now = self.now(model)
        if path in now:
            return now[path]
        return None if path in now.values() else path

    def difference(self, model: nn.Module) -> str | None:
        """A clause about a module that was taken away, replaced or resized since; None: there is
        none, so that modules were added or moved at most.
        """
        now = self.now(model)
        for path, shapes in self._shapes.items():
            if path not in now:
                return f"the module that was at {path!r} is not in the model any more"
            resized = _shapes(model.get_submodule(now[path]))
            for name, shape in shapes.items():
                if resized.get(name) != shape:
                    return (
                        f"the {name} of {now[path]!r} was {list(shape)}, and is "
                        f"{list(resized[name]) if name in resized else 'no parameter'} now"
                    )
        return None


class NotedByPath:
    """A result whose keys are paths, with the modules that these are paths of."""

    _paths: ModulePaths = ModulePaths()

    def noted(self: T, paths: ModulePaths) -> T:
        """The object itself, from now on with the modules of its paths."""
        object.__setattr__(self, "_paths", paths)  # results are frozen
        return self

    def knows(self, model: nn.Module) -> bool:
        """Whether the result is of this model object."""
        return self._paths.knows(model)

    def path_now(self, model: nn.Module, path: str) -> str | None:
        """Where a module of the result is now, see ``ModulePaths.path_now``."""
        return self._paths.path_now(model, path)

    def own_path(self, other: object, path: str) -> str:
        """The path by which this result knows the module that another one knows by ``path``.

        That is ``path`` itself where one of the two knows no modules, or not this one.
        """
        module = other._paths.module(path) if isinstance(other, NotedByPath) else None
        own = None if module is None else self._paths.path_of(module)
        return path if own is None else own


class Plan(NotedByPath, dict[str, int]):
    """{module path: R} that follows the modules of the model it was made for."""

    def place_now(self, model: nn.Module, path: str) -> str | None:
        """Where a layer is to be exchanged now, see ``ModulePaths.place_now``."""
        return self._paths.place_now(model, path)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {
        name: parameter.shape
        for name, parameter in module._parameters.items()
        if parameter is not None and not is_lazy(parameter)
    }
