"""The compiled CUDA sources: in the library, registered, within the GPU's limits, and refused
without a GPU in one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import growkernels as gk
from growkernels.experiments.devices import usable_device
from growkernels.ops.library import build_info, library_path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from kernel_resources import SHARED_LIMITS, KernelResources, cuda_kernels  # noqa: E402

LIBRARY = library_path()
CUDA_OPS = {
    "eigen": ("symmetric_eigs", "search_space_step_"),
    "virtual_grad": ("virtual_grads", "virtual_grad_norms", "accumulate_virtual_grads"),
}


@pytest.fixture(scope="module")
def kernels() -> list[KernelResources]:
    return cuda_kernels(LIBRARY)


def test_the_package_under_test_is_the_installed_one() -> None:
    assert ROOT not in LIBRARY.parents or ".venv" in str(LIBRARY)


def test_every_family_with_cuda_sources_is_compiled() -> None:
    sources = {path.parent.name for path in (ROOT / "csrc").glob("*/cuda*.cu")}
    assert set(build_info().cuda_families) == sources == set(CUDA_OPS)
    assert build_info().cuda_version == torch.version.cuda
    assert build_info().cuda_note.startswith("CUDA on: ")


@pytest.mark.parametrize("op", [op for ops in CUDA_OPS.values() for op in ops])
def test_the_ops_are_registered(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"growkernels::{op}", "CUDA")


def test_every_kernel_is_there_for_every_architecture(kernels: list[KernelResources]) -> None:
    names = {kernel.name for kernel in kernels}
    assert {(kernel.name, kernel.architecture) for kernel in kernels} == {
        (name, architecture) for name in names for architecture in SHARED_LIMITS
    }
    assert {kernel.family for kernel in kernels} >= set(CUDA_OPS)


def test_no_kernel_spills_or_takes_more_shared_memory_than_there_is(
    kernels: list[KernelResources],
) -> None:
    assert [fault for kernel in kernels for fault in kernel.faults()] == []


def test_the_library_takes_its_cuda_from_torch() -> None:
    needed = subprocess.run(
        ["readelf", "--dynamic", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    runtime = f"libcudart.so.{str(torch.version.cuda).split('.')[0]}"
    libraries = set(re.findall(r"\(NEEDED\).*\[(.+)\]", needed))
    assert {"libtorch_cpu.so", "libc10_cuda.so", runtime} <= libraries
    # In a process of its own: torchvision brings another runtime along.
    program = "import growkernels; print(open('/proc/self/maps').read())"
    maps = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True
    ).stdout
    loaded = {line.split()[-1] for line in maps.splitlines() if "libcudart" in line}
    (path,) = map(Path, loaded)
    assert Path(torch.__file__).parents[1] in path.parents


def test_shapes_on_a_gpu_are_known_without_one() -> None:
    with FakeTensorMode():
        h = [torch.empty(6, 5, device="cuda"), torch.empty(4, 3, device="cuda")]
        norms = gk.virtual_grad_norms(h, h, "linear_relu")
        grads = gk.virtual_grads(h, h, "linear_relu")
    assert norms.device.type == "cuda"
    assert [tuple(g.shape) for g in (norms, *grads)] == [(2,), (5, 5), (3, 3)]


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@needs_no_gpu
def test_tensors_on_a_gpu_are_refused_in_one_sentence() -> None:
    with pytest.raises(RuntimeError, match="Found no NVIDIA driver on your system"):
        gk.virtual_grads([torch.ones(2, 2).cuda()], [torch.ones(2, 2).cuda()], "linear_relu")
    with pytest.raises(ValueError, match=r"--device cuda cannot be used here .* choose cpu, or"):
        usable_device("cuda")


@needs_no_gpu
@pytest.mark.parametrize("paper", ["sensli", "basis", "scaling"])
def test_the_command_refuses_a_gpu_in_one_sentence(paper: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [command_line(), "reproduce", paper, "--device", "cuda", "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert re.fullmatch(
        r"growkernels: --device cuda cannot be used here \(.+\); choose cpu, or cuda on a machine "
        r"with a GPU and a CUDA build of torch\.\n",
        finished.stderr,
    )
    assert not out.exists()


def command_line() -> str:
    return str(Path(sys.executable).parent / "growkernels")


def test_info_says_what_the_library_was_built_for() -> None:
    finished = subprocess.run(
        [command_line(), "info", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(finished.stdout)
    assert report["built"]["cuda_families"] == sorted(CUDA_OPS)
    kernels = {(row["family"], row["language"]): row for row in report["gpu_kernels"]}
    for family in CUDA_OPS:
        row = kernels[family, "CUDA C++"]
        assert row["built"].startswith("compiled for sm_80, sm_90")
        if not torch.cuda.is_available():
            assert "sees no GPU (Found no NVIDIA driver" in row["obstacle"]
