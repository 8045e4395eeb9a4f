"""One forward pass of a model, written down: which operation took which values, in which module.

Tensors are followed as the objects that Python code passes around, by a TorchFunctionMode, with
hooks on the modules for where one begins and ends. What this sees is what ran: forwards that branch
on configurations, loop over lists of layers, unpack tuples and keyword arguments, or build masks
from shapes, as transformers' do, need nothing special. (torch.fx and torch.export have to run such
code on symbols and stop where they cannot, and they lose the modules; below autograd, where a
TorchDispatchMode sits, softmax, attention and layer norms are already taken apart, and views come
out as other objects than the model gets.) A TorchDispatchMode listens only for operations that no
Python code called, such as those of scripted functions: what they read is known to have escaped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OVERWRITTEN = "overwritten"  # what happens to a tensor when a view of it is written into
PARAMETERS = ("parameter", "parameters")  # sources of values
# What takes a number out of a tensor, so that Python code can depend on it.
READS_DATA = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


@dataclass(frozen=True)
class Value:
    """A tensor at one moment of the pass.

    Attributes:
        number: its place in ``Trace.values``.
        shape: its sizes.
        source: ``"computed"`` (from an input), ``"input"``, ``"parameter"``, ``"parameters"``
            (computed from them alone), ``"buffer"``, or ``"other"``: constants, what is computed
            from them, and results of code that is not seen.
        name: of a parameter, or of the first that it is computed from, or of a buffer.
    """

    number: int
    shape: tuple[int, ...]
    source: str
    name: str = ""


@dataclass(frozen=True)
class Operation:
    """A call of one of torch's functions.

    Attributes:
        name: without underscores: ``"add"`` for ``+``, ``add_`` and ``torch.add``.
        inputs, outputs: numbers of values, in order.
        arguments: by the function's parameter names where it has a Python signature, else by
            position ``"0"``, ``"1"``, ... and name; values stand as ``Value``.
        calls: the numbers of the module calls around it, the outermost first.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: Mapping[str, Any]
    calls: tuple[int, ...]


@dataclass
class Call:
    """A call of a module.

    Attributes:
        module: its path.
        inputs, keywords, outputs: numbers of the values in its arguments, in its keyword
            arguments, and in what it returned; in order.
        start, stop: operations[start:stop] ran inside it.
        around: the numbers of the calls it is in, the outermost first, itself last.
    """

    module: str
    inputs: tuple[int, ...]
    keywords: Mapping[str, tuple[int, ...]]
    start: int
    around: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    stop: int = 0

    @property
    def given(self) -> tuple[int, ...]:
        """The values in all arguments, positional ones first."""
        return (*self.inputs, *(number for group in self.keywords.values() for number in group))


@dataclass
class Trace:
    """One forward pass.

    Attributes:
        values, operations, calls: see there; in order.
        inputs, outputs: numbers of the values that the model was given, and returned.
        escaped: values that something read which is not in ``operations``.
        data_read_in: paths of modules whose forward took numbers out of tensors, so that another
            input may take another way through them.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    escaped: set[int] = field(default_factory=set)
    data_read_in: dict[str, str] = field(default_factory=dict)

    def calls_of(self, module: str) -> list[Call]:
        """The calls of the module at a path."""
        return [made for made in self.calls if made.module == module]


def trace(model: nn.Module, sample: Any) -> Trace:
    """One forward pass of a model on a sample, in eval mode without gradients.

    The model stays as it is: parameters, gradients, buffers, training modes and hooks, and the
    random number generators too.

    Args:
        model: any module.
        sample: an input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        ValueError: a model with parameters that are not initialised yet, or one that raises an
            error on this sample.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"Parameter {name!r} is lazy and has no values yet; run the model once first."
            )
    recorder = _Recorder(model)
    recorder.trace.inputs = tuple(recorder.number(t, "input") for t in tensors_in(sample))
    with unchanged(model), evaluating(model), recorder.hooks(), _Escapes(recorder), recorder:
        try:
            output = call(model, sample)
        except Exception as error:
            raise ValueError(
                f"The model raises {type(error).__name__} on the sample ({error}); pass an input "
                "that its forward takes: a tensor, a tuple of arguments, or a dict of keyword "
                "arguments."
            ) from error
    recorder.trace.outputs = tuple(recorder.number(t) for t in tensors_in(output))
    return recorder.trace


def read_without_call(trace: Trace, layers: Collection[str]) -> dict[str, str]:
    """{path: what uses its weight, in words} of layers whose parameters others read themselves."""
    found: dict[str, str] = {}
    for operation in trace.operations:
        for number in operation.inputs:
            value = trace.values[number]
            owner = value.name.rpartition(".")[0]
            if value.source != "parameter" or owner not in layers:
                continue
            calls = [trace.calls[number].module for number in operation.calls]
            if owner not in calls:
                user = f"{calls[-1]!r}" if calls and calls[-1] else "the model's own forward"
                found.setdefault(owner, user)
    return found


