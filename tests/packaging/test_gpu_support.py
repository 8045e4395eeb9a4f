"""What `growkernels info` says of GPU kernels: which there are, and why they cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from growkernels import info
from growkernels.ops import backends, gpu_support

uncached = gpu_support.gpu.__wrapped__
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have one.\nMore."


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends a build and a GPU: what the library was compiled for, and what torch sees."""

    def pretend(
        architectures: tuple[str, ...] = ("80-real", "90"),
        capability: tuple[int, int] | None = None,
        cuda: str | None = "13.0",
        triton: str | None = "3.6.0",
    ) -> None:
        build = SimpleNamespace(
            cuda_families=("eigen", "virtual_grad") if architectures else (),
            cuda_architectures=architectures,
            cuda_version="13.0" if architectures else None,
            cuda_note="CUDA on: /cuda" if architectures else "CUDA off: no CUDA toolkit",
        )

        properties = SimpleNamespace(
            major=(capability or (0, 0))[0],
            minor=(capability or (0, 0))[1],
            multi_processor_count=132,
            shared_memory_per_block_optin=227 * 1024,
        )

        def init() -> None:
            raise RuntimeError(NO_DRIVER)

        monkeypatch.setattr(gpu_support, "build_info", lambda: build)
        monkeypatch.setattr(gpu_support, "find_spec", lambda _: triton)
        monkeypatch.setattr(gpu_support, "version", lambda _: triton)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(gpu_support, "gpu", uncached)
        monkeypatch.setattr(torch.cuda, "init", init)
        gpu_support._in_torchs_words.cache_clear()

    return pretend


def table() -> dict[tuple[str, str], gpu_support.GpuKernels]:
    return {(row.family, row.language): row for row in gpu_support.gpu_kernels()}


def test_every_family_has_its_row() -> None:
    assert set(table()) == {
        ("basis_conv", "Triton"),
        ("eigen", "CUDA C++"),
        ("splitting", "Triton"),
        ("virtual_grad", "CUDA C++"),
    }
    registered = {op for row in table().values() for op in row.ops}
    for op in registered:
        assert hasattr(torch.ops.growkernels, op)
    assert [row["family"] for row in info.gpu_kernel_table()] == sorted(f for f, _ in table())


def test_a_cpu_build_says_so(machine: Callable[..., None]) -> None:
    machine(architectures=(), cuda=None)
    rows = table()
    triton, cuda = rows["basis_conv", "Triton"], rows["virtual_grad", "CUDA C++"]
    assert triton.built == "compiled at first use by Triton 3.6.0"
    assert triton.obstacle == f"torch {torch.__version__} is a CPU build"
    assert cuda.built == "not compiled"
    assert cuda.obstacle == "CUDA off: no CUDA toolkit"


def test_a_cuda_build_without_a_gpu_quotes_torch(machine: Callable[..., None]) -> None:
    machine()
    said = f"torch {torch.__version__} sees no GPU (Found no NVIDIA driver on your system)"
    assert {row.obstacle for row in table().values()} == {said}
    built = table()["eigen", "CUDA C++"].built
    assert built == "compiled for sm_80, sm_90, PTX of 90 by CUDA 13.0"
    refused = dict(backends.choose_backend("symmetric_eigs", "cuda", torch.float32).refused)
    assert refused["cuda"] == refused["aten"] == said


def test_a_gpu_that_fits_has_no_obstacle(machine: Callable[..., None]) -> None:
    machine(capability=(9, 0))
    assert {row.obstacle for row in table().values()} == {None}
    choice = backends.choose_backend("virtual_grads", "cuda", torch.bfloat16)
    assert choice.backend == "cuda"
    exact = backends.choose_backend("virtual_grads", "cuda", torch.float64)
    assert exact.backend == "aten"
    assert dict(exact.refused)["cuda"] == "float64 is left to the vendor's products"


def test_a_gpu_that_does_not_fit_is_told_the_remedy(machine: Callable[..., None]) -> None:
    machine(("80-real", "90-real"), capability=(7, 5))
    reasons = {language: row.obstacle for (_, language), row in table().items()}
    assert reasons["Triton"] == "the GPU is an sm_75; the kernels need sm_80 or newer"
    assert reasons["CUDA C++"] == (
        "the GPU is an sm_75, but they are compiled for sm_80, sm_90 by CUDA 13.0; build with "
        "TORCH_CUDA_ARCH_LIST=7.5"
    )


def test_without_triton_there_are_cuda_kernels_alone(machine: Callable[..., None]) -> None:
    machine(capability=(8, 0), triton=None)
    assert table()["basis_conv", "Triton"].built == "Triton is not installed"
    assert table()["splitting", "Triton"].obstacle == "Triton is not installed"
    assert table()["eigen", "CUDA C++"].obstacle is None


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        (("80-real",), (8, 0), True),
        (("80-real",), (8, 9), True),
        (("86-real",), (8, 0), False),
        (("80-real", "90-real"), (10, 0), False),
        (("80-real", "90"), (12, 0), True),
        (("90-virtual",), (9, 0), True),
        (("90-virtual",), (8, 0), False),
        (("90a-real",), (9, 0), True),
        (("90a",), (10, 0), False),
        (("80",), (7, 5), False),
        (("100-real",), (10, 3), True),
    ],
)
def test_which_gpus_run_code_for_which_architectures(
    architectures: tuple[str, ...], capability: tuple[int, int], fits: bool
) -> None:
    assert gpu_support.compiled_for(architectures, capability) == fits
