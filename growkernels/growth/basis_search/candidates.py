"""The convolutions that a search considers, and the numbers of basis filters it considers there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from growkernels.nn.basis_conv2d import check_replaceable, weight_count

Ranks = Mapping[str, Sequence[int]]  # module path -> numbers of basis filters, ascending


def candidate_ranks(
    model: nn.Module,
    fractions: Sequence[float],
    layers: Collection[str] | None,
    read_elsewhere: Mapping[str, str],
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """{path: ranks} and {path: why not} of convolutions.

    The ranks are the R = max(1, round(fraction * Cout)) whose basis form saves multiplications.

    With K = Cin kh kw a form saves if R (K + Cout - R) < K Cout, that is if R < min(K, Cout). With
    ``layers`` None the convolutions where no fraction saves are left out, as are those that
    ``convert`` cannot replace: with groups, other padding than zeros, or shared weights.

    Args:
        read_elsewhere: {path: what reads a layer's weight without calling it}; left out too.

    Raises:
        ValueError: no fractions or one outside (0, 1); a named layer that is not there, is no
            convolution that can be replaced, or saves nothing; nothing found.
    """
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(
            f"fractions is {tuple(fractions)}; give shares of the output channels between 0 and 1, "
            "e.g. (0.25, 0.5)."
        )
    if isinstance(layers, str):
        raise ValueError(f"layers is the string {layers!r}; give a list of module paths.")
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[int, ...]] = {}
    left_out: dict[str, str] = {}
    for path in modules if layers is None else layers:
        module = modules.get(path)
        if module is None:
            raise ValueError(
                f"There is no module {path!r} in the model; name a convolution by its path as in "
                "model.named_modules()."
            )
        try:
            check_replaceable(module)
            assert isinstance(module, nn.Conv2d)
            if module is model:
                raise ValueError("It is the model itself; put it into an nn.Sequential.")
            if any(uses[id(parameter)] > 1 for parameter in module.parameters()):
                raise ValueError("Its weights are used in several places.")
            if path in read_elsewhere:
                raise ValueError(f"Its weight is also used in {read_elsewhere[path]}.")
            ranks = saving_ranks(module, fractions)
            if not ranks:
                raise ValueError(
                    "No basis form at these fractions saves multiplications; use smaller fractions."
                )
        except (TypeError, ValueError) as error:
            if layers is not None:
                raise ValueError(f"Layer {path!r} cannot be a candidate: {error}") from None
            if isinstance(module, nn.modules.conv._ConvNd):
                left_out[path] = str(error)
        else:
            found[path] = ranks
    if not found:
        raise ValueError(
            "The model has no convolution that a basis convolution with fewer multiplications can "
            f"replace at fractions {tuple(fractions)}; use smaller fractions or another model."
        )
    return found, left_out


def saving_ranks(conv: nn.Conv2d, fractions: Sequence[float]) -> tuple[int, ...]:
    """The R of these fractions with fewer weights and multiplications than conv, ascending."""
    ranks = {max(1, round(fraction * conv.out_channels)) for fraction in fractions}
    return tuple(rank for rank in sorted(ranks) if saved_weights(conv, rank) > 0)


def saved_weights(conv: nn.Conv2d, rank: int) -> int:
    """How many weights, and multiplications per output pixel, the form with R filters saves."""
    taps = conv.in_channels * math.prod(conv.kernel_size)
    needed = weight_count(taps, conv.out_channels, rank, include_basis=True)
    return taps * conv.out_channels - needed
