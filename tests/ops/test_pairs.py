"""Strides, paddings and dilations: one parser, which takes what convolutions take."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import growkernels as gk
from growkernels.ops.arguments import pair


@pytest.mark.parametrize("value", [2, (2, 2), [2, 2], torch.Size((2, 2))], ids=repr)
def test_numbers_and_sequences_of_two(value: int | Sequence[int]) -> None:
    assert pair("stride", value) == pair("stride", value, 2) == (2, 2)


def test_symbolic_numbers_stay_symbolic() -> None:
    symbol = ShapeEnv().create_unbacked_symint()
    for value in (symbol, (symbol, 1)):
        vertical, horizontal = pair("stride", value)
        assert vertical is symbol
        assert horizontal is symbol or horizontal == 1


@pytest.mark.parametrize("value", [1.5, "12", (1,), (1, 1, 1), (1, 1.5), None, {1, 2}], ids=repr)
def test_anything_else_is_named_in_one_sentence(value: int) -> None:
    with pytest.raises(ValueError, match=r"^stride is .*; pass an int or a pair of ints$"):
        pair("stride", value)
    x, w, v = torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2), torch.ones(3, 2, 3, 3)
    with pytest.raises(ValueError, match=r"^splitting_hvp_conv2d: padding is .*; pass an int"):
        gk.splitting_hvp_conv2d(x, w, v, padding=value)
    with pytest.raises(ValueError, match=r"^basis_conv2d: padding is .*; pass an int"):
        gk.basis_conv2d(x, v, torch.ones(1, 3), padding=value)


def test_too_small_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^stride is \(1, 0\); pass .* pair of ints, from 1 up$"):
        pair("stride", (1, 0), 1)
