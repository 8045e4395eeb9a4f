"""Every op refuses what does not fit in one sentence, with and without autograd."""

from __future__ import annotations

from typing import Any

import pytest
from op_samples import Bad
from op_samples.contract import BAD_CALLS, assert_refused_on
from torch import Tensor
from torch.utils import _pytree as pytree


def differentiable(argument: Any) -> Any:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(Tensor, leaf, argument)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_input_is_one_sentence(bad: Bad, requires_grad: bool) -> None:
    arguments = bad.arguments
    if requires_grad:
        arguments = (*map(differentiable, arguments[:3]), *arguments[3:])
    with pytest.raises(bad.error, match=bad.message) as caught:
        bad.function(*arguments, **bad.options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_shapes_alone_are_refused_in_the_same_words(bad: Bad) -> None:
    """By the Meta kernels, which torch.compile traces with."""
    assert_refused_on("meta", bad)
