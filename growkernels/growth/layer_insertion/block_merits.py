"""The gradient of a block that is not there yet with respect to the weights it has at zero.

A block behind h that is the identity has dL/d(output) = dL/dh =: g, which an ordinary backward pass
of the model gives. What its zero layer W reads, phi, comes from a forward pass of the candidate
alone, on h; and because all other branches end in zeros, nothing but additions is behind W's
output. So G = dL/dW = gᵀ phi, summed over all rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from growkernels.growth.layer_insertion.block_copies import first_tensor
from growkernels.growth.taps import remove, sum_dtype
from growkernels.nn.hooks import DriverHook
from growkernels.nn.linear_from_conv1d import is_transposed_linear
from growkernels.ops.virtual_grad import virtual_grads

INPUT = "\x00input"  # the key under which the name of a block's input is kept, if it has one


@dataclass
class BlockCall:
    """What a block was called with besides its input, and under which autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None


class CallWatcher(Protocol):
    """What a BlockTap reports to."""

    def block_ran(self, module: nn.Module, call: BlockCall) -> None:
        """A forward pass of a watched block that records gradients has run."""


class BlockTap(DriverHook):
    """A forward hook that tells what a block was called with; nothing in a copied model."""

    def __init__(self, watcher: CallWatcher | None = None) -> None:
        self._watcher = None if watcher is None else weakref.ref(watcher)
        self.left_over = watcher is None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if torch.compiler.is_compiling():
            return
        if self._watcher is None:
            self.vanish(module)
        elif torch.is_grad_enabled() and (watcher := self._watcher()) is not None:
            watcher.block_ran(module, block_call(args, kwargs))

    def __reduce__(self) -> tuple[type[BlockTap], tuple[()]]:
        return BlockTap, ()


def watch_calls(watcher: CallWatcher, blocks: Iterable[nn.Module]) -> Callable[[], object]:
    """Put taps on blocks until what is returned is called, or the watcher is gone."""
    handles = [block.register_forward_hook(BlockTap(watcher), with_kwargs=True) for block in blocks]
    for handle in handles:
        weakref.finalize(watcher, handle.remove).atexit = False
    return partial(remove, handles)


def block_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
    """How a block was called, its input left out."""
    args = tuple(None if _is_cache(value) else value for value in args)
    kept = {
        key: None if _is_cache(value) else value
        for key, value in kwargs.items()
        if key != "use_cache"
    }
    if args:
        h, args = args[0], args[1:]
    else:
        name = next((key for key, value in kept.items() if isinstance(value, Tensor)), None)
        h = None if name is None else kept.pop(name)
        if name is not None:
            kept[INPUT] = name
    device = h.device.type if isinstance(h, Tensor) else "cpu"
    autocast = None
    if torch.is_autocast_enabled(device):
        autocast = device, torch.get_autocast_dtype(device)
    return BlockCall(args, kept, autocast)


def _is_cache(value: Any) -> bool:
    """Whether transformers' models hand it from block to block to keep keys and values in.

    A candidate would add to it what the model never computed, and training has no use for it.
    """
    return hasattr(value, "get_seq_length")


def run(block: nn.Module, h: Tensor, call: BlockCall) -> Any:
    """block(h), with the other arguments of a recorded call, as the training does."""
    kwargs = dict(call.kwargs)
    name = kwargs.pop(INPUT, None)
    given: tuple[Any, ...] = (h, *call.args) if name is None else ()
    if name is not None:
        kwargs[name] = h
    with ExitStack() as stack:
        if call.autocast is not None:
            stack.enter_context(torch.autocast(call.autocast[0], dtype=call.autocast[1]))
        return block(*given, **kwargs)


