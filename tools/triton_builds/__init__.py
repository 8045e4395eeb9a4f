"""The inventory of Triton kernels and their tiles, so that all of them compile without a GPU.

For every family that has Triton kernels there is a module of its name here, with
`builds() -> Iterator[TritonBuild]`, which yields every kernel with every listed tile configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class TritonBuild:
    """What Triton would compile for a launch: a kernel, its arguments' types, its configuration.

    Attributes:
        name: unique within the family, e.g. "forward bf16 128x64x32".
        kernel: the function under `@triton.jit`.
        signature: types of the arguments that are known at launch only, by argument name, as
            Triton writes them ("*bf16", "i32", "fp32"). A suffix ":16" says that the pointer or
            number is a multiple of 16, as Triton finds at launch for every pointer that torch's
            allocator returns and for every such size; without it no wide load can be compiled.
        constants: values of all other arguments: every `tl.constexpr`, every number that is 1
            at launch (Triton makes a constant of it), and None for a pointer that is left out.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        architectures: compute capabilities times ten on which a launch may choose it.
    """

    name: str
    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    architectures: tuple[int, ...] = (80, 90)
