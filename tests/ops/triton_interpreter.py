"""Completes Triton 3.6's interpreter. Import it before a kernel is called.

It fails to run loops beside NumPy 2.4 and later, multiplies the bits of bfloat16 as integers, and
cuts bfloat16 off where a GPU rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl


def _patch_and_index(tensor: Any, *scope: Any) -> None:
    """The bounds of a loop are arrays of one element, which NumPy no longer takes for an int."""
    _patch_lang_tensor(tensor, *scope)
    scope[0].set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _cast_and_round(self: Any, value: Any, dtype: Any) -> Any:
    """The interpreter keeps bfloat16 as the upper half of a float32's bits."""
    source, target = value.dtype.scalar, dtype.scalar
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    if (source, target) == (tl.bfloat16, tl.float32):
        bits = value.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    return _cast(self, value, dtype)


def _dot_of_any_dtype(self: Any, *factors_and_sum: Any) -> Any:
    a, b, *rest = factors_and_sum
    if a.dtype.scalar in (tl.bfloat16, tl.float16):  # NumPy takes seconds for products of float16
        a, b = (_cast_and_round(self, factor, tl.float32) for factor in (a, b))
    return _create_dot(self, a, b, *rest)


def rounded_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """What float32 is on its way into a GPU's product of TF32: 11 significant bits, ties away."""
    mantissa, exponent = torch.frexp(values.double())
    nearest = torch.floor(mantissa.abs() * 2**11 + 0.5) * mantissa.sign()
    return torch.ldexp(nearest, exponent - 11)


interpreter._patch_lang_tensor = _patch_and_index
interpreter.InterpreterBuilder.create_dot = _dot_of_any_dtype
interpreter.InterpreterBuilder.cast_impl = _cast_and_round
