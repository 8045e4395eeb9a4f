"""Rounding of float32 to TF32 inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded_to_tf32(values):
    """Values of float32 with TF32's 10 bits of mantissa, to nearest, ties away; others as they are.

    Tensor cores cut the rest of the mantissa off, which biases every product towards zero. The
    vendor's products round their factors first, and Triton's `tl.dot` does not.
    """
    if values.dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # In the bits of a NaN the addition may carry into the sign.
        values = tl.where(values == values, nearest, values)
    return values
