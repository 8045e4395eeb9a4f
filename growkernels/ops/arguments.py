"""Arguments that are no tensors at all: torch's dispatcher answers them with many lines."""

from __future__ import annotations

from torch import Tensor


def check_tensors(op: str, **arguments: object) -> None:
    """Raises TypeError for the first of the arguments, by name, that does not pass for a tensor."""
    for name, value in arguments.items():
        if not _passes_for_tensor(value):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}; pass a torch.Tensor")


def check_tensor_lists(op: str, **arguments: object) -> None:
    """Raises TypeError for the first of the arguments, by name, that is not a list of tensors."""
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            # Small networks feel every microsecond: nothing is made where nothing is wrong.
            for index, entry in enumerate(value):
                if not _passes_for_tensor(entry):
                    check_tensors(op, **{f"{name}[{index}]": entry})
        elif isinstance(value, Tensor) or not _passes_for_tensor(value):
            raise TypeError(
                f"{op}: {name} is a {type(value).__name__}; pass a list of tensors, one for every "
                "position"
            )


def _passes_for_tensor(value: object) -> bool:
    # The stand-ins that torch.fx traces with are no tensors.
    return isinstance(value, Tensor) or hasattr(type(value), "__torch_function__")
