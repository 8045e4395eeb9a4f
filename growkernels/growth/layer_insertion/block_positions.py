"""Where a residual block can be inserted: behind which blocks, copies of which, and why not."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from growkernels.growth.layer_insertion.block_copies import (
    BLOCK,
    check_identity,
    first_tensor,
    identity_copy,
    insert_block,
    why_not_counted,
)
from growkernels.growth.layer_insertion.block_merits import BlockCall, block_call, run
from growkernels.growth.layer_insertion.positions import Position
from growkernels.growth.residual_blocks import Block, stacks
from growkernels.growth.same_function import (
    check_same_output,
    outputs_in_eval_mode,
    running_once,
)
from growkernels.nn import ResidualBlock
from growkernels.nn.exchange import undone_on_error
from growkernels.nn.tracing import Trace, call, evaluating, unchanged


def find_block_positions(
    model: nn.Module,
    trace: Trace,
    sample: Any,
    zero: Sequence[str] | None = None,
    seed: int | None = None,
) -> tuple[list[Position], dict[str, str]]:
    """The positions behind blocks of residual stacks, and {path: why not} for others.

    What is inserted is a copy of the block in front, or, where that changes the shape of its input
    or is no residual block, of the next one. On the sample it has to be the identity to 1e-6.

    Args:
        trace: of the model on the sample.
        zero: names below a block, of layers or parameters, that make a block the identity when
            they are zero; None: those that the pass shows.
        seed: of new values for the copies, others at each position; None: they keep the block's.
    """
    positions: dict[str, tuple[str, Block]] = {}
    left_out: dict[str, str] = {}
    found = [(stack, blocks) for stack, blocks in stacks(model, trace)]
    if zero is not None:
        found = [
            (stack, [_named(model, block, zero) for block in blocks]) for stack, blocks in found
        ]
    residual = {stack for stack, blocks in found if any(b.reason is None for b in blocks)}
    for stack, blocks in found:
        kinds = {type(model.get_submodule(block.name)) for block in blocks}
        alike = len(blocks) > 1 and len(kinds) == 1 and all(b.keeps_shape for b in blocks)
        usable = [
            block.reason is None
            and not any(f"{other}.".startswith(f"{block.name}.") for other in residual)
            and not isinstance(model.get_submodule(block.name), ResidualBlock)
            for block in blocks
        ]
        if not any(usable) and not alike:
            continue  # a chain of other things, or of stacks
        uncounted = why_not_counted(model, stack)
        for index, block in enumerate(blocks):
            behind = index + 1 < len(blocks) and usable[index + 1]
            if not block.hands_on and (usable[index] or behind):
                left_out[block.name] = "it does not hand its output on to the next block as it is"
            elif uncounted is not None and (usable[index] or behind):
                left_out[block.name] = uncounted
            elif usable[index] or behind:
                template = block if usable[index] else blocks[index + 1]
                positions[block.name] = template.name, template
            elif block.reason is not None:
                left_out[block.name] = f"it {block.reason}"
    return _checked(model, sample, positions, left_out, seed)


def _named(model: nn.Module, block: Block, zero: Sequence[str]) -> Block:
    """The block with the zero parameters that a user named, if it has them."""
    module = model.get_submodule(block.name)
    names: list[str] = []
    for entry in zero:
        inside = [
            n for n, _ in module.named_parameters() if n == entry or n.startswith(f"{entry}.")
        ]
        if not inside:
            return block
        names += inside
    return replace(block, zero=tuple(names), reason=None)


def _checked(
    model: nn.Module,
    sample: Any,
    positions: Mapping[str, tuple[str, Block]],
    left_out: dict[str, str],
    seed: int | None,
) -> tuple[list[Position], dict[str, str]]:
    """Those whose candidate is the identity on what arrives there on the sample."""
    modules = [model.get_submodule(name) for name in positions]
    modules += [model.get_submodule(template) for template, _ in positions.values()]
    outputs, calls = _seen(model, modules, sample)
    fitting: list[Position] = []
    for name, (template, block) in positions.items():
        h = outputs[model.get_submodule(name)]
        own_seed = None if seed is None else zlib.crc32(f"{name} {seed}".encode())
        try:
            new = identity_copy(model, template, block.zero, own_seed)
            seen = calls[model.get_submodule(template)]
            check_identity(new, h, partial(_output, seen))
        except (ValueError, RuntimeError) as error:
            reason = str(error)
            left_out[name] = reason[0].lower() + reason[1:].rstrip(".")
        else:
            fitting.append(Position(name, BLOCK, template, block.zero, own_seed))
    for stack in dict.fromkeys(position.name.rpartition(".")[0] for position in fitting):
        inside = [p for p in fitting if p.name.rpartition(".")[0] == stack]
        if (refused := _why_not_run(model, sample, inside)) is not None:
            fitting = [position for position in fitting if position not in inside]
            left_out.update((position.name, refused) for position in inside)
    return fitting, left_out


class _Tried(Exception):  # noqa: N818
    """Undoes a trial."""


def _why_not_run(model: nn.Module, sample: Any, positions: Sequence[Position]) -> str | None:
    """Why the model would not run blocks inserted at all of a stack's positions, or None."""
    before = outputs_in_eval_mode(model, sample)
    try:
        with unchanged(model), undone_on_error(model, None), ExitStack() as counters:
            for position in reversed(positions):  # the names of those in front stay
                new = insert_block(
                    model, position.name, position.template, position.zero, None, position.seed
                )
                counters.enter_context(running_once(new, position.name))
            check_same_output(before, outputs_in_eval_mode(model, sample))
            counters.close()
            raise _Tried
    except _Tried:
        pass
    except Exception:
        return (
            "the model does not run one more block there as it runs the others: with a copy that "
            "is the identity it computes something else, or fails"
        )
    return None


def _output(seen: BlockCall, block: nn.Module, h: Tensor) -> Tensor | None:
    return first_tensor(run(block, h, seen))


def _seen(
    model: nn.Module, modules: Sequence[nn.Module], sample: Any
) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, BlockCall]]:
    """What modules return, and are called with, on the sample in eval mode."""
    outputs: dict[nn.Module, Tensor] = {}
    calls: dict[nn.Module, BlockCall] = {}

    def ran(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        assert tensor is not None
        outputs[module] = tensor.clone()  # what follows may overwrite it
        calls[module] = block_call(args, kwargs)

    handles = [
        module.register_forward_hook(ran, with_kwargs=True) for module in dict.fromkeys(modules)
    ]
    try:
        with unchanged(model), evaluating(model):
            call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, calls
