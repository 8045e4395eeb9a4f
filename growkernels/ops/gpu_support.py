"""The GPU kernels of this installation, and what keeps them from running on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from growkernels.ops.library import build_info

# Which ops have kernels of their own for GPUs, by family.
TRITON_OPS = {
    "basis_conv": ("basis_conv2d",),
    "splitting": ("splitting_weight", "splitting_hvp", "splitting_hvp_conv2d"),
}
CUDA_OPS = {
    "eigen": ("symmetric_eigs", "search_space_step_"),
    "virtual_grad": ("virtual_grads", "virtual_grad_norms"),
}
OLDEST_FOR_TRITON = (8, 0)


class Gpu(NamedTuple):
    """What plans need to know of a GPU, and of the software beside it."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # that a program can have
    triton: bool  # whether it is installed


@lru_cache
def gpu(device: torch.device | None = None) -> Gpu:
    """The GPU that `device` is; None: the current one."""
    properties: Any = torch.cuda.get_device_properties(device)
    return Gpu(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        find_spec("triton") is not None,
    )


class GpuKernels(NamedTuple):
    """A family's kernels in one language.

    Attributes:
        family, language, ops: whose they are; "Triton" or "CUDA C++".
        built: what of them is in this installation, or why they are not.
        obstacle: why they cannot run on this machine; None where they can.
    """

    family: str
    language: str
    ops: tuple[str, ...]
    built: str
    obstacle: str | None


def gpu_kernels() -> list[GpuKernels]:
    """All GPU kernels that this package has, whether or not they are in this installation."""
    triton = [
        GpuKernels(family, "Triton", ops, _triton_state(), no_gpu() or triton_obstacle(gpu()))
        for family, ops in TRITON_OPS.items()
    ]
    cuda = [
        GpuKernels(family, "CUDA C++", ops, _cuda_state(family), cuda_obstacle(family))
        for family, ops in CUDA_OPS.items()
    ]
    return sorted(triton + cuda)


def no_gpu() -> str | None:
    """Why torch can compute on no GPU here."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    return f"torch {torch.__version__} sees no GPU ({_in_torchs_words()})"


@lru_cache
def _in_torchs_words() -> str:
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0].split(". ")[0].rstrip(".")
    return "0 devices"


def triton_obstacle(gpu: Gpu) -> str | None:
    """Why the Triton kernels cannot run on a GPU."""
    if not gpu.triton:
        return "Triton is not installed"
    if gpu.capability < OLDEST_FOR_TRITON:
        return f"the GPU is an sm_{_number(gpu.capability)}; the kernels need sm_80 or newer"
    return None


def cuda_obstacle(family: str, device: torch.device | None = None) -> str | None:
    """Why the family's CUDA kernels cannot run on `device`; None: the current GPU."""
    if family not in build_info().cuda_families:
        return _not_compiled(family)
    if reason := no_gpu():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if not compiled_for(build_info().cuda_architectures, capability):
        return (
            f"the GPU is an sm_{_number(capability)}, but they are {_cuda_state(family)}; build "
            f"with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
        )
    return None


def compiled_for(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for one of these architectures, which are in CMake's words.

    "80-real" is machine code, for GPUs of the same generation that are no older; "80-virtual" is
    PTX, which the driver compiles for any newer GPU; "80" is both. "90a" is for that GPU alone.
    """
    major, minor = capability
    for architecture in architectures:
        name, _, kind = architecture.partition("-")
        found = re.fullmatch(r"(\d+)(\d)([af]?)", name)
        assert found is not None, architecture
        theirs = int(found[1]), int(found[2])
        if theirs == capability:
            return True
        if found[3]:
            continue
        if kind != "virtual" and theirs[0] == major and theirs[1] < minor:
            return True
        if kind != "real" and theirs < capability:
            return True
    return False


def _triton_state() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        return f"compiled at first use by Triton {version('triton')}"
    except PackageNotFoundError:
        return "compiled at first use by Triton of unknown version"


def _cuda_state(family: str) -> str:
    if family not in build_info().cuda_families:
        return "not compiled"
    machine = [a.partition("-")[0] for a in build_info().cuda_architectures if "virtual" not in a]
    ptx = [a.partition("-")[0] for a in build_info().cuda_architectures if "real" not in a]
    codes = [f"sm_{name}" for name in machine] + [f"PTX of {name}" for name in ptx]
    return f"compiled for {', '.join(codes)} by CUDA {build_info().cuda_version}"


def _not_compiled(family: str) -> str:
    note = build_info().cuda_note
    return note if note.startswith("CUDA off") else f"{family} has no CUDA sources"


def _number(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"
