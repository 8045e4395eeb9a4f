"""Completes Triton 3.6's interpreter. Import it before a kernel is called.

It fails to run loops beside NumPy 2.4 and later, and to multiply bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_and_index(tensor: Any, *scope: Any) -> None:
    """The bounds of a loop are arrays of one element, which NumPy no longer takes for an int."""
    _patch_lang_tensor(tensor, *scope)
    scope[0].set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _widened(factor: Any) -> Any:
    """float32 for bfloat16, which the interpreter keeps as the upper half of a float32's bits."""
    if factor.dtype.scalar != tl.bfloat16:
        return factor
    bits = factor.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _dot_of_any_dtype(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), *rest)


interpreter._patch_lang_tensor = _patch_and_index
interpreter.InterpreterBuilder.create_dot = _dot_of_any_dtype
