"""Every Triton kernel compiles for every architecture within its limits; the check can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_kernels  # noqa: E402
import kernel_resources  # noqa: E402
from kernel_resources import KernelResources, Usage, parse_usage, triton_families  # noqa: E402

pytest.importorskip("triton", reason="needs Triton, which compiles for a GPU without one")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here Triton interprets kernels, or the GPU tests have compiled."""
    paths = [str(Path(__file__).parent), str(ROOT)]
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_kernels.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


def test_every_listed_configuration_compiles_without_spills_and_fits() -> None:
    finished = run()
    assert finished.returncode == 0, finished.stderr
    for family in triton_families():
        for architecture in ("sm_80", "sm_90"):
            assert any(
                line.startswith(f"{family}: ") and architecture in line
                for line in finished.stdout.splitlines()
            )


def test_a_spilling_and_an_oversized_configuration_fail() -> None:
    finished = run("--module", "greedy_kernels", "--write")
    assert finished.returncode == 1
    assert "Written" not in finished.stdout
    sentences = finished.stderr.splitlines()
    assert len(sentences) == 4
    for architecture in (80, 90):
        assert any(
            f"spilling on sm_{architecture} keeps" in sentence and "local memory" in sentence
            for sentence in sentences
        )
        assert any(
            f"oversized on sm_{architecture} needs" in sentence and "shared memory" in sentence
            for sentence in sentences
        )
    (line,) = (line for line in finished.stdout.splitlines() if "oversized, sm_90" in line)
    assert line.endswith("wgmma")


def test_a_build_that_leaves_out_an_argument_is_one_sentence() -> None:
    finished = run("--module", "misdescribed_kernels")
    assert finished.returncode == 2
    assert "'incomplete' describes the arguments ['values']" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_every_tile_of_the_convolution_is_in_the_inventory() -> None:
    from triton_builds import basis_conv

    from growkernels.ops.basis_conv import triton_tiles as tiles

    names = [build.name for build in basis_conv.builds()]
    assert len(set(names)) == len(names)
    per_type = {"bf16": 2, "fp32": 4}
    for name, itemsize in per_type.items():
        for tile in tiles.FORWARD_TILES[itemsize]:
            assert f"convolve {name} {tile.positions}x{tile.filters}" in names
            assert f"mix {name} {tile.positions}x{tile.filters}" in names
        for tile in tiles.ROW_TILES.get(itemsize, ()):
            assert f"convolve_rows {name} {tile.positions}x{tile.filters}" in names
        for back in tiles.BACKWARD_TILES[itemsize]:
            assert f"coefficient_backward {name} {back.filters}x{back.combinations}" in names


LISTING = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN2gk5normsILi64EEEvPKf:
  REG:40 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN2gk5normsILi64EEEvPKf:
  REG:38 STACK:16 SHARED:2048 LOCAL:8 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_a_library_lists_its_kernels_by_architecture() -> None:
    assert parse_usage(LISTING) == [
        Usage("_ZN2gk5normsILi64EEEvPKf", 80, 40, 0, 2048),
        Usage("_ZN2gk5normsILi64EEEvPKf", 90, 38, 24, 2048),
    ]


def test_cuda_kernels_are_named_by_family_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = "_ZN11growkernels12virtual_grad4cuda5normsINS1_4TileIfLi64EEEEEvPKf"
    plain = "_ZN11growkernels9splitting4eigsEPf"
    monkeypatch.setattr(
        kernel_resources,
        "resource_usage",
        lambda library: [
            Usage(tile, 80, 40, 0, 0), Usage(plain, 90, 32, 0, 1024), Usage(tile, 80, 40, 0, 0),
            Usage(plain, 75, 32, 0, 0),
        ],
    )  # fmt: skip
    eigs, norms = kernel_resources.cuda_kernels(Path("library"))
    assert (eigs.family, eigs.name, eigs.architecture) == ("splitting", "eigs", 90)
    assert eigs.shared_bytes == 0  # what every block has is none of the kernel's
    assert (norms.family, norms.name) == ("virtual_grad", "norms<Tile<float, 64> >")


def kernel(**changes: object) -> KernelResources:
    values = {
        "family": "splitting", "name": "hvp bf16", "architecture": 80, "warps": 4,
        "registers": 90, "stack_bytes": 0, "shared_bytes": 163 * 1024, "matrix_unit": "mma",
    }  # fmt: skip
    return KernelResources(**{**values, **changes})  # type: ignore[arg-type]


def test_limits_are_those_of_each_architecture() -> None:
    assert kernel().faults() == []
    assert len(kernel(shared_bytes=163 * 1024 + 1).faults()) == 1
    assert kernel(shared_bytes=227 * 1024, architecture=90).faults() == []
    assert len(kernel(shared_bytes=227 * 1024 + 1, architecture=90, stack_bytes=8).faults()) == 2


def test_the_document_keeps_the_cuda_kernels_it_was_not_given() -> None:
    triton = [kernel(), kernel(architecture=90, registers=80, matrix_unit="wgmma")]
    cuda = [kernel(name="norms<64>", warps=None, matrix_unit=None)]
    whole = gpu_kernels.document(triton, cuda, "3.6.0", "")
    assert "| `hvp bf16` | 4 | 90 | 0 | 163 | mma | 80 | 0 | 163 | wgmma |" in whole
    assert "| `norms<64>` | – | 90 | 0 | 163 | – | – | – |" in whole
    later = gpu_kernels.document([], None, "3.6.0", whole)
    assert "hvp bf16" not in later
    assert later.endswith(whole[whole.index("## CUDA C++") :])
    assert gpu_kernels.document(triton, None, "3.6.0", whole) == whole
