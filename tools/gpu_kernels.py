"""`make gpu-kernels`: what every GPU kernel takes of a GPU; fails where one spills or cannot start.

Compiles every Triton kernel with every listed tile configuration, for every architecture, without
a GPU. Given a compiled op library, it reads the CUDA C++ kernels in it too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kernel_resources import (
    ROOT,
    SHARED_LIMITS,
    KernelResources,
    compile_triton,
    cuda_kernels,
    triton_families,
)

DOCUMENT = ROOT / "docs" / "gpu_kernels.md"
_CUDA_HEADING = "## CUDA C++"
_INTRODUCTION = """\
# GPU kernels: registers, local memory, shared memory

Written by `make gpu-kernels` from compiled code, which needs no GPU. Every tile configuration that
a kernel may run with has a row. Local memory is where registers spill to: a kernel that uses any,
or needs more shared memory than a block has ({limits}), fails the tests. "Matrix unit" is the
instruction its products compile to: `wgmma` reads shared memory, `mma` reads registers.
"""


def document(
    triton: Sequence[KernelResources],
    cuda: Sequence[KernelResources] | None,
    triton_version: str,
    old: str,
) -> str:
    """The whole document. Without figures of the CUDA kernels (None) those in `old` are kept."""
    limits = ", ".join(f"sm_{sm} {limit // 1024} KiB" for sm, limit in SHARED_LIMITS.items())
    parts = [_INTRODUCTION.format(limits=limits)]
    for family in sorted({kernel.family for kernel in triton}):
        rows = [kernel for kernel in triton if kernel.family == family]
        parts.append(f"## Triton {triton_version}: `{family}`\n\n{markdown(rows)}\n")
    if cuda is None:
        _, heading, kept = old.partition(_CUDA_HEADING)
        parts.append(heading + kept)
    else:
        note = "Shared memory that a launch asks for is not in these figures."
        parts.append(f"{_CUDA_HEADING}\n\n{note}\n")
        for family in sorted({kernel.family for kernel in cuda}):
            rows = [kernel for kernel in cuda if kernel.family == family]
            parts.append(f"### `{family}`\n\n{markdown(rows)}\n")
    return "\n".join(part for part in parts if part)


def markdown(kernels: Sequence[KernelResources]) -> str:
    """One row per kernel, both architectures beside each other."""
    columns = ["registers", "local bytes", "shared KiB"]
    heading = ["kernel", "warps"]
    with_unit = any(kernel.matrix_unit is not None for kernel in kernels)
    for architecture in SHARED_LIMITS:
        heading += [f"sm_{architecture}: {columns[0]}", *columns[1:]]
        heading += ["matrix unit"] if with_unit else []
    rows = []
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        found = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        warps = next(iter(found.values())).warps
        row = [f"`{name}`", "–" if warps is None else str(warps)]
        for architecture in SHARED_LIMITS:
            kernel = found.get(architecture)
            row += _cells(kernel) if kernel else ["–"] * 3
            row += [(kernel and kernel.matrix_unit) or "–"] if with_unit else []
        rows.append(row)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from benchmarks.markdown import table

    return table(heading, rows)


def _cells(kernel: KernelResources) -> list[str]:
    shared = f"{kernel.shared_bytes / 1024:.4g}"
    return [str(kernel.registers), str(kernel.stack_bytes), shared]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_kernels", description=__doc__)
    parser.add_argument("--library", type=Path, help="op library with compiled CUDA sources")
    parser.add_argument("--module", action="append", help="only this module with a builds()")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    # Triton reads it when a kernel is defined; an interpreted kernel cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    families = {name: f"triton_builds.{name}" for name in triton_families()}
    modules = {name: name for name in options.module} if options.module else families
    try:
        triton_kernels = compile_triton(modules, os.cpu_count() or 1)
        cuda = cuda_kernels(options.library) if options.library else None
    except (RuntimeError, ImportError) as error:
        print(f"gpu_kernels: {error}", file=sys.stderr)
        return 2
    kernels = [*triton_kernels, *(cuda or [])]
    for kernel in kernels:
        print(
            f"{kernel.family}: {kernel.name}, sm_{kernel.architecture}: "
            f"{kernel.registers} registers, {kernel.stack_bytes} bytes local, "
            f"{kernel.shared_bytes} bytes shared, {kernel.matrix_unit or 'no matrix unit'}"
        )
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    for fault in faults:
        print(f"gpu_kernels: {fault}", file=sys.stderr)
    print(f"{len(kernels)} compiled kernels, {len(faults)} beyond a limit")
    if options.write and not faults:
        import triton

        old = DOCUMENT.read_text() if DOCUMENT.exists() else ""
        part = DOCUMENT.with_suffix(".part")
        part.write_text(document(triton_kernels, cuda, triton.__version__, old))
        os.replace(part, DOCUMENT)
        print(f"Written to {DOCUMENT.relative_to(ROOT)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
