"""Registers, stack and shared memory of GPU kernels, read from their machine code without a GPU."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from triton_builds import TritonBuild

ROOT = Path(__file__).resolve().parent.parent

# Compute capability -> most shared memory of a block [bytes]: CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability". Also the architectures that are compiled for.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
# What the compiler counts as a block's shared memory on top of the kernel's own.
_SYSTEM_SHARED = {90: 1024}


@dataclass(frozen=True)
class KernelResources:
    """What one compiled kernel takes on one architecture.

    Attributes:
        family: the op family.
        name: kernel and tile configuration.
        architecture: compute capability times ten.
        warps: warps of a block; None where the launch decides.
        registers: of a thread.
        stack_bytes: local memory of a thread. In a kernel without local arrays these are spilled
            registers; either way they are slow memory traffic.
        shared_bytes: of a block; of a CUDA C++ kernel without what the launch adds.
        matrix_unit: "wgmma", "mma" or "" for none; None where it was not looked up.
    """

    family: str
    name: str
    architecture: int
    warps: int | None
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_unit: str | None

    def faults(self) -> list[str]:
        """One sentence for each limit that the kernel exceeds."""
        where = f"{self.family}: {self.name} on sm_{self.architecture}"
        faults = []
        if self.stack_bytes:
            faults.append(
                f"{where} keeps {self.stack_bytes} bytes of each thread in local memory at "
                f"{self.registers} registers; make its tile smaller or give it more warps"
            )
        limit = SHARED_LIMITS[self.architecture]
        if self.shared_bytes > limit:
            faults.append(
                f"{where} needs {self.shared_bytes} bytes of shared memory where a block has at "
                f"most {limit}; make its tile smaller or give it fewer stages"
            )
        return faults


def triton_families() -> list[str]:
    """The op families that have a room for Triton kernels, in alphabetical order."""
    rooms = (ROOT / "growkernels" / "ops").glob("*/triton_kernels.py")
    return sorted(path.parent.name for path in rooms)


def compile_triton(modules: dict[str, str], workers: int) -> list[KernelResources]:
    """Compiles every build of every module for all its architectures, `workers` at a time.

    `modules` maps a family's name to the module that has `builds()`. Triton caches what it has
    compiled. Raises RuntimeError where a kernel does not compile or two builds share a name.
    """
    jobs = []
    for family, module in modules.items():
        builds: list[TritonBuild] = list(importlib.import_module(module).builds())
        names = [build.name for build in builds]
        if twice := {name for name in names if names.count(name) > 1}:
            raise RuntimeError(f"{module}.builds() has several builds named {sorted(twice)}")
        jobs += [(family, module, b.name, sm) for b in builds for sm in b.architectures]
    if not jobs:
        return []
    # Spawned, not forked: the libraries behind torch and Triton have threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, *zip(*jobs, strict=True)))


def _compile(family: str, module: str, name: str, architecture: int) -> KernelResources:
    builds: Iterator[TritonBuild] = importlib.import_module(module).builds()
    build = next(build for build in builds if build.name == name)
    try:
        compiled = compile_build(build, architecture)
    except Exception as error:
        raise RuntimeError(
            f"{family}: {name} does not compile for sm_{architecture} "
            f"({type(error).__name__}: {error})"
        ) from None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(Path(file.name))
    ptx = compiled.asm["ptx"]
    units = {"wgmma": "wgmma.mma_async", "mma": "mma.sync"}
    return KernelResources(
        family=family,
        name=name,
        architecture=architecture,
        warps=build.num_warps,
        registers=usage.registers,
        stack_bytes=usage.stack_bytes,
        shared_bytes=compiled.metadata.shared,
        matrix_unit=next((unit for unit, opcode in units.items() if opcode in ptx), ""),
    )


def compile_build(build: TritonBuild, architecture: int) -> Any:
    """Triton's compiled kernel of `build`. Raises ValueError for arguments that do not fit it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = build.kernel.arg_names
    described = [*build.signature, *build.constants]
    if sorted(described) != sorted(arguments):
        raise ValueError(
            f"{build.name!r} describes the arguments {described} but the kernel has {arguments}; "
            "name each of them once, in signature or in constants"
        )
    signature, divisible = {}, {}
    for position, argument in enumerate(arguments):
        kind, _, hint = build.signature.get(argument, "constexpr").partition(":")
        signature[argument] = kind
        if hint not in ("", "16"):
            raise ValueError(
                f"{build.name!r} has the hint {hint!r} at {argument}; only 16 is known"
            )
        if hint:
            divisible[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(build.kernel, signature, dict(build.constants), divisible),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )


class Usage(NamedTuple):
    """One kernel of a binary. `architecture` is 0 in a cubin, which is for one alone."""

    name: str
    architecture: int
    registers: int
    stack_bytes: int
    static_shared_bytes: int


def resource_usage(binary: Path) -> list[Usage]:
    """The kernels in a cubin, or in a library or program that CUDA code was linked into."""
    listing = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", str(binary)], capture_output=True, text=True
    )
    if listing.returncode:
        raise RuntimeError(f"cuobjdump cannot read {binary}: {listing.stderr.strip()}")
    return parse_usage(listing.stdout)


def parse_usage(listing: str) -> list[Usage]:
    """What `cuobjdump --dump-resource-usage` printed."""
    architecture, name, kernels = 0, "", []
    for line in listing.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif fields := dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)):
            figures = {key: int(value) for key, value in fields.items()}
            stack = figures["STACK"] + figures["LOCAL"]
            kernels.append(Usage(name, architecture, figures["REG"], stack, figures["SHARED"]))
    return kernels


def cuda_kernels(library: Path) -> list[KernelResources]:
    """The CUDA C++ kernels in a compiled op library, by family, name and architecture.

    A kernel that several source files hold a copy of appears once. Raises RuntimeError where
    cuobjdump cannot read the library.
    """
    kernels = [usage for usage in resource_usage(library) if usage.architecture in SHARED_LIMITS]
    names = _demangled([kernel.name for kernel in kernels])
    found = {_cuda_kernel(kernel, name) for kernel, name in zip(kernels, names, strict=True)}
    return sorted(found, key=lambda kernel: (kernel.family, kernel.name, kernel.architecture))


def _cuda_kernel(usage: Usage, name: str) -> KernelResources:
    """`name` is growkernels::FAMILY::…, with what else the families' namespaces hold."""
    short = name.replace("growkernels::", "").replace("cuda::", "")
    scope, bracket, arguments = short.partition("<")
    family, _, kernel = scope.rpartition("::")
    rest = kernel + bracket + arguments
    return KernelResources(
        family=family,
        name=rest.replace(f"{family}::", ""),
        architecture=usage.architecture,
        warps=None,
        registers=usage.registers,
        stack_bytes=usage.stack_bytes,
        shared_bytes=usage.static_shared_bytes - _SYSTEM_SHARED.get(usage.architecture, 0),
        matrix_unit=None,
    )


def _demangled(names: list[str]) -> list[str]:
    """C++ names without their arguments, as far as the machine has c++filt."""
    filter_program = shutil.which("c++filt")
    if filter_program is None or not names:
        return names
    text = subprocess.run(
        [filter_program, "--no-params"], input="\n".join(names), capture_output=True, text=True
    ).stdout
    return [line.removeprefix("void ") for line in text.splitlines()]


def _cuobjdump() -> str:
    """CUDA's cuobjdump from PATH, else the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not bundled.is_file():
        raise RuntimeError(
            "there is no cuobjdump on PATH and none in Triton; put a CUDA toolkit's bin on PATH"
        )
    return str(bundled)