def zero_gradient(
    block: nn.Module, zero: Sequence[str], h: Tensor, grad: Tensor, call: BlockCall
) -> Tensor:
    """The gradients of a candidate's zero parameters, one behind the other in one vector.

    Args:
        block: an identity copy; it is used up.
        zero: its zero parameters, by name.
        h, grad: its input, and dL/dh, of the same shape.
        call: how the block in the model was called.

    Returns:
        float64 for float64, else float32; of all entries of the parameters in the order of `zero`.
    """
    parameters = dict(block.named_parameters())
    taps = _tapped(block, zero)
    for name, parameter in parameters.items():
        owner = name.rpartition(".")[0]
        parameter.requires_grad_(name in zero and owner not in taps)
    others = [parameters[name] for name in zero if parameters[name].requires_grad]
    devices = [h.device] if h.is_cuda else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        for tap in taps.values():
            stack.enter_context(tap.hooked())
        out = first_tensor(run(block, h.detach(), call))
        outputs = [tap.output for tap in taps.values() if tap.output is not None]
        if out is None or out.shape != grad.shape or not out.requires_grad:
            raise RuntimeError("The candidate block does not return what it is given.")
        given = torch.autograd.grad(out, [*outputs, *others], grad.to(out.dtype), allow_unused=True)
    grads: dict[str, Tensor | None] = {}
    for tap, g in zip((t for t in taps.values() if t.output is not None), given, strict=False):
        if g is not None:
            grads.update(tap.gradients(g, zero))
    names = [name for name in zero if parameters[name].requires_grad]
    grads.update(zip(names, given[len(outputs) :], strict=True))
    dtype = sum_dtype(h.dtype)
    pieces = [grads.get(name) for name in zero]
    return torch.cat(
        [
            (parameters[n].new_zeros(parameters[n].shape) if g is None else g).detach().to(dtype)
            .flatten()
            for n, g in zip(zero, pieces, strict=True)
        ]
    )  # fmt: skip


@dataclass
class _LinearTap:
    """Cuts a zero linear layer out of the candidate's graph: what it reads, and what it makes."""

    name: str
    layer: nn.Module
    input: Tensor | None = None
    output: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        def begins(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.input = args[0].detach()
            return (self.input, *args[1:])

        def ends(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.output is not None:
                raise RuntimeError(
                    f"{self.name!r} runs several times in one pass of the block, so its gradient "
                    "is not one product; leave this position out."
                )
            self.output = output.detach().requires_grad_()
            return self.output

        handles = [
            self.layer.register_forward_pre_hook(begins),
            self.layer.register_forward_hook(ends),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, grad: Tensor, zero: Sequence[str]) -> dict[str, Tensor | None]:
        """Those of weight and bias, from dL/d(output)."""
        assert self.input is not None
        prefix = f"{self.name}." if self.name else ""
        found: dict[str, Tensor | None] = {}
        if f"{prefix}weight" in zero:
            dtype = torch.promote_types(self.input.dtype, grad.dtype)
            h, g = (t.to(dtype).reshape(-1, t.shape[-1]) for t in (self.input, grad))
            (weight,) = virtual_grads([h], [g], "linear")
            found[f"{prefix}weight"] = weight.T if is_transposed_linear(self.layer) else weight
        if f"{prefix}bias" in zero:
            rows = grad.reshape(-1, grad.shape[-1])
            found[f"{prefix}bias"] = rows.sum(0, dtype=sum_dtype(grad.dtype))
        return found


def _tapped(block: nn.Module, zero: Sequence[str]) -> dict[str, _LinearTap]:
    """The zero layers whose gradient is a product of what they read and what comes back."""
    taps: dict[str, _LinearTap] = {}
    for name in dict.fromkeys(entry.rpartition(".")[0] for entry in zero):
        layer = block.get_submodule(name)
        holder = block.get_submodule(name.rpartition(".")[0])
        plain = type(layer) is nn.Linear or is_transposed_linear(layer)
        if plain and not isinstance(holder, nn.MultiheadAttention):
            taps[name] = _LinearTap(name, layer)
    return taps