def call(model: nn.Module, sample: Any) -> Any:
    """The model's output for a sample: several arguments if a tuple, keyword arguments if a dict.

    transformers' models take their inputs as a dict, such as a tokenizer gives.
    """
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, tuple) else model(sample)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    elif is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, entry.name, None) for entry in fields(tree)]
    if isinstance(tree, tuple | list):
        return [tensor for entry in tree for tensor in tensors_in(entry)]
    return []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and random number generators are afterwards as before."""
    kept = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for buffer, value, version in kept:
                if buffer._version != version:
                    buffer.copy_(value)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.inside = False  # one of torch's functions
        self._model = model
        self._alive: dict[int, tuple[Tensor, int]] = {}  # id -> the object and its value
        self._storages: dict[int, dict[int, None]] = {}  # storage -> ids of the objects on it
        self._open: list[int] = []  # calls
        self._names: dict[int, tuple[str, str]] = {}
        for kind, named in (
            ("parameter", model.named_parameters()),
            ("buffer", model.named_buffers()),
        ):
            self._names.update((id(tensor), (kind, name)) for name, tensor in named)

    def number(self, tensor: Tensor, source: str = "other") -> int:
        """The value that a tensor is now; a new one of this source if it was never seen."""
        known = self._alive.get(id(tensor))
        if known is not None:
            return known[1]
        kind, name = self._names.get(id(tensor), (source, ""))
        return self._new(tensor, kind, name)

    def _new(self, tensor: Tensor, source: str, name: str = "") -> int:
        number = len(self.trace.values)
        self.trace.values.append(Value(number, tuple(tensor.shape), source, name))
        self._alive[id(tensor)] = tensor, number
        self._storages.setdefault(_storage(tensor), {})[id(tensor)] = None
        return number

    def note_escape(self, tensor: Tensor) -> None:
        """Something that is not seen reads a tensor."""
        objects = self._storages.get(_storage(tensor), ())
        self.trace.escaped.update(self._alive[entry][1] for entry in objects)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        inputs = tuple(self.number(tensor) for tensor in given)
        versions = [_version(tensor) for tensor in given]
        arguments = self._arguments(func, args, kwargs)
        self.inside = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside = False
        name = _name(func)
        if name in READS_DATA and any(self._is_computed(number) for number in inputs):
            path = self.trace.calls[self._open[-1]].module if self._open else ""
            self.trace.data_read_in.setdefault(path, name)
        written = [t for t, before in zip(given, versions, strict=True) if _version(t) != before]
        made = [*tensors_in(result), *written]
        outputs = dict.fromkeys(self._number_after(t, inputs, written) for t in made)
        if outputs:
            self._note(name, inputs, tuple(outputs), arguments)
        for tensor in written:
            self._note_aliases(tensor, inputs)
        return result

    def _is_computed(self, number: int) -> bool:
        return self.trace.values[number].source in ("computed", "input")

    def _number_after(self, tensor: Tensor, inputs: tuple[int, ...], written: list[Tensor]) -> int:
        """The value of a tensor that an operation returned or wrote into."""
        known = self._alive.get(id(tensor))
        if known is not None and (known[1] not in inputs or not _is_in(tensor, written)):
            return known[1]  # the same object unchanged, or numbered anew already
        if known is None and id(tensor) in self._names:
            return self.number(tensor)
        given = [self.trace.values[number] for number in inputs]
        if any(value.source in ("computed", "input") for value in given):
            return self._new(tensor, "computed")
        name = next((value.name for value in given if value.source in PARAMETERS), None)
        return self._new(tensor, "other") if name is None else self._new(tensor, "parameters", name)

    def _note_aliases(self, written: Tensor, inputs: tuple[int, ...]) -> None:
        """Other tensors on the storage that was written into have new values too."""
        for entry in list(self._storages.get(_storage(written), ())):
            tensor, number = self._alive[entry]
            if tensor is not written:
                changed = self._new(tensor, "computed")
                self._note(OVERWRITTEN, (number, *inputs), (changed,), {})

    def _note(
        self,
        name: str,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        arguments: Mapping[str, Any],
    ) -> None:
        self.trace.operations.append(Operation(name, inputs, outputs, arguments, tuple(self._open)))

    def _arguments(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        given = {str(index): argument for index, argument in enumerate(args)} | dict(kwargs)
        if inspect.isfunction(func):
            with suppress(TypeError, ValueError):
                given = dict(inspect.signature(func).bind(*args, **kwargs).arguments)
        return {name: self._as_values(argument) for name, argument in given.items()}

    def _as_values(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.trace.values[self.number(argument)]
        if isinstance(argument, tuple | list):
            return tuple(self._as_values(entry) for entry in argument)
        return argument

    def module_begins(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A module of the model is called."""
        number = len(self.trace.calls)
        self._open.append(number)
        self.trace.calls.append(
            Call(
                module=path,
                inputs=tuple(self.number(tensor) for tensor in tensors_in(args)),
                keywords={
                    name: tuple(self.number(tensor) for tensor in tensors_in(value))
                    for name, value in kwargs.items()
                },
                start=len(self.trace.operations),
                around=tuple(self._open),
            )
        )

    def module_ends(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """The call that began last returns."""
        ended = self.trace.calls[self._open.pop()]
        ended.outputs = tuple(self.number(tensor) for tensor in tensors_in(output))
        ended.stop = len(self.trace.operations)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on all modules of the model, for the duration of the block."""
        with ExitStack() as handles:
            for path, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # what runs in it escapes
                begins, ends = partial(self.module_begins, path), self.module_ends
                handles.callback(
                    module.register_forward_pre_hook(begins, prepend=True, with_kwargs=True).remove
                )
                handles.callback(module.register_forward_hook(ends, with_kwargs=True).remove)
            yield


class _Escapes(TorchDispatchMode):
    """Notes what is read by operations that the recorder did not see called."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._recorder.inside:
            for tensor in tensors_in((args, kwargs)):
                self._recorder.note_escape(tensor)
        return func(*args, **kwargs)


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):  # of a property of tensors
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    if name in READS_DATA or name == "__getitem__" or name == "__setitem__":
        return name
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return name[1:] if name in ("iadd", "isub", "imul", "itruediv", "radd", "rmul") else name
    return name.partition(".")[0].rstrip("_")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one
        return id(tensor)


def _is_in(tensor: Tensor, tensors: Iterable[Tensor]) -> bool:
    return any(tensor is other for other in tensors)
