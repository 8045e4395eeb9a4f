"""Lends the tests of GPU kernels a compiler for the host, and GPUs that are none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

EMULATION = str(Path(__file__).resolve().parents[1] / "gpu_emulation")
if EMULATION not in sys.path:
    sys.path.insert(0, EMULATION)

from host_compiler import HostCompiler  # noqa: E402

from growkernels.ops.gpu_support import Gpu  # noqa: E402


@pytest.fixture(scope="session")
def host_compiler(tmp_path_factory: pytest.TempPathFactory) -> HostCompiler:
    return HostCompiler(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def current_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors whose GPU `torch.cuda.device_of` has made the current one, the latest last."""
    current: list[torch.Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return current


@pytest.fixture
def pass_for_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, ModuleType, Gpu], None]:
    """Makes a family's modules `gpu` and `plan` take all tensors for those of the GPU given."""

    def pretend(gpu: ModuleType, plan: ModuleType, card: Gpu) -> None:
        monkeypatch.setattr(plan, "gpu", lambda device: card)
        for name, asked in vars(gpu).copy().items():
            if name.startswith("plan_"):
                on_gpu = partial(asked, device=torch.device("cuda"))
                monkeypatch.setattr(gpu, name, on_gpu)

    return pretend
